"""Which checkpoint a start goes on from, and whether it belongs to the run; with real folders, without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsllm.checkpoint import layout
from dsllm.checkpoint.catalogue import newest_first
from dsllm.checkpoint.layout import complete_folders, step_folder, step_folders, write_latest
from dsllm.checkpoint.manifest import Manifest, write_manifest
from dsllm.checkpoint.resume import candidates, check_same_data, check_same_run
from dsllm.checkpoint.retention import remove_old
from dsllm.errors import CheckpointError, UserError
from dsllm.spec.load import dump_spec, load_spec


def complete(checkpoints: Path, *steps: int, follows: str | None = None) -> None:
    """Checkpoints without files of two ranks."""
    for step in steps:
        folder = step_folder(checkpoints, step)
        folder.mkdir(parents=True)
        manifest = Manifest(step=step, precision="fp32", zero_stage=2, world_size=2, files={}, follows=follows)
        write_manifest(folder, manifest)


def first(resume: str, checkpoints: Path) -> Path | None:
    return next(iter(candidates(resume, checkpoints)), None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of preset quickstart with checkpoints after 2 and 10 steps of two ranks."""
    complete(tmp_path / "checkpoints", 10, 2)
    write_latest(tmp_path / "checkpoints", step_folder(tmp_path / "checkpoints", 10))
    (tmp_path / "spec.yaml").write_text(dump_spec(load_spec("quickstart")))
    return tmp_path


def test_auto_takes_the_latest_and_starts_afresh_where_there_is_none(run: Path, tmp_path: Path) -> None:
    assert first("auto", run / "checkpoints") == run / "checkpoints" / "global_step10"
    assert first("auto", tmp_path / "nothing") is None


def test_a_path_may_be_a_run_its_checkpoints_or_one_of_them(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert first(str(run), Path("elsewhere")) == checkpoints / "global_step10"
    assert first(str(checkpoints), Path("elsewhere")) == checkpoints / "global_step10"
    assert first(str(checkpoints / "global_step2"), Path("elsewhere")) == checkpoints / "global_step2"


def test_never_starts_afresh_only_in_a_folder_without_checkpoints(run: Path, tmp_path: Path) -> None:
    assert first("never", tmp_path / "nothing") is None
    with pytest.raises(UserError, match=r"--resume never: .* holds global_step10 of an earlier run"):
        first("never", run / "checkpoints")


def test_latest_missing_beside_checkpoints_is_no_fresh_start(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "latest").unlink()
    assert first("auto", run / "checkpoints") == run / "checkpoints" / "global_step10"
    assert "there is no file named latest; going on from the newest, global_step10" in caplog.text


def test_latest_naming_a_folder_that_is_gone_falls_back_and_says_so(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints" / "latest").write_text("global_step99")
    assert first("auto", run / "checkpoints") == run / "checkpoints" / "global_step10"
    assert "names global_step99, which is not there or not complete; going back to global_step10" in caplog.text


def test_a_save_that_was_killed_before_latest_moved_still_counts(run: Path) -> None:
    checkpoints = run / "checkpoints"
    complete(checkpoints, 20)  # of a run that this one was turned back from
    complete(checkpoints, 15, follows="global_step10")
    assert [folder.name for folder in newest_first(checkpoints)] == [f"global_step{step}" for step in (15, 10, 2, 20)]


def test_latest_where_nothing_is_complete_is_no_fresh_start(run: Path) -> None:
    for folder in complete_folders(run / "checkpoints"):
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="latest names global_step10, and no checkpoint there is complete; bring"):
        candidates("auto", run / "checkpoints")
    with pytest.raises(UserError, match=r"--resume never: .* holds global_step10 of an earlier run"):
        candidates("never", run / "checkpoints")


def test_a_checkpoint_that_is_removed_is_not_complete_from_the_first_moment_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout.shutil, "rmtree", lambda *arguments, **options: None)  # as when killed there
    layout.remove(run / "checkpoints" / "global_step2")
    assert [folder.name for folder in complete_folders(run / "checkpoints")] == ["global_step10"]


