"""What two processes run for test_distributed.py, and one process for comparison: `torchrun distributed_run.py ...`.

Every process writes what it saw to `OUT/SCENARIO-RANK.json`, and the first one its weights to `OUT/SCENARIO.pt`.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tiny
import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_ibtpo import IBTPOConfig, IBTPOTrainer

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TREES = 2  # per generation batch, over all processes
SMALL_TREE = {"tree_initial_rollouts": 2, "tree_levels": 3}  # four trajectories
LEAVES = 4
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def questions() -> Dataset:
    """Rows in the order of training: of two processes the first has the even rows, the other the odd ones."""
    return tiny.questions(40).add_column("uniform", [row % 2 == 0 for row in range(40)])


def arguments(output_dir: str, **overrides) -> dict:
    return {
        **tiny.FAST,
        "output_dir": output_dir,
        "max_completion_length": 16,
        "per_device_train_batch_size": TREES // PROCESSES * LEAVES,
        "shuffle_dataset": False,
        **overrides,
    }


class RecordingTrainer(IBTPOTrainer):
    """Keeps what each tree of this process was."""

    def _step_advantages(self, advantages, completion_ids):
        self.seen.append(
            [
                {
                    "tokens": [grower.tree.trajectory(leaf)[0] for leaf in range(LEAVES)],
                    "success": grower.tree.success,
                    "generated": grower.tree.generated_tokens,
                }
                for grower in self._grown
            ]
        )
        return super()._step_advantages(advantages, completion_ids)


def ibtpo(model_path: str, output_dir: str, reward, resume: bool = False, **overrides) -> dict:
    args = IBTPOConfig(**arguments(output_dir, **SMALL_TREE, reproducible_rollouts=True, **overrides))
    trainer = RecordingTrainer(model_path, reward, args, questions())
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    return result(trainer, trees=trainer.seen)


def result(trainer, **extra) -> dict:
    weights = {name: value.clone() for name, value in trainer.accelerator.get_state_dict(trainer.model).items()}
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights,
        "sleeps": len(sleeps),
        **extra,
    }


def resumed(model_path: str, output_dir: str) -> dict:
    """Two steps, a checkpoint, and two more in another trainer."""
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    ibtpo(model_path, output_dir, tiny.even_length, max_steps=2, **options)
    return ibtpo(model_path, output_dir, tiny.even_length, resume=True, max_steps=4, **options)


sleeps: list[float] = []


def slow_on_one_rank_uniform_on_the_other(completions, uniform, **kwargs) -> list[float]:
    if RANK == 1:
        time.sleep(0.2)
        sleeps.append(0.2)
    return [
        1.0 if all_equal else value for all_equal, value in zip(uniform, tiny.even_length(completions), strict=True)
    ]


def fsdp2(model_path: str, output_dir: str) -> dict:
    """accelerate shards on accelerators only; told that it has one, its FSDP2 code runs on CPU processes as well."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    PartialState().distributed_type = AcceleratorState().distributed_type = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = plugin
    return ibtpo(model_path, output_dir, tiny.even_length, max_steps=20)


class FixedGRPOTrainer(GRPOTrainer):
    """TRL's trainer on completions that depend on the prompt and their place in the group alone."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        completions = []
        for row, ids in enumerate(prompt_ids):
            rng = np.random.default_rng([self.state.global_step, row % LEAVES, *ids])
            completions.append(rng.integers(5, 300, size=rng.integers(2, 16)).tolist())
        return completions, None


def grpo(model_path: str, output_dir: str, loss_type: str) -> dict:
    """The control: what TRL itself makes of one and of two processes."""
    shared = arguments(output_dir, loss_type=loss_type, max_steps=2, num_generations=LEAVES)
    del shared["step_delimiter"]  # ours
    args = GRPOConfig(**shared)
    trainer = FixedGRPOTrainer(model_path, tiny.even_length, args, questions())
    trainer.train()
    return result(trainer)


def scenarios(model_path: str, out: Path) -> dict:
    output_dir = str(out / "output")
    return {
        "twenty": lambda: ibtpo(model_path, output_dir, tiny.even_length, max_steps=20),
        "token_mean": lambda: ibtpo(model_path, output_dir, tiny.even_length, max_steps=5, loss_type="dapo"),
        "slow": lambda: ibtpo(model_path, output_dir, slow_on_one_rank_uniform_on_the_other, max_steps=3),
        "resumed": lambda: resumed(model_path, output_dir),
        "straight": lambda: ibtpo(model_path, output_dir, tiny.even_length, max_steps=4, lr_scheduler_type="constant"),
        **{f"grpo_{name}": lambda name=name: grpo(model_path, output_dir, name) for name in LOSS_TYPES},
        "fsdp2": lambda: fsdp2(model_path, output_dir),  # the last: it changes what the processes are
    }


def main(model_path: str, out: str, *names: str) -> None:
    torch.set_num_threads(1)
    # accelerate numbers the device of a CPU process, `cpu:0`, and transformers loads the optimizer's state to it, a
    # place that `torch.load` does not know. GPUs are numbered in both.
    torch.serialization.register_package(
        100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )
    for name in names:
        outcome = scenarios(model_path, Path(out))[name]()
        weights = outcome.pop("weights")
        Path(out, f"{name}-{RANK}.json").write_text(json.dumps(outcome))
        if RANK == 0:
            torch.save(weights, Path(out, f"{name}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
