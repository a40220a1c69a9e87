"""Runs that are killed, stopped or out of disk: what was saved before is usable, what is half-written is not used."""

import json
import logging
import shutil
import time

import pytest
import tiny
import torch
from transformers.utils import logging as transformers_logging

from benchmarks import interrupted_run
from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import checkpoints

CONSTANT = {"lr_scheduler_type": "constant"}  # so that a run may be continued with more steps than it was planned with
FILES = {
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "tokenizer.json",
    "trainer_state.json",
    "training_args.bin",
    checkpoints.MANIFEST,
}


@pytest.fixture(scope="module")
def saved(model_path, tmp_path_factory):
    """An output folder with checkpoint-1 and checkpoint-2."""
    output_dir = tmp_path_factory.mktemp("saved")
    args = interrupted_run.arguments(output_dir, max_steps=2, **CONSTANT)
    IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions()).train()
    return output_dir


@pytest.fixture
def warnings(caplog):
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield caplog
    transformers_logging.disable_propagation()


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [remove, truncate], ids=["removed", "truncated"])
def test_half_written_checkpoint_is_never_resumed_from_silently(saved, tmp_path, warnings, damage):
    names = {path.name for path in (saved / "checkpoint-2").iterdir()}
    assert names >= FILES
    assert checkpoints.to_resume_from(True, str(saved)) == str(saved / "checkpoint-2")
    assert checkpoints.to_resume_from(str(saved / "checkpoint-2"), "elsewhere") == str(saved / "checkpoint-2")
    assert not warnings.messages
    for name in sorted(names):
        output_dir = tmp_path / name
        shutil.copytree(saved, output_dir)
        damage(output_dir / "checkpoint-2" / name)
        warnings.clear()
        assert checkpoints.to_resume_from(True, str(output_dir)) == str(output_dir / "checkpoint-1"), name
        (message,) = warnings.messages
        assert str(output_dir / "checkpoint-2") in message and f" {name}" in message
        named = str(output_dir / "checkpoint-2")
        warnings.clear()
        if name == checkpoints.MANIFEST:  # that of another trainer has none either, so the user decides
            assert checkpoints.to_resume_from(named, "elsewhere") == named
            assert "Whether it is whole cannot be checked" in warnings.text
        else:
            with pytest.raises(ValueError, match=rf"cannot be resumed from: its {name}.*checkpoint-1") as error:
                checkpoints.to_resume_from(named, "elsewhere")
            assert named in str(error.value)


