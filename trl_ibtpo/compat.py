"""What this package depends on in TRL, checked when a trainer is made, so that a moved hook is named and not guessed.

The hooks are methods of `GRPOTrainer` that are not public API; setup.cfg pins the release they were read from.
"""

import inspect

from packaging.version import Version
from transformers.utils import logging

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
    "_tokenize_prompts": ("self", "prompts"),
    "_log_completion_extra": ("self", "column", "values"),
    "_log_metric": ("self", "name", "value"),
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
