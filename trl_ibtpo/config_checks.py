"""What must hold of the fields of `IBTPOConfig`: each alone (`RULES`), and one with another.

Each check takes the configuration and raises an error that names the field, its value and a value that would work.
"""

from collections.abc import Callable, Iterable
from dataclasses import Field
from math import isfinite, lcm
from numbers import Real
from typing import Any

from .advantages import BY_VALUE
from .branching import rounds_of
from .i2b_lpo import check_latents, check_paths


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_texts(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, str) and each for each in value)
    )


def _is_range(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


# Fields, what must hold for each alone, and how that is said.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "tree_initial_rollouts tree_levels tree_nodes_per_level tree_branches_per_node gradient_accumulation_steps",
        _is_whole,
        "a whole number of at least 1",
    ),
    (
        "per_device_train_batch_size",
        lambda value: value is None or _is_whole(value),
        "a whole number of at least 1, or None for one tree",
    ),
    (
        "adaptive_budget",
        lambda value: value is None or _is_whole(value),
        "a whole number of at least 1: so many right and so many wrong answers are enough; or None for trajectories "
        "that are the same number for every question",
    ),
    ("branch_lookahead", lambda value: _is_whole(value, 0), "a whole number from 0 (the paper)"),
    ("tool_concurrency", _is_whole, "a whole number of at least 1, for example 32"),
    ("log_trees", lambda value: _is_whole(value, 0), "a whole number of training steps, or 0 to record no trees"),
    ("log_trees_count", _is_whole, "a whole number of at least 1"),
    (
        "max_completion_length",
        _is_whole,
        "a whole number of at least 1: a branch may use what its prefix left of it",
    ),
    (
        "temperature",
        _is_positive,
        "positive (the paper uses 0.7), or all rollouts from a step would be the same",
    ),
    (
        "top_p",
        lambda value: _is_number(value) and 0 < value <= 1,
        "a share in (0, 1] of the probability to sample from (the paper uses 0.95)",
    ),
    (
        "latent_strength",
        lambda value: _is_number(value) and value >= 0,
        "a number of at least 0 (1 is the strength at which latents were scaled, 0 does nothing)",
    ),
    ("latent_decay", _is_positive, "a positive number of tokens, for example 128"),
    ("top_k", lambda value: _is_whole(value, 0), "a whole number of tokens, or 0 for all (the paper uses 20)"),
    ("ib_beta", _is_positive, "positive (the paper uses 5)"),
    ("ib_coef", _is_number, "a number (the paper uses 0.1)"),
    (
        "sibling_kappa",
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and value >= 0,
        "a number of leaves from 0 (only the nearest siblings count), or infinite (all other leaves of the question)",
    ),
    (
        "ib_regularization_coef",
        lambda value: _is_number(value) and value >= 0,
        "a number of at least 0 (IBRO's paper uses 0.005)",
    ),
    ("ib_regularization_shift", _is_number, "a number (IBRO's paper uses 0)"),
    (
        "success_range",
        lambda value: value is None or _is_range(value),
        "the lowest and the highest value of the reward that says whether a completion is right, two finite numbers, "
        "for example (-1.0, 1.5)",
    ),
    (
        "reward_timeout tool_timeout",
        lambda value: value is None or _is_positive(value),
        "a positive number of seconds, for example 30, or None for no limit",
    ),
    (
        "step_delimiter",
        lambda value: _are_texts([value] if isinstance(value, str) else value),
        "the text that ends a step, for example '\\n\\n', or a list of such texts",
    ),
    ("step_min_tokens", _is_whole, "a whole number of at least 1"),
    (
        "step_max_tokens",
        lambda value: value is None or _is_whole(value),
        "a whole number of at least 1, or None for no limit",
    ),
    ("step_noise", lambda value: _is_number(value) and 0 <= value <= 1, "a share between 0 and 1"),
    (
        "answer_marker",
        lambda value: value is None or _are_texts(value),
        "a list of texts that begin an answer, for example ['answer', 'conclusion'], or None",
    ),
)


def check_fields(config: Any, own: Iterable[Field]) -> None:
    """Each field alone: the rules, and the choices of the fields `own`."""
    for names, holds, rule in RULES:
        for name in names.split():
            if not holds(getattr(config, name)):
                raise ValueError(f"`{name}` is {getattr(config, name)!r}; it must be {rule}.")
    for each in own:
        choices = each.metadata.get("choices")
        allowed = choices and ([*choices, None] if each.default is None else choices)
        if choices and getattr(config, each.name) not in allowed:
            raise ValueError(f"`{each.name}` is {getattr(config, each.name)!r}; it must be one of {allowed}.")


