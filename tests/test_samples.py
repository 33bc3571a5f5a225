"""Samples: what is predicted from what, where documents begin, and what padding is."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import END_OF_TEXT, numbered_documents, open_stream, write_folder

from dsllm.data.packing import open_plan
from dsllm.data.run_samples import RunSamples, open_run_samples, open_validation_samples
from dsllm.data.samples import IGNORED_LABEL, ConcatenatedSamples, PackedSamples, Rows, Samples
from dsllm.errors import DataError
from dsllm.spec.sections import Data, TextSource

LENGTHS = [30, 300, 5, 80, 2, 41, 2, 2]
document_lengths = st.lists(st.integers(2, 90), min_size=1, max_size=40)
sequence_lengths = st.integers(1, 48)


def packed(folder: Path | str, lengths: list[int], sequence_length: int, *, masked: bool = True) -> PackedSamples:
    shards = open_stream(Path(folder), numbered_documents(lengths))
    return PackedSamples(shards, open_plan(shards, sequence_length), sequence_length, mask_documents=masked)


def read_all(samples: Samples) -> Rows:
    return samples.read(np.arange(len(samples)))


def counted(rows: Rows) -> np.ndarray:
    return rows.labels != IGNORED_LABEL


# --- one after the other ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_length", [1, 16, 32, 461])
def test_samples_tile_the_stream_and_share_one_token(tmp_path: Path, sequence_length: int) -> None:
    shards = open_stream(tmp_path, numbered_documents(LENGTHS), shard_tokens=100)
    samples = ConcatenatedSamples(shards, sequence_length)
    stream = shards.read(0, len(shards)).tolist()
    assert len(samples) == (len(stream) - 1) // sequence_length
    whole = len(samples) * sequence_length
    rows = read_all(samples)
    assert rows.inputs.ravel().tolist() == stream[:whole]
    assert rows.labels.ravel().tolist() == stream[1 : whole + 1]
    assert rows.inputs.dtype == rows.labels.dtype == np.int64
    assert rows.positions is None
    assert samples.num_labels(np.arange(len(samples))).tolist() == [sequence_length] * len(samples)


def test_samples_come_in_the_order_that_they_are_asked_for(tmp_path: Path) -> None:
    samples = ConcatenatedSamples(open_stream(tmp_path, numbered_documents(LENGTHS)), 16)
    order = np.array([5, 0, 5, 3])
    assert samples.read(order).inputs.tolist() == read_all(samples).inputs[order].tolist()


def test_the_rest_of_a_stream_is_a_padded_sample_where_that_is_wanted(tmp_path: Path) -> None:
    shards = open_stream(tmp_path, numbered_documents(LENGTHS))  # 462 tokens
    samples = ConcatenatedSamples(shards, 50, pads=True)
    rows = read_all(samples)
    assert rows.labels[counted(rows)].tolist() == shards.read(1, 461).tolist()
    assert samples.num_labels(np.arange(10)).tolist() == [50] * 9 + [11] == counted(rows).sum(axis=1).tolist()
    assert samples.padding_share == pytest.approx(39 / 500)
    assert len(ConcatenatedSamples(shards, 461, pads=True)) == 1


def test_positions_restart_where_end_of_text_is_read(tmp_path: Path) -> None:
    samples = ConcatenatedSamples(
        open_stream(tmp_path, [[1, 2, 0], [3, 0], [4, 5, 6, 0], [7, 8, 0]]), 6, mask_documents=True
    )
    rows = read_all(samples)
    assert rows.inputs.tolist() == [[1, 2, 0, 3, 0, 4]]
    assert rows.labels.tolist() == [[2, 0, 3, 0, 4, 5]]
    assert rows.positions is not None
    assert rows.positions.tolist() == [[0, 1, 0, 1, 0, 1]]


# --- packed -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_packed_every_token_of_every_document_is_predicted_once(lengths: list[int], sequence_length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = read_all(packed(folder, lengths, sequence_length))
    predicted = Counter(rows.labels[counted(rows)].tolist())
    assert predicted == Counter(token for document in numbered_documents(lengths) for token in document)


@settings(deadline=None, max_examples=50)
@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_packed_a_token_is_predicted_from_the_one_before_it(lengths: list[int], sequence_length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = read_all(packed(folder, lengths, sequence_length))
    before = {
        token: previous
        for document in numbered_documents(lengths)
        for previous, token in zip([END_OF_TEXT, *document], document, strict=False)
        if token != END_OF_TEXT
    }
    pairs = zip(rows.inputs[counted(rows)].tolist(), rows.labels[counted(rows)].tolist(), strict=True)
    assert all(before[label] == token for token, label in pairs if label != END_OF_TEXT)


@settings(deadline=None, max_examples=50)
@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_packed_labels_are_counted_without_reading(lengths: list[int], sequence_length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = packed(folder, lengths, sequence_length)
        rows = read_all(samples)
    assert samples.num_labels(np.arange(len(samples))).tolist() == counted(rows).sum(axis=1).tolist()
    assert samples.padding_share == pytest.approx(1 - counted(rows).mean())


def test_packed_positions_restart_at_each_piece_and_at_the_padding(tmp_path: Path) -> None:
    samples = packed(tmp_path, [4, 3, 12], 10)  # the last one is cut: 10 and 2
    rows = read_all(samples)
    assert rows.positions is not None
    assert rows.inputs.tolist() == [[0, 1, 2, 3, 0, 4, 5, 15, 16, END_OF_TEXT], [0, *range(6, 15)]]
    assert rows.labels.tolist() == [[1, 2, 3, 0, 4, 5, 0, 16, 0, IGNORED_LABEL], list(range(6, 16))]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0], list(range(10))]
    assert packed(tmp_path, [4, 3, 12], 10, masked=False).read(np.arange(2)).positions is None


def segments(positions: np.ndarray | None) -> list[list[int]]:
    """Which document of its row each position is in, as transformers' masks have it."""
    import torch
    from transformers.masking_utils import find_packed_sequence_indices

    found = find_packed_sequence_indices(torch.from_numpy(positions))
    assert found is not None
    return found.tolist()


