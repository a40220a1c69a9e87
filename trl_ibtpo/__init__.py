"""Tree-based policy optimisation for Hugging Face TRL: IB-TPO (arXiv 2605.28109) as a drop-in for GRPOTrainer."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["IBTPOConfig", "IBTPOTrainer"]

if TYPE_CHECKING:
    from .ibtpo_config import IBTPOConfig
    from .ibtpo_trainer import IBTPOTrainer


def __getattr__(name: str):
    # Lazy, so that the pure modules (trees, scores, advantages) can be used without loading torch and TRL.
    if name == "IBTPOConfig":
        from .ibtpo_config import IBTPOConfig

        return IBTPOConfig
    if name == "IBTPOTrainer":
        from .ibtpo_trainer import IBTPOTrainer

        return IBTPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