def check_leaves(config: Any) -> None:
    """That a tree has something to compare."""
    if config.growth_settings.leaves < 2:
        raise ValueError(
            f"The tree has one trajectory (`tree_initial_rollouts` is {config.tree_initial_rollouts}, `tree_levels` "
            f"is {config.tree_levels}), but advantages compare at least 2. Raise one of them."
        )


def check_combinations(config: Any) -> None:
    """Fields that do not go together."""
    _check_success(config)
    _check_steps(config)
    _check_budget(config)
    _check_credit(config)
    check_paths(config)
    check_latents(config)
    _check_num_generations(config)


def _check_success(config: Any) -> None:
    if config.success_range is not None and isinstance(config.success_reward, tuple):
        raise ValueError(
            f"`success_range` is {config.success_range} and `success_reward` is {config.success_reward}, but what "
            "a threshold says is true or false and has no range. Leave `success_range` out."
        )


def _check_steps(config: Any) -> None:
    if config.step_max_tokens is not None and config.step_max_tokens < config.step_min_tokens:
        raise ValueError(
            f"`step_max_tokens` is {config.step_max_tokens}, but `step_min_tokens` is {config.step_min_tokens}. "
            "Give a maximum that is at least the minimum."
        )
    if config.branching == "segments":
        for name, unused in (("branch_lookahead", 0), ("answer_marker", None)):
            if getattr(config, name) != unused:
                raise ValueError(
                    f"`{name}` is {getattr(config, name)!r}, which has no meaning with `branching='segments'`: all "
                    "paths are split after every step, without rounds. Leave it out."
                )


def _check_budget(config: Any) -> None:
    if config.adaptive_budget is None:
        return
    if rounds_of(config.branching) != "tree":
        raise ValueError(
            f"`adaptive_budget` is {config.adaptive_budget}, but `branching` is {config.branching!r}, which has no "
            "rounds of the whole tree after which a question could stop. Use another, for example 'confidence'."
        )
    if config.tree_levels == 1:
        raise ValueError(
            f"`adaptive_budget` is {config.adaptive_budget}, but `tree_levels` is 1: every question keeps its "
            "initial rollouts, and there are no others to give away. Use, for example, "
            "`tree_initial_rollouts=4, tree_levels=9`; with `branching='independent'` too."
        )
    if config.tree_initial_rollouts == 1:
        raise ValueError(
            f"`adaptive_budget` is {config.adaptive_budget}, but `tree_initial_rollouts` is 1: a question that "
            "stopped after it would have nothing to compare its answer with. Use at least 2."
        )


def _check_credit(config: Any) -> None:
    """Combinations that would train on something else than they say."""
    if config.shared_token_weight != "per_trajectory" and config.advantage == "treerl":
        raise ValueError(
            f"`shared_token_weight` is {config.shared_token_weight!r}, but `advantage='treerl'` weighs shared "
            "tokens itself, by the square root of their number of leaves. Use 'per_trajectory'."
        )
    if config.advantage == "segment_value" and not config.branches:
        raise ValueError(
            "`advantage` is 'segment_value', the gain of a step over its parent, but no rollout continues another "
            "one: every step after the first would get 0. Use `advantage='grpo'`, or branch."
        )
    for name, plain in (("value_estimate", "leaf_mean"), ("selection_correction", False)):
        if getattr(config, name) != plain and config.advantage not in BY_VALUE:
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but `advantage={config.advantage!r}` is not made of the "
                f"values of steps. Use {plain!r}, or one of these advantages: {', '.join(BY_VALUE)}."
            )
    if config.ib_regularization_shift != 0 and config.ib_regularization_coef == 0:
        raise ValueError(
            f"`ib_regularization_shift` is {config.ib_regularization_shift!r}, but `ib_regularization_coef` is 0, "
            "so there is no term that it shifts. Set the coefficient as well, for example to 0.005."
        )
    if config.selection_correction and not config.branches:
        raise ValueError("`selection_correction` is True, but no step is chosen: no rollout continues another one.")
    if config.selection_correction and config.path_filter is not None:
        raise ValueError(
            "`selection_correction` is True, which takes the luck of being chosen off a step, but "
            f"`path_filter={config.path_filter!r}` chooses among its branches once more. Leave one of them out."
        )
    if config.shared_token_weight == "sampled" and config.branches and config.adaptive_budget is not None:
        raise ValueError(
            "`shared_token_weight` is 'sampled', which takes the children of a step for equal samples of the "
            f"policy, but `adaptive_budget` is {config.adaptive_budget}: whether a step is branched once more "
            "depends on the rewards under it. Leave `adaptive_budget` out, or use `shared_token_weight='once'`."
        )


