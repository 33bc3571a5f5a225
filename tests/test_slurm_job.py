"""What the variables of a Slurm job say: nodes, tasks of each, steps, and the port that follows from the job."""

from __future__ import annotations

import time
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.launch.slurm_job import expand_counts, expand_nodelist, in_step, rendezvous_port


@pytest.mark.parametrize(
    ("step", "expected"),
    [("0", True), ("17", True), (None, False), ("", False), ("4294967290", False), ("4294967291", False)],
)
def test_a_batch_script_and_the_shell_of_salloc_are_no_steps(step: str | None, expected: bool) -> None:
    assert in_step({} if step is None else {"SLURM_STEP_ID": step}) is expected


def test_the_port_follows_from_the_job_and_is_none_that_linux_gives_away() -> None:
    ports = {rendezvous_port({"SLURM_JOB_ID": str(job)}) for job in range(100_000, 130_000)}
    assert (min(ports), max(ports), len(ports)) == (10_000, 29_999, 20_000)


@pytest.mark.parametrize("job", [None, "", "12a"])
def test_without_a_job_there_is_no_port(job: str | None) -> None:
    with pytest.raises(UserError, match=r"SLURM_JOB_ID: given '.*'; must be the number of a job; start the run inside"):
        rendezvous_port({} if job is None else {"SLURM_JOB_ID": job})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("a,b-2,c.example.org", ["a", "b-2", "c.example.org"]),
        ("node[01-03,7],gpu-[1-2]-ib", ["node01", "node02", "node03", "node7", "gpu-1-ib", "gpu-2-ib"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("a[009-11]", ["a009", "a010", "a011"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
    ],
)
def test_a_nodelist_expands_as_scontrol_show_hostnames_has_it(text: str, names: list[str]) -> None:
    assert expand_nodelist(text, "SLURM_JOB_NODELIST") == names


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "a,", ",a", "a,,b", "a b", "a[1-2", "a1-2]", "a[[1]]", "a[]", "a[1-]", "a[2-1]", "a[1,]", "a[x]"),
        *("a[0-99999999]", "a[0-60000][0-60000]", "a[" + "9" * 5000 + "]", "[" * 5000),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_nodelist_is_refused_at_once(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(UserError) as refusal:
        expand_nodelist(text, "SLURM_JOB_NODELIST")
    assert str(refusal.value) == (
        f"SLURM_JOB_NODELIST: given '{text}'; must be a list of nodes such as node[01-03,7],gpu1"
    )
    assert time.perf_counter() - started < 1


def test_a_node_that_is_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match="which names a node twice; leave it as Slurm sets it"):
        expand_nodelist("a[1-2],a2", "SLURM_JOB_NODELIST")


PREFIXES = st.from_regex(r"[a-z][a-z.-]{0,4}", fullmatch=True)
SUFFIXES = st.sampled_from(["", "", "-ib", ".cluster"])


@st.composite
def groups_of_nodes(draw: st.DrawFn) -> tuple[str, str, list[str]]:
    """A prefix, a suffix and the digits between them; all numbers of one width are padded, as Slurm has them."""
    width = draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(0, 10**width - 1), min_size=1, max_size=30, unique=True))
    return draw(PREFIXES), draw(SUFFIXES), [str(number).zfill(width) for number in sorted(numbers)]


def compress(prefix: str, suffix: str, digits: list[str]) -> str:
    """One element of a nodelist, with a range for each run of numbers that follow each other."""
    runs = []
    for _, run in groupby(enumerate(digits), key=lambda pair: int(pair[1]) - pair[0]):
        members = [text for _, text in run]
        runs.append(members[0] if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{prefix}[{','.join(runs)}]{suffix}"


@given(st.lists(groups_of_nodes(), min_size=1, max_size=4, unique_by=lambda group: group[:2]))
def test_a_compressed_nodelist_expands_to_the_names_it_came_from(groups: list[tuple[str, str, list[str]]]) -> None:
    names = [f"{prefix}{number}{suffix}" for prefix, suffix, digits in groups for number in digits]
    compressed = ",".join(compress(*group) for group in groups)
    assert expand_nodelist(compressed, "SLURM_JOB_NODELIST") == names


@given(st.text(alphabet="a1[]-,9 ", max_size=12))
def test_any_text_is_a_nodelist_or_is_refused(text: str) -> None:
    try:
        names = expand_nodelist(text, "SLURM_JOB_NODELIST")
    except UserError:
        return
    assert names
    assert not any(character in name for name in names for character in "[], ")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8", [8]),
        ("8(x2),4", [8, 8, 4]),
        ("2,1", [2, 1]),
        ("", []),
        ("8(x2),", []),
        ("8(x", []),
        ("1(x999999999)", []),
    ],
)
def test_numbers_of_nodes_that_are_alike_are_spelled_out(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts
