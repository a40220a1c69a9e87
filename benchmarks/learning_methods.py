"""The methods that `benchmarks.learning` compares, where they differ from what all share, and how long tasks train."""

from dataclasses import dataclass, field
from typing import Any

# Shapes of trees: B0, L, K, B.
PAPER = (4, 9, 1, 1)
# Each step is forked once and the choice looks at no reward, so that `sampled` has the gradient of the policy.
CONFIDENCE = {"branching": "confidence", "allow_repeated_branching": False, "ib_coef": 0.0}
RANDOM = {"branching": "random", "allow_repeated_branching": False, "ib_coef": 0.0}
INDEPENDENT = {"branching": "independent", "advantage": "grpo"}
IBRO = {"ib_regularization_coef": 0.005}
# I2B-LPO in parts that are added one after another: forks, latents, the filter; with IBRO it is whole.
FORKS = {"branching": "entropy_fork", "advantage": "grpo", "shared_token_weight": "first"}
LATENTS = {"latent_mode": "psa"}
FILTER = {"path_filter": "advantage", "paths_kept": 2}
FORK = (4, 2, 1, 3)  # one fork in each of four rollouts, three branches


@dataclass(frozen=True)
class Method:
    """Settings of TRL's GRPOTrainer, where `group` is given, or of this package's trainer."""

    name: str  # where people read it
    settings: dict[str, Any] = field(default_factory=dict)
    group: int = 0  # completions of a question in TRL's GRPOTrainer; 0: a tree of this package
    shape: tuple[int, int, int, int] = PAPER
    learning_rate: float = 1.0  # factor
    noise: bool = False  # rewards by chance instead of the task's
    labels: dict[str, Any] = field(default_factory=dict)  # more keys of the rows of its runs

    @property
    def leaves(self) -> int:
        """Completions of a question that are trained on."""
        initial, levels, nodes, branches = self.shape
        later = (levels - 1) * nodes * branches
        if self.settings.get("branching") in ("surprisal", "entropy_fork"):  # rounds of each initial rollout
            later = initial * self.settings.get("paths_kept", later)
        return self.group or initial + later

    @property
    def shares_prefixes(self) -> bool:
        return not self.group and self.settings.get("branching") != "independent"


METHODS = {
    "grpo_8": Method("GRPO, G = 8", group=8),
    "grpo_12": Method("GRPO, G = 12", group=12),
    "confidence": Method("confidence tree, `per_trajectory`", CONFIDENCE),
    "confidence_once": Method("confidence tree, `once`", {**CONFIDENCE, "shared_token_weight": "once"}),
    "confidence_sampled": Method("confidence tree, `sampled`", {**CONFIDENCE, "shared_token_weight": "sampled"}),
    "ib_no_local": Method("IB tree, `ib_coef` 0", {"ib_coef": 0.0}),
    "ibtpo": Method("IB-TPO as published"),
    "ib_once": Method("IB tree, `ib_coef` 0, `once`", {"ib_coef": 0.0, "shared_token_weight": "once"}),
    "random": Method("random tree, `per_trajectory`", RANDOM),
    "random_once": Method("random tree, `once`", {**RANDOM, "shared_token_weight": "once"}),
    "random_sampled": Method("random tree, `sampled`", {**RANDOM, "shared_token_weight": "sampled"}),
    "ibtpo_lookahead_3": Method("IB-TPO, lookahead 3", {"branch_lookahead": 3}),
    "ib_no_local_lookahead_3": Method("IB tree, `ib_coef` 0, lookahead 3", {"ib_coef": 0.0, "branch_lookahead": 3}),
    "ibtpo_2_3_1_5": Method("IB-TPO, shape (2, 3, 1, 5)", shape=(2, 3, 1, 5)),
    "ibtpo_4_3_1_4": Method("IB-TPO, shape (4, 3, 1, 4)", shape=(4, 3, 1, 4)),
    "grpo_8_top_entropy": Method("GRPO, G = 8, the 20% most uncertain tokens", {"top_entropy_quantile": 0.2}, group=8),
    "confidence_top_entropy": Method(
        "confidence tree, the 20% most uncertain tokens", {**CONFIDENCE, "top_entropy_quantile": 0.2}
    ),
    "grpo_8_rate_0.7": Method("GRPO, G = 8, 0.7 times the learning rate", group=8, learning_rate=0.7),
    "grpo_8_rate_1.4": Method("GRPO, G = 8, 1.4 times the learning rate", group=8, learning_rate=1.4),
}
FIRST = tuple(METHODS)  # those of the plan as it was first committed, whose order stays

# Other papers' methods with the settings of docs/methods.md, in trees of 12 leaves where theirs have more.
METHODS |= {
    "treerl": Method(
        "TreeRL", {"branching": "surprisal", "advantage": "treerl", "scale_rewards": "none"}, shape=(4, 2, 2, 1)
    ),
    "treepo": Method(
        "TreePO", {"branching": "segments", "advantage": "treepo", "scale_rewards": "none"}, shape=(2, 11, 1, 1)
    ),
    "tree_grpo": Method("Tree-GRPO", {"branching": "random", "allow_root_branching": True, "advantage": "tree_grpo"}),
    "spo": Method(
        "SPO-tree",
        {
            "branching": "random",
            "advantage": "segment_value",
            "value_estimate": "backup",
            "shared_token_weight": "once",
            "scale_rewards": "none",
        },
    ),
    "deep_grpo": Method("DEEP-GRPO", {"branching": "pivot", "advantage": "grpo"}, shape=(8, 2, 1, 4)),
    "contrast": Method("`contrast` tree, `ib_coef` 0", {"branching": "contrast", "ib_coef": 0.0}),
    "sibling": Method("confidence tree, advantage `sibling`", {**CONFIDENCE, "advantage": "sibling"}),
    "grpo_ibro": Method("GRPO, G = 8, and IBRO", {**INDEPENDENT, **IBRO}, shape=(8, 1, 1, 1)),
    "ibtpo_ibro": Method("IB-TPO and IBRO", IBRO),
    "grpo_adaptive": Method(
        "GRPO, 8 on average, `adaptive_budget` 2", {**INDEPENDENT, "adaptive_budget": 2}, shape=(4, 5, 1, 1)
    ),
    "confidence_adaptive": Method("confidence tree, `adaptive_budget` 2", {**CONFIDENCE, "adaptive_budget": 2}),
    # What TRL's trainer computes, with the figures that only this package's logs.
    "independent_8": Method("GRPO, G = 8, in this package", INDEPENDENT, shape=(8, 1, 1, 1)),
    "forks": Method("forks of I2B-LPO", FORKS, shape=FORK),
    "forks_latents": Method("forks and latents", {**FORKS, **LATENTS}, shape=FORK),
    "forks_latents_filter": Method("forks, latents and the filter", {**FORKS, **LATENTS, **FILTER}, shape=FORK),
    "i2b_lpo": Method("I2B-LPO", {**FORKS, **LATENTS, **FILTER, **IBRO}, shape=FORK),
}
# What a gradient does that knows nothing of right and wrong.
NOISE = ("grpo_8_noise", "confidence_sampled_noise")
METHODS |= {
    "grpo_8_noise": Method("GRPO, G = 8, rewards by chance", group=8, noise=True),
    "confidence_sampled_noise": Method(
        "confidence tree, `sampled`, rewards by chance", METHODS["confidence_sampled"].settings, noise=True
    ),
}
I2B_LPO = ("forks", "forks_latents", "forks_latents_filter", "i2b_lpo")


@dataclass(frozen=True)
class Setting:
    """How long and how fast a task is trained."""

    budget: int  # generated tokens
    learning_rate: float
    questions: int = 32  # of a generation batch
    updates: int = 2  # optimizer steps of a generation batch
    checkpoints: int = 10


SETTINGS = {
    "chain3": Setting(budget=120_000, learning_rate=4e-4),
    "chain7": Setting(budget=240_000, learning_rate=4e-4),
    "chain10": Setting(budget=360_000, learning_rate=4e-4),
    "chain8": Setting(budget=180_000, learning_rate=8e-4),
    "sums": Setting(budget=240_000, learning_rate=7e-4),
    "chain12": Setting(budget=900_000, learning_rate=3e-4),
}
# Steps of a solution, for pictures that load no task.
STEPS = {"chain3": 3, "chain7": 7, "sums": 7, "chain8": 8, "chain10": 10, "chain12": 12}
