"""The methods of TRL's trainer that this package builds on.

They are not public API; setup.cfg pins the release they were read from.
"""

import inspect

TESTED_TRL = "1.16"

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
    "_generate": ("self", "prompts"),
    "_tool_call_loop": (
        "self",
        "prompts",
        "prompt_ids",
        "completion_ids",
        "completions",
        "logprobs",
        "images",
        "multimodal_fields",
    ),
    "_get_tool_suffix_ids": ("self", "tool_messages"),
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
    "_compute_loss": ("self", "model", "inputs"),
    "get_high_entropy_mask": ("self", "entropies", "mask", "threshold"),
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
