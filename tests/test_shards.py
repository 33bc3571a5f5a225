"""Token shards: one stream over many files, and faults of the files found and named."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_shards import numbered_documents, open_stream, write_folder

from dsllm.data.shards import (
    EDGE_BYTES,
    TokenShards,
    edges_sha256,
    folder_checksums,
    manifest_hash,
    read_manifest,
    verify,
    verify_edges,
    write_manifest,
)
from dsllm.errors import DataError

SHARD_TOKENS = 1024
LENGTHS = [1000, 24, 2, 5000, 299]


def open_documents(folder: Path, dtype: str = "uint16") -> tuple[TokenShards, np.ndarray]:
    """Documents in shards of 1,024 tokens; and all their tokens, in order."""
    documents = numbered_documents(LENGTHS)
    manifest = write_folder(folder, {"text": {"train": documents}}, SHARD_TOKENS, dtype)
    return TokenShards(folder, manifest, "text", "train"), np.concatenate(documents)


def open_again(folder: Path) -> TokenShards:
    return TokenShards(folder, read_manifest(folder), "text", "train")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    open_documents(folder)
    return folder


@pytest.fixture
def prepared(pristine: Path, tmp_path: Path) -> Path:
    """A prepared folder that the test may spoil."""
    return shutil.copytree(pristine, tmp_path / "data")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_stream_crosses_shards(tmp_path: Path, dtype: str) -> None:
    shards, tokens = open_documents(tmp_path, dtype)
    assert len(list(tmp_path.glob("*.bin"))) == 7
    assert len(shards) == len(tokens) == 6325
    for start, count in [(0, 6325), (1020, 10), (1024, 1024), (1023, 2050), (6324, 1), (6325, 0)]:
        assert shards.read(start, count).tolist() == tokens[start : start + count].tolist()
        row = np.empty(count, dtype=np.int64)
        shards.read_into(row, start)
        assert row.tolist() == tokens[start : start + count].tolist()


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    shards, tokens = open_documents(tmp_path)
    shards.read(0, 10)[:] = 7
    assert shards.read(0, 10).tolist() == tokens[:10].tolist()


def test_document_starts_are_positions_in_the_stream(tmp_path: Path) -> None:
    shards, _ = open_documents(tmp_path)
    assert shards.document_starts().tolist() == [0, 1000, 1024, 1026, 6026]


def test_sources_and_splits_are_streams_of_their_own(tmp_path: Path) -> None:
    manifest = write_folder(
        tmp_path,
        {
            "news": {"train": [[1, 2, 0]], "validation": [[3, 0], [4, 0]]},
            "books": {"train": [[5, 6, 7, 0]]},
        },
    )
    read = {
        (source.label, split): TokenShards(tmp_path, manifest, source.label, split).read(0, stream.tokens).tolist()
        for source in manifest.sources
        for split, stream in source.streams.items()
    }
    assert read == {
        ("news", "train"): [1, 2, 0],
        ("news", "validation"): [3, 0, 4, 0],
        ("books", "train"): [5, 6, 7, 0],
    }
    assert [source.label for source in manifest.with_split("validation")] == ["news"]
    assert (manifest.tokens_of("train"), manifest.tokens_of("validation"), manifest.tokens) == (7, 4, 11)


def test_every_shard_but_the_last_is_full(tmp_path: Path) -> None:
    shards = open_stream(tmp_path, numbered_documents([700] * 5), SHARD_TOKENS)
    assert [shard.tokens for shard in shards.stream.shards] == [1024, 1024, 1024, 428]


def test_ids_are_little_endian_on_disk(tmp_path: Path) -> None:
    open_stream(tmp_path, [[7, 14, 0]])
    assert (tmp_path / "text-train-00000.bin").read_bytes() == bytes([7, 0, 14, 0, 0, 0])


def flip_a_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_intact_data_verifies(prepared: Path) -> None:
    verify(prepared)
    verify_edges(prepared)


def test_a_corrupt_shard_is_found_by_checksum_and_named(prepared: Path) -> None:
    flip_a_bit(prepared / "text-train-00001.bin", 100)
    open_again(prepared)  # the size is right: only reading it all can tell
    with pytest.raises(DataError, match=r"data: text-train-00001\.bin changed or went missing .* prepare the data"):
        verify(prepared)


@pytest.mark.parametrize("check", [verify, verify_edges])
@pytest.mark.parametrize("name", ["tokenizer.json", "sentencepiece.model"])
def test_any_changed_file_of_the_tokenizer_is_found_by_checksum(
    prepared: Path, check: Callable[[Path], None], name: str
) -> None:
    check(prepared)
    with (prepared / "tokenizer" / name).open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match=rf"tokenizer/{name} changed"):
        check(prepared)


def test_a_manifest_without_the_tokenizers_files_still_has_its_checksum(prepared: Path) -> None:
    write_manifest(prepared, read_manifest(prepared).model_copy(update={"tokenizer_files": {}}))
    verify(prepared)
    (prepared / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json changed or went missing"):
        verify(prepared)


def test_checksums_of_a_folder_are_by_name(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.json", "a.model", "below/c.txt"):
        (tmp_path / name).write_text(name)
    found = folder_checksums(tmp_path)
    assert list(found) == ["a.model", "b.json", "below/c.txt"]
    assert all(found[name] == hashlib.sha256(name.encode()).hexdigest() for name in found)


@pytest.mark.parametrize("size_bytes", [0, 1, EDGE_BYTES - 1, EDGE_BYTES, EDGE_BYTES + 1, 3 * EDGE_BYTES])
def test_the_edges_of_a_file_are_its_first_and_last_mib(tmp_path: Path, size_bytes: int) -> None:
    content = np.random.default_rng(size_bytes).bytes(size_bytes)
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content[:EDGE_BYTES] + content[-EDGE_BYTES:]).hexdigest()
    assert edges_sha256(tmp_path / "file") == expected


@pytest.mark.parametrize("place", [0, 2047])
def test_a_shard_with_changed_edges_is_found_without_reading_it_all(prepared: Path, place: int) -> None:
    flip_a_bit(prepared / "text-train-00003.bin", place)
    with pytest.raises(DataError, match=r"data: text-train-00003\.bin changed or went missing"):
        verify_edges(prepared)


def test_edges_that_were_not_noted_down_are_not_compared(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    (source,) = manifest.sources
    stream = source.streams["train"]
    shards = tuple(shard.model_copy(update={"edges_sha256": ""}) for shard in stream.shards)
    older = source.model_copy(update={"streams": {"train": stream.model_copy(update={"shards": shards})}})
    write_manifest(prepared, manifest.model_copy(update={"sources": (older,)}))
    flip_a_bit(prepared / "text-train-00003.bin", 0)
    verify_edges(prepared)


def test_a_label_that_nothing_was_prepared_of_is_told_with_those_that_there_are(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"source 'news': given, but prepared are text; correct the label, or prepare"):
        read_manifest(prepared).source("news")


def test_a_truncated_shard_is_found_when_it_is_opened(prepared: Path) -> None:
    shard = prepared / "text-train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin: 2046 bytes, but 2048 were prepared; delete the folder"):
        open_again(prepared)


def test_a_missing_shard_is_found_when_it_is_opened(prepared: Path) -> None:
    (prepared / "text-train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: missing; delete the folder and prepare the data again"):
        open_again(prepared)


def test_a_folder_without_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data in it; run dsllm data prepare"):
        read_manifest(tmp_path)


def test_an_unreadable_manifest_is_one_line(prepared: Path) -> None:
    (prepared / "manifest.json").write_text('{"version": 1')
    with pytest.raises(DataError, match=r"manifest\.json: unreadable \(content: .*prepare the data again") as caught:
        read_manifest(prepared)
    assert "\n" not in str(caught.value)


def test_the_manifests_hash_follows_the_data(tmp_path: Path) -> None:
    open_stream(tmp_path, numbered_documents([10]))
    first = manifest_hash(tmp_path)
    assert first == manifest_hash(tmp_path)
    open_stream(tmp_path, numbered_documents([11]))
    assert first != manifest_hash(tmp_path)
