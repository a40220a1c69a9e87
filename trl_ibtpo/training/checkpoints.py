"""Checkpoints that are known to be whole.

transformers writes a checkpoint in place, file by file, and resumes from the folder of the highest number. A process
that is killed in between leaves a folder that stops the next start, or worse: without its `optimizer.pt`, training
goes on with a fresh optimizer and no word about it. A manifest with the size of every file, written after them, tells
whole checkpoints from others.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "checkpoint_manifest.json"
STRATEGY = "branching_state.json"  # what the branching strategy has learned, where it learns
_INCOMPLETE = "checkpoint-is-incomplete.txt"  # transformers', while it saves
_NOT_LISTED = (MANIFEST, f"{MANIFEST}.tmp", TRAINER_STATE_NAME, _INCOMPLETE)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def begin(folder: Path) -> None:
    """Before anything is written to `folder`: what an earlier run left there is no part of this checkpoint."""
    for name in (MANIFEST, TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)  # first: from now on it is not whole
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _INCOMPLETE:
            path.unlink()


def write_manifest(folder: Path) -> None:
    """When all files but the trainer's state, which is the last, are written."""
    files = {name: size for name, size in _sizes(folder).items() if name not in _NOT_LISTED}
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"files": files}, indent=1))
    os.replace(temporary, folder / MANIFEST)


def defect(folder: Path) -> str | None:
    """What keeps a checkpoint from being whole, `None` where it is."""
    if not folder.is_dir():
        return "there is no such folder"
    if _read(folder / TRAINER_STATE_NAME) is None:
        return f"its {TRAINER_STATE_NAME}, which is written last, is missing or incomplete"
    manifest = _read(folder / MANIFEST)
    if manifest is None:
        return f"it has no {MANIFEST}: another trainer or `save_only_model` wrote it, or it was not written to the end"
    if not isinstance(manifest.get("files"), dict):
        return f"its {MANIFEST} lists no files"
    found = _sizes(folder)
    for name, size in manifest["files"].items():
        if name not in found:
            return f"its {name} is missing"
        if found[name] != size:
            return f"its {name} has {found[name]} of {size} bytes"
    return None


def last_whole(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step; warns of each one with a higher step that is left out."""
    for folder in _checkpoints(output_dir):
        problem = defect(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder} is not resumed from: {problem}.")
    return None


def to_resume_from(choice: str | Path | bool, output_dir: str) -> str:
    """The folder that `resume_from_checkpoint` stands for: a path, or `True` for the last whole checkpoint.

    Raises `ValueError` where there is none, and where the one that was named is known not to be whole.
    """
    if choice is not True:
        _check_named(Path(choice))
        return str(choice)
    folder = last_whole(output_dir)
    if folder is None:
        broken = [path.name for path in _checkpoints(output_dir)]
        raise ValueError(
            f"`resume_from_checkpoint` is True, but `output_dir` ({output_dir}) holds no whole checkpoint"
            + (f" (not whole: {', '.join(broken)})" if broken else "")
            + ". Leave it out to start anew, or give the path of a checkpoint."
        )
    return str(folder)


def agreed(found: list[str | Exception | None]) -> str | None:
    """The checkpoint that all processes resume from, `None` where all start anew.

    Args:
        found: by process, its folder, `None` where it starts anew, or why it has no folder.

    Raises:
        ValueError: alike in every process, where one of them has no folder or they differ.
    """
    if all(each == found[0] for each in found) and not isinstance(found[0], Exception):
        return found[0]
    if any(isinstance(each, Exception) for each in found):
        rank, error = next((rank, each) for rank, each in enumerate(found) if isinstance(each, Exception))
        where = "" if len(found) == 1 else f"Process {rank} of {len(found)} cannot resume, so none does. "
        raise ValueError(f"{where}{error}") from error
    names = ", ".join(f"process {rank}: {each or 'none, it starts anew'}" for rank, each in enumerate(found))
    raise ValueError(
        f"Processes found different checkpoints to resume from in `output_dir` ({names}). Give the path of one that "
        "every machine has as `resume_from_checkpoint`, or put `output_dir` on a disk that they share."
    )


def describe_failure(folder: Path, error: Exception) -> str:
    """What happened to a checkpoint that could not be written, and what is left to continue from."""
    left = last_whole(folder.parent)
    there = next(each for each in folder.parents if each.exists())  # what failed may be making the folder
    free = shutil.disk_usage(there).free / 2**30
    return f"Saving {folder} failed with {type(error).__name__}: {error} ({free:.1f} GiB are free on its disk). " + (
        f"`resume_from_checkpoint=True` continues from {left.name}." if left else "There is no earlier checkpoint."
    )


def _check_named(folder: Path) -> None:
    problem = defect(folder)
    if problem is None:
        return
    if _read(folder / TRAINER_STATE_NAME) is not None and _read(folder / MANIFEST) is None:
        # A checkpoint of another trainer has no manifest; the user has said that this one is meant.
        logger.warning(f"Resuming from {folder}, although {problem}. Whether it is whole cannot be checked.")
        return
    others = last_whole(folder.parent) if folder.parent.is_dir() else None
    raise ValueError(
        f"`resume_from_checkpoint` is {str(folder)!r}, which cannot be resumed from: {problem}. "
        + (f"The last whole checkpoint beside it is {others}." if others else "There is no whole one beside it.")
    )


def _read(path: Path) -> dict | None:
    """A JSON object, `None` where the file does not hold a whole one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, the highest step first."""
    output_dir = Path(output_dir)
    numbered = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match.group(1)), path))
    return [path for _, path in sorted(numbered, reverse=True)]


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file under `folder`, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


class WholeCheckpoints:
    """For a transformers `Trainer`: checkpoints get a manifest, and training resumes from whole ones."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        self.accelerator.wait_for_everyone()  # the main process may still be writing that of a run just ended
        typed = str(resume_from_checkpoint).lower()  # a command line has only texts
        choice = {"true": True, "false": None}.get(typed, resume_from_checkpoint) or None
        try:
            found = None if choice is None else to_resume_from(choice, self.args.output_dir)
        except (OSError, ValueError) as error:
            found = error  # raised by every process below: one that left now would keep the others waiting
        folder = agreed(gather_object([found]))
        if folder is not None:
            self._load_strategy(Path(folder))
        return super().train(folder, *args, **kwargs)

    def _load_strategy(self, folder: Path) -> None:
        strategy = getattr(self, "_strategy", None)
        if not hasattr(strategy, "load_state_dict"):
            return
        state = _read(folder / STRATEGY)
        if state is None:
            logger.warning(f"{folder} has no {STRATEGY}: the branching strategy starts with nothing learned.")
        else:
            strategy.load_state_dict(state)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            begin(folder)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            raise CheckpointError(describe_failure(folder, error)) from error
        if self.args.should_save and (folder / MANIFEST).is_file():
            write_manifest(folder)  # once more, with what TRL adds after transformers

    def _save_rng_state(self, output_dir):
        # The last file of every process; the main one goes on to write the trainer's state and to rotate
        super()._save_rng_state(output_dir)
        if self.args.should_save and hasattr(getattr(self, "_strategy", None), "state_dict"):
            Path(output_dir, STRATEGY).write_text(json.dumps(self._strategy.state_dict()))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(output_dir))
