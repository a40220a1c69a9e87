"""What two processes run for test_distributed.py, and one process for comparison: `torchrun distributed_run.py ...`.

Every process writes what it saw to `OUT/SCENARIO-RANK.json`, and the first one its weights to `OUT/SCENARIO.pt`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tiny
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
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
        "adam_epsilon": 1e-4,  # else Adam makes whole steps of what rounding leaves of gradients near zero
        **overrides,
    }


class RecordingTrainer(IBTPOTrainer):
    """Keeps what each tree of this process was."""

    def _set_step_advantages(self, output):
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
        super()._set_step_advantages(output)


class UnevenTrainer(IBTPOTrainer):
    """Keeps what this process makes of trees that differ in size."""

    def _set_step_advantages(self, output):
        advantages = output["advantages"].tolist()
        self.seen.append({"sizes": self._sizes, "rewards": self._scorer.rewards.tolist(), "advantages": advantages})
        super()._set_step_advantages(output)


class KilledTrainer(RecordingTrainer):
    """Its second process dies while the second checkpoint is written."""

    def _save_rng_state(self, output_dir):
        if RANK == 1 and self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def ibtpo(
    model_path: str,
    output_dir: str,
    reward,
    resume: bool = False,
    prepare=lambda: None,
    trainer_class=RecordingTrainer,
    **overrides,
) -> dict:
    args = IBTPOConfig(**arguments(output_dir, **SMALL_TREE, reproducible_rollouts=True, **overrides))
    prepare()
    trainer = trainer_class(model_path, reward, args, questions())
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    return result(trainer, trees=trainer.seen)


def result(trainer, **extra) -> dict:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # ZeRO-3 gathers it in the first alone
    weights = {name: value.clone() for name, value in state.items()}
    parameters = trainer.model_wrapped.parameters()
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights,
        "sleeps": len(sleeps),
        "sharded": sum(isinstance(each, DTensor) or hasattr(each, "ds_tensor") for each in parameters),
        "wrapper": type(trainer.model_wrapped).__name__,
        **extra,
    }


SAVING = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}


def resumed(model_path: str, output_dir: str, **options) -> dict:
    """Two steps, a checkpoint, and two more in another trainer."""
    first = ibtpo(model_path, output_dir, tiny.even_length, max_steps=2, **SAVING, **options)
    second = ibtpo(model_path, output_dir, tiny.even_length, resume=True, max_steps=4, **SAVING, **options)
    return {**second, "trees": first["trees"] + second["trees"]}


def refused(model_path: str, output_dir: str) -> dict:
    """What every process is told where only the first finds a checkpoint, and where only the first resumes."""
    args = IBTPOConfig(**arguments(output_dir if RANK == 0 else f"{output_dir}-elsewhere", **SMALL_TREE))
    trainer = RecordingTrainer(model_path, tiny.even_length, args, questions())
    told = []
    for resume in (True, RANK == 0):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except ValueError as error:
            told.append(str(error))
    return {"told": told, "weights": {}}


sleeps: list[float] = []


def slow_on_one_rank_uniform_on_the_other(completions, uniform, **kwargs) -> list[float]:
    if RANK == 1:
        time.sleep(0.2)
        sleeps.append(0.2)
    return [
        1.0 if all_equal else value for all_equal, value in zip(uniform, tiny.even_length(completions), strict=True)
    ]


def use_fsdp2(state_dict_type: str = "SHARDED_STATE_DICT") -> None:
    """accelerate shards on accelerators only; told that it has one, its FSDP2 code runs on CPU processes as well.

    To be called when the config is made, which forgets what accelerate was told before.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        state_dict_type=state_dict_type,
        cpu_ram_efficient_loading=False,
    )
    Accelerator(cpu=True)
    PartialState().distributed_type = AcceleratorState().distributed_type = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = plugin


def zero(model_path: str, output_dir: str, stage: int) -> dict:
    """DeepSpeed, set up by the variables that `accelerate launch` sets; not `use_cpu`, which would turn it off."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo instead of an extension compiled on the spot
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(stage == 3).lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = str(stage == 3).lower()
    return resumed(model_path, output_dir, use_cpu=False, ddp_backend="gloo")


def some_hopeless(completions, letter, **kwargs) -> list[float]:
    """Questions with an "a" or an "e" have no right answer."""
    even = tiny.even_length(completions)
    return [0.0 if vowel in "ae" else value for vowel, value in zip(letter, even, strict=True)]


UNEVEN = {
    "adaptive_budget": 1,
    "scale_rewards": "batch",
    "per_device_train_batch_size": 3 * LEAVES,
    "max_steps": 2,
}
KILLED = {"reward": tiny.even_length, "max_steps": 4, "prepare": use_fsdp2, **SAVING}


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
        "uneven": lambda: ibtpo(model_path, output_dir, some_hopeless, trainer_class=UnevenTrainer, **UNEVEN),
        "refused": lambda: refused(model_path, output_dir),  # after `resumed`, whose checkpoints the first one finds
        "straight": lambda: ibtpo(model_path, output_dir, tiny.even_length, max_steps=4, lr_scheduler_type="constant"),
        **{f"grpo_{name}": lambda name=name: grpo(model_path, output_dir, name) for name in LOSS_TYPES},
        "fsdp2_sharded": lambda: resumed(model_path, f"{output_dir}-sharded", prepare=use_fsdp2),
        "fsdp2_full": lambda: resumed(model_path, f"{output_dir}-full", prepare=lambda: use_fsdp2("FULL_STATE_DICT")),
        "killed": lambda: ibtpo(model_path, f"{output_dir}-killed", **KILLED, trainer_class=KilledTrainer),
        "continued": lambda: ibtpo(model_path, f"{output_dir}-killed", **KILLED, resume=True),
        "zero2": lambda: zero(model_path, f"{output_dir}-zero2", 2),
        "zero3": lambda: zero(model_path, f"{output_dir}-zero3", 3),
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
