"""One preparation on several machines: each makes a part of the pieces, and one of them joins all parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsllm.data.preparation.assemble import assemble, check_joined, finish, reuse
from dsllm.data.preparation.encode import encoder, is_much
from dsllm.data.preparation.join import Joiner
from dsllm.data.preparation.piece_store import PieceFile
from dsllm.data.preparation.pipeline import InputChangedError, Part, Pipeline, Progress, size_of
from dsllm.data.preparation.recipe import Recipe, open_sources, prepared_fields, settle_recipe
from dsllm.data.preparation.workplace import (
    PART_FILE,
    PIECES,
    SHARDS,
    STAGING,
    refuse_foreign_files,
    start_over,
    workplace,
)
from dsllm.data.shards import (
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    Manifest,
    Record,
    file_sha256,
    read_manifest,
    write_durably,
)
from dsllm.errors import UserError
from dsllm.launch.devices import num_cores
from dsllm.spec.sections import Spec


class PartPiece(Record):
    """A piece of a part; `position` is its place among all pieces of all sources."""

    position: int
    label: str
    index: int
    name: str
    stamp: str

    def file(self, folder: Path) -> PieceFile:
        return PieceFile(folder / PIECES, self.label, self.index, self.name, self.stamp)


class PartRecord(Record):
    """What a part's folder holds; written last, so that a folder with one is complete."""

    number: int
    of: int
    inputs: dict[str, Any]
    recipe: Recipe
    num_pieces: int
    """Of all parts together."""
    pieces_sha256: str
    """Of the names and sizes of all those."""
    pieces: tuple[PartPiece, ...]


def part_directory(directory: Path, part: Part) -> Path:
    """Where a part of the data of `directory` is made, unless another folder is asked for."""
    return parts_directory(directory) / f"{part.number}-of-{part.of}"


