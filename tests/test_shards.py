"""Token shards: one stream over many files, and faults of the files found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_text import text_spec, write_corpus

from dsllm.data.prepare import prepare
from dsllm.data.shard_writer import ShardWriter
from dsllm.data.shards import Manifest, SplitRecord, TokenShards, manifest_hash, read_manifest, verify, write_manifest
from dsllm.errors import DataError

SHARD_TOKENS = 1024


def write_documents(folder: Path, lengths: list[int], dtype: str = "uint16") -> tuple[TokenShards, np.ndarray]:
    """Documents of these lengths in shards of 1,024 tokens; and all their tokens, in order."""
    tokens = np.arange(sum(lengths)) * 7 % 60_000
    with ShardWriter(folder, "train", np.dtype(dtype), SHARD_TOKENS) as writer:
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.write(document)
        record = writer.finish()
    manifest = Manifest(
        inputs={},
        dtype=dtype,
        vocab_size=60_000,
        end_of_text_id=0,
        tokenizer_sha256="",
        sources=(),
        splits={"train": record, "validation": SplitRecord(tokens=0, documents=0, shards=())},
        tokens=record.tokens,
        documents=record.documents,
        text_bytes=0,
    )
    write_manifest(folder, manifest)
    return TokenShards.open(folder, "train"), tokens


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare(
        text_spec(write_corpus(folder / "corpus"), f"data.shard_tokens={SHARD_TOKENS}"), folder / "data", processes=1
    )
    return folder / "data"


@pytest.fixture
def prepared(pristine: Path, tmp_path: Path) -> Path:
    """A prepared folder that the test may spoil."""
    return shutil.copytree(pristine, tmp_path / "data")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_stream_crosses_shards(tmp_path: Path, dtype: str) -> None:
    shards, tokens = write_documents(tmp_path, [1000, 24, 1, 5000, 300], dtype)
    assert len(list(tmp_path.glob("*.bin"))) == 7
    assert len(shards) == len(tokens) == 6325
    for start, count in [(0, 6325), (1020, 10), (1024, 1024), (1023, 2050), (6324, 1)]:
        assert shards.read(start, count).tolist() == tokens[start : start + count].tolist()


def test_document_starts_are_positions_in_the_stream(tmp_path: Path) -> None:
    lengths = [1000, 24, 1, 5000, 300]
    shards, _ = write_documents(tmp_path, lengths)
    assert shards.document_starts().tolist() == [0, 1000, 1024, 1025, 6025]


def test_every_shard_but_the_last_is_full(tmp_path: Path) -> None:
    shards, _ = write_documents(tmp_path, [700] * 5)
    assert [shard.tokens for shard in shards.manifest.splits["train"].shards] == [1024, 1024, 1024, 428]


def test_ids_are_little_endian_on_disk(tmp_path: Path) -> None:
    write_documents(tmp_path, [3])
    assert (tmp_path / "train-00000.bin").read_bytes() == bytes([0, 0, 7, 0, 14, 0])


def test_intact_data_verifies(prepared: Path) -> None:
    verify(prepared)


def test_a_corrupt_shard_is_found_by_checksum_and_named(prepared: Path) -> None:
    shard = prepared / "train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    TokenShards.open(prepared, "train")  # the size is right: only reading it all can tell
    with pytest.raises(DataError, match=r"data: train-00001\.bin changed or went missing .* prepare the data again"):
        verify(prepared)


def test_a_changed_tokenizer_is_found_by_checksum(prepared: Path) -> None:
    with (prepared / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json changed"):
        verify(prepared)


def test_a_truncated_shard_is_found_when_it_is_opened(prepared: Path) -> None:
    shard = prepared / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin: 2046 bytes, but 2048 were prepared; delete the folder"):
        TokenShards.open(prepared, "train")


def test_a_missing_shard_is_found_when_it_is_opened(prepared: Path) -> None:
    (prepared / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin: missing; delete the folder and prepare the data again"):
        TokenShards.open(prepared, "train")


def test_a_folder_without_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data in it; run dsllm data prepare"):
        TokenShards.open(tmp_path, "train")


def test_an_unreadable_manifest_is_one_line(prepared: Path) -> None:
    (prepared / "manifest.json").write_text('{"version": 1')
    with pytest.raises(DataError, match=r"manifest\.json: unreadable \(content: .*prepare the data again") as caught:
        read_manifest(prepared)
    assert "\n" not in str(caught.value)


def test_the_manifests_hash_follows_the_data(tmp_path: Path) -> None:
    write_documents(tmp_path, [10])
    first = manifest_hash(tmp_path)
    assert first == manifest_hash(tmp_path)
    write_documents(tmp_path, [11])
    assert first != manifest_hash(tmp_path)
