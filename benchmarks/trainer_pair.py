"""TRL's trainer and this package's on one vLLM engine, for benchmarks of whole optimizer steps."""

import copy
import tempfile
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.engines.vllm_cpu import runs_on_cpu

TREE = {name: getattr(IBTPOConfig, name) for name in ("branching", "tree_levels", "tree_initial_rollouts")}
FLAT = {"branching": "independent", "tree_levels": 1, "tree_initial_rollouts": 8}


def make_trainers(
    model: str, reward: Any, dataset: Any, questions: int, tools: list | None = None, **arguments: Any
) -> tuple[GRPOTrainer, IBTPOTrainer]:
    """A trainer of either kind; both generate with the engine that the second has started.

    Args:
        model, reward, dataset, tools: of both trainers.
        questions: per optimizer step, one in a micro-batch.
        arguments: of both configurations, beside those that all of these benchmarks share.
    """
    arguments = {
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": questions,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "loss_type": "grpo",
        "vllm_mode": "colocate",
        "vllm_importance_sampling_mode": "token_truncate",
        "bf16": not runs_on_cpu(),
        "gradient_checkpointing": False,
        "use_cpu": runs_on_cpu(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    } | arguments
    args = IBTPOConfig(tempfile.mkdtemp(), **arguments, use_vllm=True)
    ibtpo = IBTPOTrainer(model, reward, args, dataset, tools=tools)
    args = GRPOConfig(tempfile.mkdtemp(), **arguments, num_generations=12)
    grpo = GRPOTrainer(model, reward, args, dataset, tools=tools)
    # A second engine would take its share of the memory, and half a minute to start.
    grpo.use_vllm, grpo.vllm_generation = True, copy.copy(ibtpo.vllm_generation)
    grpo.vllm_generation.model, grpo.vllm_generation.accelerator = grpo.model, grpo.accelerator
    return grpo, ibtpo


def start_over(trainer: GRPOTrainer, group_size: int, seed: int) -> None:
    """Make ready for a run with groups of another size: with a seed of its own, and weights that vLLM has not seen."""
    args, trainer._last_loaded_step = trainer.args, -1
    args.seed = seed
    trainer.num_generations = args.num_generations = args.per_device_train_batch_size = group_size
    args.generation_batch_size = args.gradient_accumulation_steps * group_size
    trainer._train_batch_size = group_size
