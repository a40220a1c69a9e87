"""What this package needs and what it cannot do, said when a trainer is made rather than found out while it runs.

The hooks are methods of `GRPOTrainer` that are not public API; setup.cfg pins the release they were read from.
"""

import inspect
from typing import Any

from packaging.version import Version
from transformers.utils import logging
from trl import GRPOConfig
from trl.distributed import DistributedBackend

logger = logging.get_logger(__name__)

TESTED_TRL = "1.16"
TESTED_VLLM = ("0.22", "0.31")

# Overridden or called methods of GRPOTrainer and the parameters that they are relied on to have, `self` first.
HOOKS: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ),
    "_tokenize_prompts": ("self", "prompts"),
    "_log_completion_extra": ("self", "column", "values"),
    "_log_metric": ("self", "name", "value"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_save_rng_state": ("self", "output_dir"),
}


class UnsupportedTRLError(RuntimeError):
    """The installed TRL changed a method that this package builds on."""


def check_hooks(trainer_class: type) -> None:
    """Raise `UnsupportedTRLError` where a hook of `trainer_class` (TRL's GRPOTrainer) is gone or has changed."""
    import trl

    for name, expected in HOOKS.items():
        method = getattr(trainer_class, name, None)
        if method is None:
            raise UnsupportedTRLError(
                f"TRL {trl.__version__} has no `{trainer_class.__name__}.{name}`, which trl_ibtpo builds on. "
                f"Install the tested release: pip install 'trl~={TESTED_TRL}.0'."
            )
        found = tuple(inspect.signature(method).parameters)
        if found != expected:
            raise UnsupportedTRLError(
                f"TRL {trl.__version__} changed `{trainer_class.__name__}.{name}` from ({', '.join(expected)}) to "
                f"({', '.join(found)}), which trl_ibtpo builds on. Install the tested release: "
                f"pip install 'trl~={TESTED_TRL}.0'."
            )


def check_vllm() -> None:
    """Raise `ImportError` where vLLM is missing, and warn where its version was not tested."""
    oldest, newest = TESTED_VLLM
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"`use_vllm=True` needs vLLM, which cannot be imported ({error}). Tested versions: {oldest} to {newest}. "
            "Install one with: pip install 'trl_ibtpo[vllm]'."
        ) from error
    version = Version(vllm.__version__)
    if not Version(oldest) <= Version(f"{version.major}.{version.minor}") <= Version(newest):
        logger.warning(f"vLLM {version} was not tested with trl_ibtpo; versions {oldest} to {newest} were.")


NO_IMAGES = (
    "Images are not supported in training: a tree branches text prefixes. Remove the 'image'/'images' columns, or "
    "train this model with TRL's GRPOTrainer."
)


def refuse_unsupported(args: GRPOConfig, train_dataset: Any, kwargs: dict[str, Any]) -> None:
    """Say before anything is loaded what cannot work, and what to do instead."""
    for name in ("tools", "environment_factory", "rollout_func"):
        if kwargs.get(name):
            raise ValueError(
                f"`{name}` is not supported: a tree branches inside a single completion. Leave it out, or train with "
                "TRL's GRPOTrainer."
            )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "`use_transformers_continuous_batching` is not supported: it cannot give each rollout its own token "
            "budget. Leave it off, or set `use_vllm=True`."
        )
    if args.use_vllm:
        check_vllm()
        if args.vllm_tensor_parallel_size > 1:
            raise ValueError(
                f"`vllm_tensor_parallel_size` is {args.vllm_tensor_parallel_size}, which is not supported: the "
                "processes of a group would have to grow the same trees in step. Use 1 (each GPU has its own engine), "
                "or `vllm_mode='server'` with a server that is itself tensor-parallel."
            )
        if args.vllm_structured_outputs_regex is not None or "structured_outputs" in (args.generation_kwargs or {}):
            raise ValueError(
                "Structured outputs (`vllm_structured_outputs_regex`) are not supported: a branch would match the "
                "pattern from its own start, not from that of the completion. Leave it out, or train with TRL's "
                "GRPOTrainer."
            )
    if train_dataset is None:
        raise ValueError("`train_dataset` is required; it must have a column 'prompt'.")
    columns = getattr(train_dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"`train_dataset` has no column 'prompt' (it has: {', '.join(map(str, columns)) or 'none'}). Rename the "
            "question's column, for example `dataset.rename_column('question', 'prompt')`."
        )
    if columns is not None and {"image", "images"} & set(columns):
        raise ValueError(NO_IMAGES)


def refuse_sharded_growth(backend: DistributedBackend, args: GRPOConfig) -> None:
    """Refuse sharding in which a forward pass waits for other processes, since each grows trees at its own pace."""
    if args.use_vllm:
        return
    if backend.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 cannot generate with transformers here: each process grows its own trees, and a forward pass of "
            "one would wait for the others. Set `fsdp_version: 2` in the accelerate config, or `use_vllm=True`."
        )
    if backend.is_zero3 and not args.ds3_gather_for_generation:
        raise ValueError(
            "`ds3_gather_for_generation` is False, which cannot generate with transformers under ZeRO-3 here: each "
            "process grows its own trees, and a forward pass of one would wait for the others. Set it to True (the "
            "weights are gathered while trees grow), or `use_vllm=True`."
        )