def parts_directory(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.parts")


def parse_part(text: str) -> Part:
    """`2/8` is the second of eight parts. UserError for anything else."""
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return Part(int(number), int(of))
    raise UserError(f"--shard: given {text!r}; it says which part of how many, from 1 on; write 1/8 for the first of 8")


def prepare_part(
    spec: Spec,
    folder: Path,
    part: Part,
    *,
    processes: int | None = None,
    skip_bad_lines: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> PartRecord:
    """Make the pieces of one part in `folder`; those that are there are reused. Raises as `prepare` does."""
    with workplace(folder, {**prepared_fields(spec), "part": [part.number, part.of]}):
        while (record := _try(spec, folder, part, processes or num_cores(), skip_bad_lines, on_progress)) is None:
            start_over(folder)
    return record


def _try(
    spec: Spec,
    folder: Path,
    part: Part,
    processes: int,
    skip_bad_lines: bool,
    on_progress: Callable[[Progress], None],
) -> PartRecord | None:
    """The part, made or completed; None where the text is no longer what an earlier attempt settled its recipe on."""
    on_progress(Progress())
    sources = open_sources(spec, skip_bad_lines=skip_bad_lines)
    pipeline = Pipeline(sources, folder / PIECES, part=part, on_progress=on_progress)
    with encoder(processes, much=is_much(size_of(sources))) as encode:
        try:
            recipe = settle_recipe(spec, sources, folder, skip_bad_lines=skip_bad_lines)
        except InputChangedError:
            return None
        files = list(pipeline.run(encode, recipe.encoding(spec, folder)))
    positions = range(part.number - 1, pipeline.num_pieces, part.of)
    record = PartRecord(
        number=part.number,
        of=part.of,
        inputs=prepared_fields(spec),
        recipe=recipe,
        num_pieces=pipeline.num_pieces,
        pieces_sha256=pipeline.pieces_sha256,
        pieces=tuple(
            PartPiece(position=position, label=file.label, index=file.index, name=file.name, stamp=file.stamp)
            for position, file in zip(positions, files, strict=True)
        ),
    )
    write_durably(folder / PART_FILE, record.model_dump_json(indent=1).encode())
    return record


def merge(
    spec: Spec,
    directory: Path | str,
    folders: Sequence[Path],
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Join the parts in `folders` into `directory`: the same bytes as one machine would have prepared.

    Raises UserError where a part is missing, unfinished or of another spec. The parts are left as they are.
    """
    target = Path(directory)
    if (target / MANIFEST_FILE).is_file():
        return reuse(spec, target)
    parts = {folder: _read_part(folder) for folder in folders}
    _check_parts(spec, target, parts)
    refuse_foreign_files(target)
    staging = target / STAGING
    checksums = sorted(file_sha256(folder / PART_FILE) for folder in folders)
    with workplace(staging, {**prepared_fields(spec), "parts": checksums}):
        while not (staging / MANIFEST_FILE).is_file():
            _join_parts(spec, staging, parts, on_progress)
        finish(staging)
    return read_manifest(target)


def _join_parts(
    spec: Spec, staging: Path, parts: Mapping[Path, PartRecord], on_progress: Callable[[Progress], None]
) -> None:
    """The manifest, and all that it names, in the staging folder; nothing where an earlier attempt joined others."""
    pieces = [(piece.position, piece.file(folder)) for folder, part in parts.items() for piece in part.pieces]
    files = [file for _, file in sorted(pieces, key=lambda piece: piece[0])]
    folder, part = next(iter(parts.items()))
    shutil.copytree(folder / TOKENIZER_DIRECTORY, staging / TOKENIZER_DIRECTORY, dirs_exist_ok=True)
    try:
        with Joiner(staging / SHARDS, part.recipe.routing(spec)) as joiner:
            check_joined(joiner, files)
            behind = files if spec.data.drop_duplicates else files[len(joiner.joined) :]
            assemble(spec, part.recipe, staging, _reported(behind, on_progress), joiner, keep=True)
    except InputChangedError:
        start_over(staging)


def _reported(files: Sequence[PieceFile], on_progress: Callable[[Progress], None]) -> Iterator[PieceFile]:
    """The pieces, each told of before it is joined."""
    sizes = [file.path.stat().st_size for file in files]
    done_bytes = 0
    for file, size_bytes in zip(files, sizes, strict=True):
        yield file
        done_bytes += size_bytes
        on_progress(Progress(done_bytes=done_bytes, total_bytes=sum(sizes)))


def _read_part(folder: Path) -> PartRecord:
    try:
        return PartRecord.model_validate_json((folder / PART_FILE).read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no finished part in it ({PART_FILE} is missing); give the dsllm data prepare --shard of that "
            f"part again: it goes on where it was interrupted"
        ) from error
    except ValidationError as error:
        raise UserError(f"{folder / PART_FILE}: unreadable; delete the folder and prepare the part again") from error


def _check_parts(spec: Spec, directory: Path, parts: dict[Path, PartRecord]) -> None:
    if not parts:
        raise UserError(
            f"{parts_directory(directory)}: no parts there; make them with dsllm data prepare --shard 1/8 and so on, "
            f"or name their folders"
        )
    first_folder, first = next(iter(parts.items()))
    inputs = prepared_fields(spec)
    for folder, part in parts.items():
        if changed := [name for name in inputs if inputs[name] != part.inputs.get(name)]:
            raise UserError(f"{folder}: prepared from a spec with other values of {', '.join(changed)}; set them back")
        same_pieces = (part.of, part.num_pieces, part.pieces_sha256) == (
            first.of,
            first.num_pieces,
            first.pieces_sha256,
        )
        if not (same_pieces and part.recipe.is_like(first.recipe)):
            raise UserError(
                f"{folder}: does not belong with {first_folder}; their number of parts, tokenizer or text differ; "
                f"prepare both from the same files with the same --shard …/N"
            )
    given = sorted(part.number for part in parts.values())
    if given != list(range(1, first.of + 1)):
        missing = [str(number) for number in range(1, first.of + 1) if number not in given]
        raise UserError(
            f"{first_folder.parent}: given parts {', '.join(map(str, given))} of {first.of}; each is needed once"
            + (f"; prepare {', '.join(missing)} too" if missing else "; name no part twice")
        )
