"""How fast prepared tokens reach the loop: opening 10 billion of them, tokens a second, and the cost of any position.

The large folder is of sparse files, which take no disk; its documents are real, ten million of them. Every opening is
timed in a fresh process, after its imports, whose own cost is told too.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from measure import describe_machine, write_results
from rich.console import Console
from rich.table import Table

from dsllm.data.shards import Manifest, Shard, SourceRecord, StreamRecord, write_manifest
from dsllm.spec.sections import Data, TextSource

SHARD_TOKENS = 100_000_000
DOCUMENT_TOKENS = 1000
SEQUENCE_LENGTH = 1024
GLOBAL_BATCH_SIZE = 512
MICRO_BATCH_SIZE = 8
SEED = 1337
END_OF_TEXT = 0
ROUND_SECONDS, ROUNDS = 1.0, 5
ACCESSES = 400
WAYS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "concatenated, masked": {"mask_documents": True},
    "best fit, masked": {"packing": "best_fit", "mask_documents": True},
}
LARGEST_SECONDS, LARGEST_RESIDENT_BYTES, LEAST_TOKENS_PER_SECOND, LARGEST_LATENCY_RATIO = 1.0, 300e6, 20e6, 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=10e9, help="tokens of the large folder")
    parser.add_argument("--folder", type=Path, help="where to make the two folders; a temporary one when absent")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # what the fresh processes are started with
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--without-torch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_in_this_process(args.open, args.way, args.without_torch, args.started)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Path(folder), int(args.tokens), Console())
    show(Console(), results)
    path = write_results("data-loading.json", {"machine": describe_machine(), **results})
    Console().print(f"Written to {path}")
    return 0


def measure(folder: Path, num_tokens: int, console: Console) -> dict[str, Any]:
    large, warm = folder / "large", folder / "warm"
    with console.status(f"making {num_tokens / 1e9:g} billion tokens, sparse"):
        write_folder(large, num_tokens, sparse=True)
        write_folder(warm, SHARD_TOKENS, sparse=False)
    with console.status("packing"):
        began = time.perf_counter()
        open_samples(large, "best fit, masked")
        packing_seconds = time.perf_counter() - began
        open_samples(warm, "best fit, masked")
    with console.status("opening in fresh processes"):
        opened = [open_in_a_fresh_process(large, way, without) for way in WAYS for without in (True, False)]
    with console.status("reading"):
        read = [{"way": way, "tokens_per_second": tokens_per_second(warm, way)} for way in WAYS]
        accessed = [access for way in WAYS for access in latencies(large, way)]
    return {
        "tokens": num_tokens,
        "documents": num_tokens // DOCUMENT_TOKENS,
        "sequence_length": SEQUENCE_LENGTH,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "packing_seconds": packing_seconds,
        "opening": opened,
        "reading": read,
        "random_access": accessed,
    }


# --- the folders ------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, num_tokens: int, *, sparse: bool) -> None:
    """A prepared folder of one source, in 16 bits. Checksums are left out: nothing here asks for them."""
    folder.mkdir()
    generator = np.random.default_rng(SEED)
    counts = [min(SHARD_TOKENS, num_tokens - first) for first in range(0, num_tokens, SHARD_TOKENS)]
    shards = tuple(write_shard(folder, index, count, generator, sparse) for index, count in enumerate(counts))
    documents = sum(shard.documents for shard in shards)
    record = SourceRecord(
        label="text",
        source="text source 'text'",
        documents=documents,
        text_bytes=0,
        dropped={},
        streams={"train": StreamRecord(tokens=num_tokens, documents=documents, shards=shards)},
    )
    write_manifest(
        folder,
        Manifest(
            inputs={},
            dtype="uint16",
            vocab_size=2**16,
            end_of_text_id=END_OF_TEXT,
            tokenizer_sha256="",
            sources=(record,),
        ),
    )


def write_shard(folder: Path, index: int, count: int, generator: np.random.Generator, sparse: bool) -> Shard:
    """Documents of random lengths, about DOCUMENT_TOKENS each."""
    name = f"text-train-{index:05d}"
    inner = generator.choice(count - 1, count // DOCUMENT_TOKENS - 1, replace=False, shuffle=False) + 1
    starts = np.concatenate([[0], np.sort(inner)]).astype("<i8")
    (folder / f"{name}.idx").write_bytes(starts.tobytes())
    if sparse:
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(2 * count)
    else:
        tokens = generator.integers(1, 2**16, count, dtype="<u2")
        tokens[starts - 1] = END_OF_TEXT
        tokens.tofile(folder / f"{name}.bin")
    return Shard(
        file=f"{name}.bin",
        index=f"{name}.idx",
        tokens=count,
        documents=len(starts),
        sha256="",
        index_sha256="",
    )


# --- opening ----------------------------------------------------------------------------------------------------------


def open_in_a_fresh_process(folder: Path, way: str, without_torch: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--open", str(folder), "--way", way]
    command += ["--without-torch"] if without_torch else []
    command += ["--started", str(time.time())]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, Any] = json.loads(output)
    return measured


def open_in_this_process(folder: Path, way: str, without_torch: bool, started: float) -> dict[str, Any]:
    """Seconds from the start of Python to the end of the imports, and from there to the first micro-batch; bytes
    resident after each."""
    if not without_torch:
        import dsllm.data.loader
    import dsllm.data.run_samples  # noqa: F401

    import_seconds, imported_bytes = time.time() - started, resident_bytes()
    began = time.perf_counter()
    if without_torch:
        samples = open_samples(folder, way)
        drawn = samples.draw(np.arange(GLOBAL_BATCH_SIZE))
        samples.num_labels(drawn)
        samples.read(drawn[:MICRO_BATCH_SIZE])
    else:
        batches = micro_batches(folder, way)
        next(batches)
    return {
        "way": way,
        "torch": not without_torch,
        "import_seconds": import_seconds,
        "first_batch_seconds": time.perf_counter() - began,
        "imported_resident_bytes": imported_bytes,
        "resident_bytes": resident_bytes(),
    }


def open_samples(folder: Path, way: str) -> Any:
    from dsllm.data.run_samples import open_run_samples

    data = Data(sources=(TextSource(kind="text", path="text", label="text"),), **WAYS[way])
    return open_run_samples(folder, data, SEQUENCE_LENGTH, SEED)


def micro_batches(folder: Path, way: str) -> Iterator[dict[str, Any]]:
    from dsllm.data.loader import training_micro_batches

    return training_micro_batches(
        open_samples(folder, way),
        start_step=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        rank=0,
        world_size=1,
    )


def resident_bytes() -> int:
    """Of this process, mapped files included."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert match, "no VmRSS in /proc/self/status"
    return 1024 * int(match.group(1))