def test_after_the_latest_older_ones_are_tried_and_those_of_an_abandoned_run_last(run: Path) -> None:
    checkpoints = run / "checkpoints"
    complete(checkpoints, 5, 20, 30)
    assert [folder.name for folder in newest_first(checkpoints)] == [
        f"global_step{step}" for step in (10, 5, 2, 20, 30)
    ]


def test_checkpoints_are_ordered_by_step_not_by_name(run: Path) -> None:
    assert [folder.name for folder in complete_folders(run / "checkpoints")] == ["global_step2", "global_step10"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=7", r"differs in seed \(was 1337, now 7\): that makes it another run"),
        ("model.num_layers=5", r"differs in model.num_layers \(was 4, now 5\)"),
        ("batch.global_batch_size=32", "batch.global_batch_size"),
        ("data.sources=[{kind: text, path: x}]", "data.sources.0.kind"),
        ("data.validation_sources=[{kind: text, path: x}]", "data.validation_sources.0.kind"),
        ("data.packing=best_fit", r"data.packing \(was concatenate, now best_fit\)"),
        ("data.mask_documents=true", r"data.mask_documents \(was False, now True\)"),
        ("data.drop_duplicates=true", "data.drop_duplicates"),
        ("data.min_document_characters=100", "data.min_document_characters"),
    ],
)
def test_what_makes_another_run_is_refused_with_both_values(run: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same_run(load_spec("quickstart", [override]), run / "checkpoints" / "global_step10")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=1e-3",
        "optimizer.weight_decay=0.2",
        "batch.micro_batch_size=4",
        "training.train_steps=9999",
        "training.precision=bf16",
        "zero.stage=3",
        "launch.environment=[AWS_KEY]",
    ],
)
def test_other_changes_are_told_and_accepted(run: Path, override: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dsllm"):
        check_same_run(load_spec("quickstart", [override]), run / "checkpoints" / "global_step10")
    assert f"changed since the checkpoint: {override.split('=')[0]}" in caplog.text


def test_a_save_that_was_killed_is_no_checkpoint(run: Path) -> None:
    step_folder(run / "checkpoints", 20).mkdir()
    assert first("auto", run / "checkpoints") == run / "checkpoints" / "global_step10"
    with pytest.raises(UserError, match="global_step20: no checkpoint there"):
        first(str(run / "checkpoints" / "global_step20"), Path("elsewhere"))


def test_old_checkpoints_go_and_unfinished_ones_never_take_their_place(run: Path) -> None:
    checkpoints = run / "checkpoints"
    step_folder(checkpoints, 11).mkdir()  # a save that was killed
    complete(checkpoints, 12, 30)  # 30 is of a run that this one was turned back from
    remove_old(checkpoints, step_folder(checkpoints, 12), keep_last=2, keep_every=None)
    assert [folder.name for folder in step_folders(checkpoints)] == ["global_step10", "global_step12", "global_step30"]


def test_those_at_multiples_of_keep_every_stay(run: Path) -> None:
    checkpoints = run / "checkpoints"
    complete(checkpoints, 12, 14, 15)
    remove_old(checkpoints, step_folder(checkpoints, 15), keep_last=1, keep_every=5)
    assert [folder.name for folder in step_folders(checkpoints)] == ["global_step10", "global_step15"]


def test_other_tokens_than_the_run_has_seen_are_refused_with_both_hashes(run: Path) -> None:
    checkpoint = run / "checkpoints" / "global_step10"
    passport = {"tokenizer_hash": "a" * 64, "data_hash": "b" * 64}
    (run / "passport.json").write_text(json.dumps(passport))
    check_same_data(checkpoint, passport)
    with pytest.raises(UserError, match=r"the prepared tokens changed since \(was bbbbbbbbbbbb…, now cccccccccccc…\)"):
        check_same_data(checkpoint, passport | {"data_hash": "c" * 64})
