"""A run in a process of its own, for what is killed from outside: test_interruptions.py and benchmarks.interruptions.

`start` forks it from a server that has imported everything, so that a start costs a second.
"""

import json
import multiprocessing
import os
import resource
from pathlib import Path

os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import tiny
from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.training import checkpoints

TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def arguments(output_dir: Path, **overrides) -> IBTPOConfig:
    """A checkpoint at every step, of which two are kept; a step and its checkpoint take about a tenth of a second."""
    return IBTPOConfig(
        **{
            **tiny.FAST,
            "output_dir": str(output_dir),
            "tree_initial_rollouts": 2,
            "tree_levels": 3,
            "max_completion_length": 16,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            **overrides,
        }
    )


def train(model_path: str, folder: str, file_limit: int | None = None, **overrides) -> None:
    """Train to the end, from the last whole checkpoint in `FOLDER/output` if there is one, and write the outcome.

    Args:
        model_path: of the tiny model.
        folder: for `output`, `log`, `started` (at the first score), and at the end `weights.pt` and `outcome.json`.
        file_limit: size in bytes beyond which no file can be written, as on a full disk.
        overrides: of the config.
    """
    output_dir = Path(folder, "output")
    with open(Path(folder, "log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

    def even_length(completions, **kwargs):
        Path(folder, "started").touch()
        return tiny.even_length(completions)

    trainer = IBTPOTrainer(model_path, even_length, arguments(output_dir, **overrides), tiny.questions(128))
    trainer.train(resume_from_checkpoint=checkpoints.last_whole(output_dir) is not None)
    torch.save(trainer.model.state_dict(), Path(folder, "weights.pt"))
    outcome = [{key: value for key, value in entry.items() if key not in TIMES} for entry in trainer.state.log_history]
    Path(folder, "outcome.json").write_text(json.dumps(outcome))


def start(model_path: str, folder: Path, **arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # where the server finds what it imports
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(["benchmarks.interrupted_run"])
    folder.mkdir(exist_ok=True)
    process = context.Process(target=train, args=(model_path, str(folder)), kwargs=arguments)
    process.start()
    return process


def outcome(folder: Path) -> tuple[list[dict], dict]:
    """The log without times, and the weights."""
    return json.loads((folder / "outcome.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


def steps_done(folder: Path) -> int:
    """The highest step that has a checkpoint folder, whole or not."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("output/checkpoint-*")), default=0)