def test_trainer_resumes_from_the_last_whole_checkpoint(saved, model_path, tmp_path):
    """transformers itself takes checkpoint-2 and goes on with a fresh optimizer."""
    output_dir = tmp_path / "output"
    shutil.copytree(saved, output_dir)
    remove(output_dir / "checkpoint-2" / "optimizer.pt")
    args = interrupted_run.arguments(output_dir, max_steps=2, **CONSTANT)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    trainer.train(resume_from_checkpoint=True)
    expected = json.loads((saved / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == [entry["loss"] for entry in expected]
    assert checkpoints.defect(output_dir / "checkpoint-2") is None  # written again


def test_nothing_to_resume_from(saved, tmp_path):
    with pytest.raises(ValueError, match=r"holds no whole checkpoint\. Leave it out to start anew"):
        checkpoints.to_resume_from(True, str(tmp_path / "absent"))
    shutil.copytree(saved, tmp_path / "output")
    for step in (1, 2):
        remove(tmp_path / "output" / f"checkpoint-{step}" / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no whole checkpoint \(not whole: checkpoint-2, checkpoint-1\)"):
        checkpoints.to_resume_from(True, str(tmp_path / "output"))
    with pytest.raises(ValueError, match="There is no whole one beside it"):
        checkpoints.to_resume_from(str(tmp_path / "output" / "checkpoint-2"), "elsewhere")
    with pytest.raises(ValueError, match="cannot be resumed from: there is no such folder"):
        checkpoints.to_resume_from(str(tmp_path / "absent" / "checkpoint-7"), "elsewhere")


def test_nothing_of_an_earlier_run_is_left_in_a_checkpoint(model_path, tmp_path):
    """One that was killed while it wrote its manifest, and left a state that TRL writes after transformers' files."""
    folder = tmp_path / "checkpoint-1"
    (folder / "global_step1").mkdir(parents=True)
    for name in (f"{checkpoints.MANIFEST}.tmp", "entropy_ctrl_state.json", "global_step1/rank_0.pt"):
        (folder / name).write_text("old")
    args = interrupted_run.arguments(tmp_path, max_steps=1, use_adaptive_entropy=True, **CONSTANT)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    trainer.train(resume_from_checkpoint="False")  # as a command line gives it
    assert checkpoints.defect(folder) is None
    listed = set(json.loads((folder / checkpoints.MANIFEST).read_text())["files"])
    assert "entropy_ctrl_state.json" in listed and not (folder / "global_step1").exists()
    assert listed | {checkpoints.MANIFEST, "trainer_state.json"} == {path.name for path in folder.iterdir()}
    (folder / checkpoints.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint="True")


# ----- real processes and real signals -------------------------------------------------------------------------------


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.exitcode is None and time.monotonic() < deadline, "the run ended before its interruption"
        time.sleep(0.001)


def finish(model_path, folder, **arguments):
    process = interrupted_run.start(model_path, folder, **arguments)
    process.join(timeout=100)
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
    return interrupted_run.outcome(folder)


@pytest.fixture(scope="module")
def reference(model_path, tmp_path_factory):
    """Ten steps in a process of their own, not interrupted."""
    return finish(model_path, tmp_path_factory.mktemp("reference"), max_steps=10, **CONSTANT)


def assert_equal(outcome, reference) -> None:
    assert outcome[0] == reference[0] and len(reference[0]) == 11
    for name, value in reference[1].items():
        assert torch.equal(outcome[1][name], value), name


def test_killed_twice_and_resumed(model_path, tmp_path, reference):
    """Once while a checkpoint is written, once when the one before it has just been deleted."""
    folder, options = tmp_path / "run", {"max_steps": 10, "save_total_limit": 1, **CONSTANT}
    output_dir = folder / "output"
    for first, condition in (
        (1, lambda: (output_dir / "checkpoint-2").exists()),
        (4, lambda: (output_dir / "checkpoint-4").exists() and not (output_dir / "checkpoint-3").exists()),
    ):
        process = interrupted_run.start(model_path, folder, **options)
        wait_until(condition, process)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert int(checkpoints.last_whole(output_dir).name.split("-")[1]) >= first
    assert_equal(finish(model_path, folder, **options), reference)


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["model", "optimizer"])
def test_full_disk_leaves_earlier_checkpoints_usable(model_path, tmp_path, reference, share):
    """A limit on the size of files stands in for the disk: writing beyond it is an OSError just the same."""
    folder = tmp_path / "run"
    finish(model_path, folder, max_steps=2, **CONSTANT)
    size = (folder / "output" / "checkpoint-2" / "model.safetensors").stat().st_size
    process = interrupted_run.start(model_path, folder, max_steps=10, file_limit=int(share * size), **CONSTANT)
    process.join(timeout=100)
    assert process.exitcode == 1
    last_line = (folder / "log").read_text().strip().splitlines()[-1]
    assert "CheckpointError: Saving " in last_line and "checkpoint-3 failed with " in last_line
    assert "GiB are free" in last_line and "`resume_from_checkpoint=True` continues from checkpoint-2." in last_line
    assert_equal(finish(model_path, folder, max_steps=10, **CONSTANT), reference)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    said = checkpoints.describe_failure(tmp_path / "no" / "checkpoint-1", PermissionError("not allowed"))
    assert "failed with PermissionError: not allowed" in said and "GiB are free" in said
    assert said.endswith("There is no earlier checkpoint.")


def test_sigterm_ends_a_run_as_in_transformers(model_path, tmp_path, reference):
    """Nothing is saved unless `enable_jit_checkpoint` is on; what was saved is usable."""
    folder = tmp_path / "run"
    process = interrupted_run.start(model_path, folder, max_steps=10, **CONSTANT)
    wait_until(lambda: (folder / "output" / "checkpoint-2" / "trainer_state.json").exists(), process)
    process.terminate()
    process.join()
    assert process.exitcode == -15
    assert_equal(finish(model_path, folder, max_steps=10, **CONSTANT), reference)


def test_sigterm_saves_with_jit_checkpoint(model_path, tmp_path):
    """transformers saves about three seconds later and ends the run; resumed, it equals one that was not stopped."""
    folder = tmp_path / "run"
    options = {"enable_jit_checkpoint": True, "reproducible_rollouts": True, "save_steps": 1000, **CONSTANT}
    process = interrupted_run.start(model_path, folder, max_steps=100_000, **options)
    wait_until((folder / "started").exists, process)
    process.terminate()
    process.join(timeout=100)
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
    stopped_at = interrupted_run.outcome(folder)[0][-1]["step"]
    saved_at = interrupted_run.steps_done(folder)
    assert 0 < stopped_at - 1 <= saved_at <= stopped_at < 100_000
    assert checkpoints.defect(folder / "output" / f"checkpoint-{saved_at}") is None
    resumed, whole = (
        finish(model_path, path, max_steps=stopped_at + 2, **options) for path in (folder, tmp_path / "whole")
    )
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log, _ in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == stopped_at + 2
    for name, value in whole[1].items():
        assert torch.allclose(resumed[1][name], value, atol=1e-4), name