def _check_num_generations(config: Any) -> None:
    group = config.rows_per_question
    if config.num_generations in (None, group):
        return
    if config.path_filter is not None:
        raise ValueError(
            f"`num_generations` is {config.num_generations!r}, but `path_filter` keeps {group} trajectories of "
            f"each question: tree_initial_rollouts * (1 + paths_kept) = {config.tree_initial_rollouts} * (1 + "
            f"{config.paths_kept}) = {group}, of {config.growth_settings.leaves} that are sampled. Leave "
            "`num_generations` out, or change these."
        )
    per_tree = config.growth_settings.groups == 1
    terms = (
        "tree_initial_rollouts + (tree_levels - 1) * tree_nodes_per_level * tree_branches_per_node"
        if per_tree
        else "tree_initial_rollouts * (1 + (tree_levels - 1) * tree_nodes_per_level * tree_branches_per_node)"
    )
    values = terms
    for name in ("tree_initial_rollouts", "tree_levels", "tree_nodes_per_level", "tree_branches_per_node"):
        values = values.replace(name, str(getattr(config, name)))
    raise ValueError(
        f"`num_generations` is {config.num_generations!r}, but the tree has {group} trajectories: {terms} = "
        f"{values} = {group}. Leave `num_generations` out, or change the tree"
        f"{_shape_for(config, config.num_generations)}."
    )


def _shape_for(config: Any, leaves: Any) -> str:
    """Which field gives the tree that many trajectories, in words that end a sentence."""
    if not _is_whole(leaves, 2) or config.growth_settings.groups > 1:
        return ""
    per_round = config.growth_settings.branches_per_round
    rounds, rest = divmod(leaves - config.tree_initial_rollouts, per_round)
    if rounds >= 0 and rest == 0:
        return f": `tree_levels={rounds + 1}` gives {leaves} trajectories"
    if leaves < config.tree_initial_rollouts:
        return f": `tree_initial_rollouts={leaves}` with `tree_levels=1` gives {leaves} trajectories"
    first = config.tree_initial_rollouts + rest
    return f": `tree_initial_rollouts={first}` with `tree_levels={rounds + 1}` gives {leaves} trajectories"


def check_whole_trees(config: Any) -> None:
    """Trees never span processes, so each process must generate whole trees."""
    group = config.num_generations
    if config.generation_batch_size is not None:
        # How many processes share it is known only later; the trainer checks the share of each.
        if config.generation_batch_size % group:
            raise ValueError(
                f"`generation_batch_size` is {config.generation_batch_size}, which does not hold whole trees of "
                f"{group} trajectories. Values that work: {group}, {2 * group}, {3 * group}, ... for each process."
            )
        return
    steps_name = "steps_per_generation"
    steps = config.steps_per_generation
    if steps is None:
        steps_name, steps = "gradient_accumulation_steps", config.gradient_accumulation_steps
    if config.per_device_train_batch_size * steps % group:
        multiple = lcm(steps, group)
        batch_sizes = ", ".join(str(multiple * factor // steps) for factor in (1, 2, 3))
        multiple = lcm(config.per_device_train_batch_size, group)
        numbers = ", ".join(str(multiple * factor // config.per_device_train_batch_size) for factor in (1, 2, 3))
        raise ValueError(
            f"A process generates `per_device_train_batch_size` * `{steps_name}` = "
            f"{config.per_device_train_batch_size} * {steps} = {config.per_device_train_batch_size * steps} "
            f"completions at a time, which does not hold whole trees of {group} trajectories. Values that work: "
            f"`per_device_train_batch_size` = {batch_sizes}, ... with `{steps_name}` = {steps}; or "
            f"`{steps_name}` = {numbers}, ... with `per_device_train_batch_size` = "
            f"{config.per_device_train_batch_size}."
        )
