"""Checks of what a trainer is given, before anything is loaded."""

from collections.abc import Callable
from typing import Any

from trl import GRPOConfig

from ..advantages import ADVANTAGES
from ..branching import STRATEGIES, rounds_of, uses_entropies, uses_rewards
from .dataset_checks import check_columns, check_dataset, columns_of, first_row
from .generation_checks import check_generation_kwargs, check_server_address, check_vllm, check_vllm_arguments
from .model_checks import check_model, check_path
from .reward_checks import check_arguments, check_messages


def refuse_unsupported(
    model: Any,
    reward_funcs: list[Any],
    args: GRPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    kwargs: dict[str, Any],
) -> None:
    """Say before anything is loaded what cannot work, and what to do instead."""
    if kwargs.get("rollout_func"):
        raise ValueError(
            "`rollout_func` is not supported: it samples whole completions by itself, which a tree has to branch. "
            "Give what it calls as `tools=` or `environment_factory=`, or train with TRL's GRPOTrainer."
        )
    if args.adaptive_budget is not None and (kwargs.get("tools") or kwargs.get("environment_factory")):
        raise ValueError(
            f"`adaptive_budget` is {args.adaptive_budget}, which cannot be combined with `tools` or "
            "`environment_factory`: each of the G rows of a question has an environment of its own. Leave it out."
        )
    for name, unused, reason in (
        ("path_filter", None, "what tools and environments did for the branches that are left out would be lost"),
        ("latent_mode", "none", "a branch whose environment cannot be brought back starts over, without a fork"),
    ):
        if getattr(args, name) != unused and (kwargs.get("tools") or kwargs.get("environment_factory")):
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, which cannot be combined with `tools` or "
                f"`environment_factory`: {reason}. Leave it out."
            )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "`use_transformers_continuous_batching` is not supported: it cannot give each rollout its own token "
            "budget. Leave it off, or set `use_vllm=True`."
        )
    check_model(model, args, processing_class, kwargs)
    check_generation_kwargs(args)
    check_dataset(train_dataset, args, kwargs.get("environment_factory"))
    check_columns(train_dataset, eval_dataset, args)
    environments = kwargs.get("environment_factory") is not None
    _check_reward_funcs(reward_funcs, train_dataset, eval_dataset, args, environments)
    if args.use_vllm:
        check_vllm_arguments(args)
        check_server_address(args)
        check_vllm()


def _check_reward_funcs(
    reward_funcs: list[Any], train_dataset: Any, eval_dataset: Any, args: GRPOConfig, environments: bool
) -> None:
    for reward_func in reward_funcs:
        if isinstance(reward_func, str):
            check_path("reward_funcs", reward_func)
    datasets = [("train_dataset", train_dataset)]
    if args.eval_strategy != "no" and eval_dataset is not None:
        several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets += [("eval_dataset", each) for each in several]
    for name, dataset in datasets:
        columns = columns_of(dataset)
        check_arguments(reward_funcs, columns, name, args.remove_unused_columns, environments)
        check_messages(reward_funcs, (first_row(dataset) or {}).get("prompt"))


def name_of(function: Callable) -> str:
    """What a user's own function is called in messages, records and cards."""
    return getattr(function, "__name__", type(function).__name__)


def check_advantage(advantage: Any, args: GRPOConfig) -> None:
    """Raise where what the trainer got as `advantage` cannot give advantages, or has the name of one that is here."""
    if advantage is None:
        return
    if not callable(advantage) or isinstance(advantage, type):
        raise TypeError(
            f"`advantage` of the trainer is {advantage!r}; give a function of a GradedTree that returns the advantage "
            "of every step or trajectory. An advantage of the package is a name in the configuration: "
            "IBTPOConfig(advantage='grpo')."
        )
    if name_of(advantage) in ADVANTAGES and advantage is not ADVANTAGES[name_of(advantage)]:
        raise ValueError(
            f"`advantage` of the trainer is a function named '{name_of(advantage)}', as an advantage of the package "
            "is. Rename it: model cards and records go by this name."
        )