# --- reading ----------------------------------------------------------------------------------------------------------


def tokens_per_second(folder: Path, way: str) -> float:
    """Of the loader, its data in the page cache: what a loop gets that does nothing else; the median of some rounds."""
    batches = micro_batches(folder, way)
    for _ in islice(batches, 2 * SHARD_TOKENS // (SEQUENCE_LENGTH * MICRO_BATCH_SIZE)):  # two epochs: all is mapped
        pass
    return statistics.median(tokens_per_second_of_a_round(batches) for _ in range(ROUNDS))


def tokens_per_second_of_a_round(batches: Iterator[dict[str, Any]]) -> float:
    began, tokens = time.perf_counter(), 0
    while time.perf_counter() - began < ROUND_SECONDS:
        tokens += next(batches)["input_ids"].numel()
    return tokens / (time.perf_counter() - began)


def latencies(folder: Path, way: str) -> list[dict[str, Any]]:
    """Of single samples in the page cache: the first and the last of the data, and by place in the run."""
    samples = open_samples(folder, way)
    source = samples.sources[0]

    def read_of_run(run_samples: np.ndarray) -> object:
        return samples.read(samples.draw(run_samples))

    places: dict[str, tuple[Callable[[np.ndarray], object], int]] = {
        "first samples of the data": (source.read, 0),
        "last samples of the data": (source.read, len(source) - ACCESSES),
        "from step 0 on": (read_of_run, 0),
        "from step 1,000,000 on": (read_of_run, 1_000_000 * GLOBAL_BATCH_SIZE),
    }
    return [
        {"way": way, "place": place, "median_microseconds": median_microseconds(read, first)}
        for place, (read, first) in places.items()
    ]


def median_microseconds(read: Callable[[np.ndarray], object], first: int) -> float:
    ids = np.arange(first, first + ACCESSES)
    read(ids)  # into the page cache: what a disk takes is no matter of ours
    seconds = []
    for index in ids:
        began = time.perf_counter()
        read(index[np.newaxis])
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds)


# --- the table --------------------------------------------------------------------------------------------------------


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table("what", "", "measured", "wanted", "", title=f"{results['tokens'] / 1e9:g} billion tokens")
    for row in results["opening"]:
        what = f"{row['way']}, {'with' if row['torch'] else 'without'} torch"
        seconds, resident = row["first_batch_seconds"], row["resident_bytes"]
        table.add_row("imports", what, f"{row['import_seconds']:.2f} s", "", "")
        table.add_row("then to the first batch", what, f"{seconds:.2f} s", *verdict(seconds, LARGEST_SECONDS, "s"))
        mb, largest_mb = resident / 1e6, LARGEST_RESIDENT_BYTES / 1e6
        imported = f"{mb:.0f} MB, of the imports {row['imported_resident_bytes'] / 1e6:.0f}"
        table.add_row("resident", what, imported, *verdict(mb, largest_mb, "MB"))
    for row in results["reading"]:
        millions, least = row["tokens_per_second"] / 1e6, LEAST_TOKENS_PER_SECOND / 1e6
        outcome = "ok" if millions >= least else "missed"
        table.add_row("reading", row["way"], f"{millions:.0f} M tokens/s", f">= {least:.0f} M tokens/s", outcome)
    access = results["random_access"]
    for number, row in enumerate(access):
        base = access[number - number % 2]["median_microseconds"]  # the place at the beginning stands before its end
        wanted = verdict(row["median_microseconds"] / base, LARGEST_LATENCY_RATIO, "x") if number % 2 else ("", "")
        table.add_row("a sample", f"{row['way']}, {row['place']}", f"{row['median_microseconds']:.0f} µs", *wanted)
    table.add_row("packing", f"{results['documents']:,} documents", f"{results['packing_seconds']:.1f} s", "", "")
    console.print(table)


def verdict(measured: float, largest: float, unit: str) -> tuple[str, str]:
    return f"<= {largest:g} {unit}", "ok" if measured <= largest else "missed"


if __name__ == "__main__":
    sys.exit(main())