def test_transformers_finds_the_documents_of_a_stream(tmp_path: Path) -> None:
    samples = ConcatenatedSamples(open_stream(tmp_path, numbered_documents(LENGTHS)), 64, mask_documents=True)
    rows = read_all(samples)
    begins = rows.inputs == END_OF_TEXT
    begins[:, 0] = False
    assert segments(rows.positions) == np.cumsum(begins, axis=1).tolist()


def test_transformers_finds_the_pieces_of_a_plan_and_the_padding(tmp_path: Path) -> None:
    samples = packed(tmp_path, LENGTHS, 64)
    expected = []
    for sequence in range(len(samples)):
        lengths = [length for _, length in samples.plan.pieces_of(sequence)]
        lengths.append(64 - sum(lengths))
        expected.append([segment for segment, length in enumerate(lengths) for _ in range(length)])
    assert segments(read_all(samples).positions) == expected


# --- of a run ---------------------------------------------------------------------------------------------------------


def data_section(*sources: tuple[str, float | None], **fields: object) -> Data:
    return Data(
        sources=tuple(TextSource(kind="text", path=label, label=label, weight=weight) for label, weight in sources),
        **fields,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sources: long, short, and one with a single document of 20 tokens, which is held out."""
    write_folder(
        tmp_path,
        {
            "long": {"train": numbered_documents([100] * 20), "validation": numbered_documents([33])},
            "short": {"train": numbered_documents([10] * 12, first=5000)},
            "held": {"validation": numbered_documents([20], first=9000)},
        },
    )
    return tmp_path


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_mix_reads_each_row_from_its_own_source(folder: Path, packing: str, masked: bool) -> None:
    data = data_section(("long", 0.7), ("short", 0.3), packing=packing, mask_documents=masked)
    run = open_run_samples(folder, data, 32, seed=1)
    drawn = run.draw(np.arange(1000, 1040))
    rows = run.read(drawn)
    assert set(drawn.sources.tolist()) == {0, 1}
    assert (rows.positions is not None) == masked
    for row, (source, sample) in enumerate(zip(drawn.sources, drawn.samples, strict=True)):
        alone = run.sources[source].read(sample[np.newaxis])
        assert rows.inputs[row].tolist() == alone.inputs[0].tolist()
        assert rows.labels[row].tolist() == alone.labels[0].tolist()
        if rows.positions is not None and alone.positions is not None:
            assert rows.positions[row].tolist() == alone.positions[0].tolist()
    assert run.num_labels(drawn) == counted(rows).sum()


def test_a_pool_leaves_out_sources_that_have_nothing_to_train_on(folder: Path) -> None:
    run = open_run_samples(folder, data_section(("long", None), ("short", None), ("held", None)), 32, seed=1)
    assert [use.label for use in run.mixture.uses(100)] == ["long", "short"]


def test_a_source_of_weight_0_is_not_even_opened(folder: Path) -> None:
    run = open_run_samples(folder, data_section(("long", 1.0), ("held", 0.0)), 32, seed=1)
    assert [use.label for use in run.mixture.uses(100)] == ["long"]


@pytest.mark.parametrize(("label", "tokens"), [("short", 120), ("held", 0)])
def test_a_weight_on_too_little_text_prints_both_numbers(folder: Path, label: str, tokens: int) -> None:
    data = data_section(("long", 0.5), (label, 0.5))
    with pytest.raises(
        DataError, match=rf": {label}: to train on there are {tokens} tokens, and one sample needs 129 of one source"
    ):
        open_run_samples(folder, data, 128, seed=1)


def test_a_pool_of_too_little_text_prints_both_numbers(folder: Path) -> None:
    data = data_section(("long", None), ("short", None))
    assert isinstance(open_run_samples(folder, data, 1999, seed=1), RunSamples)
    with pytest.raises(DataError, match=r"long, short: to train on there are 2120 tokens, and one sample needs 2001"):
        open_run_samples(folder, data, 2000, seed=1)


def test_every_source_with_held_out_documents_is_a_validation_set(folder: Path) -> None:
    data = data_section(("long", None), ("short", None), ("held", None))
    for packing, samples in (("concatenate", {"long": 2, "held": 2}), ("best_fit", {"long": 3, "held": 2})):
        sets = open_validation_samples(folder, data.model_copy(update={"packing": packing}), 16)
        assert {label: len(opened) for label, opened in sets.items()} == samples


def test_a_folder_without_held_out_documents_says_what_to_change(tmp_path: Path) -> None:
    open_stream(tmp_path, numbered_documents([100]))
    with pytest.raises(DataError, match=r"no document in it is held out; raise data\.validation_fraction"):
        open_validation_samples(tmp_path, data_section(("text", None)), 16)
