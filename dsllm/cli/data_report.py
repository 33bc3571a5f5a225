"""What a prepared folder holds, as JSON and on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsllm.units import format_count, format_text_bytes

if TYPE_CHECKING:
    from dsllm.data.shards import Manifest, SourceRecord, TokenShards
    from dsllm.spec.sections import Spec

SAMPLE_TOKENS = 200
_PERCENTILES = (50, 90, 99)


def summary(manifest: Manifest) -> str:
    """One line about a prepared folder."""
    train, validation = (manifest.tokens_of(split) for split in ("train", "validation"))
    return (
        f"{manifest.documents:,} documents, {format_text_bytes(manifest.text_bytes)}, {format_count(manifest.tokens)} "
        f"tokens ({format_count(train)} to train on, {format_count(validation)} held out), "
        f"{manifest.vocab_size:,} in the vocabulary, {manifest.text_bytes / manifest.tokens:.2f} bytes a token"
        f"{_dropped_text(_all_dropped(manifest))}"
    )


def facts(directory: Path, spec: Spec | None) -> dict[str, Any]:
    """All that `dsllm data inspect` tells; with a spec the mix of its run too."""
    from dsllm.data.shards import manifest_hash, read_manifest

    manifest = read_manifest(directory)
    return {
        "directory": str(directory),
        "manifest_sha256": manifest_hash(directory),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "dropped": _all_dropped(manifest),
        "splits": {split: _split_facts(manifest, split) for split in ("train", "validation")},
        "sources": [_source_facts(directory, manifest, source) for source in manifest.sources],
        "summary": summary(manifest),
    } | ({} if spec is None else {"mix": _mix_facts(directory, spec)})


def _split_facts(manifest: Manifest, split: Any) -> dict[str, int]:
    streams = [source.streams[split] for source in manifest.with_split(split)]
    return {
        "documents": sum(stream.documents for stream in streams),
        "tokens": sum(stream.tokens for stream in streams),
        "shards": sum(len(stream.shards) for stream in streams),
    }


def _source_facts(directory: Path, manifest: Manifest, source: SourceRecord) -> dict[str, Any]:
    from dsllm.data.shards import TokenShards

    streams = {split: TokenShards(directory, manifest, source.label, split) for split in source.streams}
    first = next(iter(streams.values()))
    return {
        "label": source.label,
        "source": source.source,
        "documents": source.documents,
        "text_bytes": source.text_bytes,
        "dropped": source.dropped,
        "splits": {split: {"tokens": len(shards), **_lengths(shards)} for split, shards in streams.items()},
        "sample": _sample(directory, first),
    }


def _lengths(shards: TokenShards) -> dict[str, int]:
    """Lengths of the documents in tokens, end-of-text included."""
    import numpy as np

    starts = shards.document_starts()
    lengths = np.diff(starts, append=len(shards))
    percentiles = np.percentile(lengths, _PERCENTILES, method="lower").tolist()
    return {
        "documents": len(starts),
        "shortest_document_tokens": int(lengths.min()),
        **{f"percentile_{p}_document_tokens": int(value) for p, value in zip(_PERCENTILES, percentiles, strict=True)},
        "longest_document_tokens": int(lengths.max()),
    }


def _sample(directory: Path, shards: TokenShards) -> str:
    from tokenizers import Tokenizer

    from dsllm.data.shards import TOKENIZER_DIRECTORY, TOKENIZER_FILE

    tokens = shards.read(0, min(SAMPLE_TOKENS, len(shards)))
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_DIRECTORY / TOKENIZER_FILE))
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return text


def print_facts(found: dict[str, Any], verified: bool) -> None:
    """The same for a person."""
    from dsllm.cli.tables import print_table

    typer.echo(f"{found['directory']}: {found['summary']}")
    print_table(
        ["source", "split", "documents", "tokens", "shortest", "median", "99 %", "longest document"],
        [
            (source["label"], split, *_length_cells(counts))
            for source in found["sources"]
            for split, counts in source["splits"].items()
        ],
    )
    for source in found["sources"]:
        typer.echo(
            f"{source['label']}: {source['source']}, {source['documents']:,} documents, "
            f"{format_text_bytes(source['text_bytes'])}{_dropped_text(source['dropped'])}"
        )
    if "mix" in found:
        _print_mix(found["mix"])
    if verified:
        typer.echo("every file is as it was prepared")
    for source in found["sources"]:
        typer.echo(f"\n{source['label']} begins:\n{source['sample']}")


def _length_cells(counts: dict[str, int]) -> tuple[str, ...]:
    lengths = (
        counts["shortest_document_tokens"],
        counts["percentile_50_document_tokens"],
        counts["percentile_99_document_tokens"],
        counts["longest_document_tokens"],
    )
    return f"{counts['documents']:,}", f"{counts['tokens']:,}", *(f"{length:,} tokens" for length in lengths)


def _all_dropped(manifest: Manifest) -> dict[str, int]:
    from collections import Counter

    return dict(sum((Counter(source.dropped) for source in manifest.sources), Counter()))


def _dropped_text(dropped: dict[str, int]) -> str:
    """`; dropped 3 duplicate, 1 too short`, or nothing."""
    return "; dropped " + ", ".join(f"{number:,} {reason}" for reason, number in dropped.items()) if dropped else ""


def _mix_facts(directory: Path, spec: Spec) -> dict[str, Any]:
    """What the spec's run takes from each source, and what is to be warned about."""
    from dataclasses import asdict

    from dsllm.data.mixture import repeated_too_often
    from dsllm.data.run_samples import open_run_samples

    samples = open_run_samples(directory, spec.data, spec.batch.sequence_length, spec.seed)
    uses = samples.mixture.uses(spec.train_steps * spec.batch.global_batch_size)
    return {
        "sources": [{**asdict(use), "epochs": use.epochs} for use in uses],
        "warnings": repeated_too_often(uses, spec.data.max_epochs),
    }


def _print_mix(mix: dict[str, Any]) -> None:
    from dsllm.cli.tables import print_table
    from dsllm.data.mixture import format_epochs

    print_table(
        ["in the run", "share", "samples", "drawn", "epochs", "padding"],
        [
            (
                use["label"],
                f"{use['share']:.1%}",
                f"{use['samples']:,}",
                f"{use['draws']:,}",
                format_epochs(use["epochs"]),
                f"{use['padding_share']:.2%}",
            )
            for use in mix["sources"]
        ],
    )
    for warning in mix["warnings"]:
        typer.echo(warning)