SAMPLED_BY_REWARD = (
    "`shared_token_weight` is 'sampled', which takes the children of a step for equal samples of the policy, but "
    "`branching` is {!r}, which looks at rewards: a step that is branched because its first answers were right has "
    "children whose answers are right more often than the policy's. Use `branching='confidence'` or 'random', or "
    "`shared_token_weight='once'`."
)


def check_strategy(strategy: Any, args: GRPOConfig) -> None:
    """Raise where what the trainer got as `branching` cannot choose steps, or rewards choose that may not."""
    if strategy is None:
        if args.shared_token_weight == "sampled" and args.branches_by_reward:
            raise ValueError(SAMPLED_BY_REWARD.format(args.branching))
        return
    if not callable(strategy) or isinstance(strategy, type):
        raise TypeError(
            f"`branching` of the trainer is {strategy!r}; give a function of a tree, its scores and a random "
            "generator that returns the priority of every step. A strategy of the package is a name in "
            "the configuration: IBTPOConfig(branching='confidence')."
        )
    if name_of(strategy) in STRATEGIES:
        raise ValueError(
            f"`branching` of the trainer is a function named '{name_of(strategy)}', as a strategy of the package is. "
            "Rename it: trees and model cards go by this name."
        )
    if args.branching == "independent":
        raise ValueError(
            f"`branching` of the trainer is the function '{name_of(strategy)}', but `branching` of the configuration "
            "is 'independent', which never asks one. Leave the field out."
        )
    if rounds_of(args.branching) != "tree":
        raise ValueError(
            f"`branching` of the trainer is the function '{name_of(strategy)}', but `branching` of the configuration "
            f"is {args.branching!r}, which shapes trees in a way that no function of your own does. Leave the field "
            "out."
        )
    if args.shared_token_weight == "sampled" and uses_rewards(strategy):
        raise ValueError(
            f"`shared_token_weight` is 'sampled', which is right only where rewards do not decide where trees "
            f"branch, but the function '{name_of(strategy)}' does not say that it leaves them alone. If it does, set "
            "its `uses_rewards = False`; else use `shared_token_weight='once'`."
        )


def check_forks(strategy: Any, args: GRPOConfig) -> None:
    """Raise where a field about forks would do nothing; `strategy` is what the trainer branches by."""
    name = None if strategy is None else name_of(strategy)
    if args.fork_keeps_token and getattr(strategy, "forks", "steps") != "tokens":
        raise ValueError(
            f"`fork_keeps_token` is True, but `branching` is {name!r}, which forks no tokens: branches continue "
            "steps. Leave it out, or use `branching='entropy_fork'` or 'surprisal'."
        )
    if args.fork_entropy == "truncated" and not (args.use_vllm and uses_entropies(strategy)):
        reason = (
            "`use_vllm` is False: transformers has exact entropies, which cost nothing"
            if uses_entropies(strategy)
            else f"`branching` is {name!r}, which looks at no entropies"
        )
        raise ValueError(f"`fork_entropy` is 'truncated', but {reason}. Leave it out.")


def check_process_share(args: GRPOConfig, processes: int) -> None:
    """Raise where a process would generate no whole trees, or too few for what `adaptive_budget` gives away."""
    share = args.per_device_train_batch_size * args.steps_per_generation
    if share % args.num_generations:
        raise ValueError(
            f"Each process generates {share} completions at a time (`generation_batch_size` = "
            f"{args.generation_batch_size} over {processes} processes), which does not "
            f"hold whole trees of {args.num_generations} trajectories. Trees never span processes; use a multiple "
            f"of {args.num_generations * processes}."
        )
    if args.adaptive_budget is not None and share == args.num_generations:
        raise ValueError(
            f"`adaptive_budget` is {args.adaptive_budget}, but each process generates for one question at a "
            f"time ({share} completions), which has nobody to give to. Trees never span processes: raise "
            "`per_device_train_batch_size` or `steps_per_generation`, so that a process has many questions; "
            f"{8 * share} completions for eight."
        )
