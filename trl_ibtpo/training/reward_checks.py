"""Reward functions against the dataset: what cannot work is said before a model is loaded."""

import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

from trl.trainer.utils import get_callable_name

# What the trainer gives to reward functions under names of its own, beside the columns of the dataset.
REWARD_ARGUMENTS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
# Functions of trl.rewards that take completions apart as chat messages.
READ_MESSAGES = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "cosine_scaled_reward")


def trl_reward_names() -> list[str]:
    """Names that stand for a function of `trl.rewards`."""
    import trl.rewards

    names = [name for name in dir(trl.rewards) if name.endswith("_reward") and not name.startswith("get_")]
    return [*names, "get_soft_overlong_punishment"]


def named_reward(name: str) -> Callable:
    """The function of `trl.rewards` with a name of `trl_reward_names`, as `trl grpo` makes it."""
    import trl.rewards

    if name == "get_soft_overlong_punishment":  # with the values that TRL's own help gives
        return trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    return getattr(trl.rewards, name)


def resolve_reward_funcs(reward_funcs: Any, optional: bool = False) -> list[Any]:
    """The list of reward functions, with TRL's functions in place of their names.

    Args:
        reward_funcs: as the trainer got them.
        optional: whether there may be none, since an environment has rewards of its own.

    Raises:
        ValueError: the list is empty, or a name is that of neither a function nor a model.
        TypeError: something in it cannot be called.
    """
    reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if reward_funcs in ([], [None]):
        if optional:
            return []
        raise ValueError(
            "`reward_funcs` is empty, but trees branch and learn by rewards. Give a function that returns one number "
            "per completion, for example `trl.rewards.accuracy_reward`, or a list of several."
        )
    return [_resolve(reward_func) for reward_func in reward_funcs]


def _resolve(reward_func: Any) -> Any:
    if not isinstance(reward_func, str):
        if callable(reward_func):
            return reward_func
        raise TypeError(
            f"`reward_funcs` holds {reward_func!r}, which cannot be called. Give a function, a model, the name of a "
            "sequence-classification model, or a list of these."
        )
    known = trl_reward_names()
    if reward_func in known:
        return named_reward(reward_func)
    if reward_func.endswith("_reward") and "/" not in reward_func and not os.path.isdir(reward_func):
        raise ValueError(
            f"`reward_funcs` holds {reward_func!r}, which is the name of no function in trl.rewards (there are: "
            f"{', '.join(known)}). Give the function itself, or the name of a sequence-classification model."
        )
    return reward_func


def check_arguments(
    reward_funcs: Iterable[Any],
    columns: Iterable[str] | None,
    dataset: str,
    dropped: bool,
    environments: bool = False,
) -> None:
    """Raise `ValueError` where a function cannot be called with what the trainer will give it.

    Args:
        reward_funcs: functions; models among them are left alone.
        columns: of the dataset, as far as reward functions get them; `None` where they are not known yet.
        dataset: the name of the argument that holds it.
        dropped: whether the trainer drops columns (`remove_unused_columns`).
        environments: whether reward functions get environments as well.
    """
    arguments = REWARD_ARGUMENTS | ({"environments"} if environments else set())
    for func in reward_funcs:
        if isinstance(func, str) or hasattr(func, "forward"):
            continue
        try:
            parameters = inspect.signature(func, follow_wrapped=False).parameters.values()  # it is what is called
        except (TypeError, ValueError):  # nothing is known of some built-in functions
            continue
        by_name = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        name = get_callable_name(func)
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            unknown = sorted(arguments - {each.name for each in by_name})
            if unknown:
                raise ValueError(
                    f"The reward function '{name}' does not take `{unknown[0]}`, but it is called with "
                    f"{', '.join(sorted(arguments))} and the columns of the dataset, by name. Let it take what "
                    f"it does not use: `def {name}(completions, **kwargs)`."
                )
        if columns is None:
            continue
        columns = list(columns)
        given = arguments | (set() if dropped else set(columns) - {"prompt"})
        missing = [each.name for each in by_name if each.default is each.empty and each.name not in given]
        if missing:
            raise ValueError(_missing(name, missing[0], columns, dataset, dropped))


def _missing(name: str, parameter: str, columns: list[str], dataset: str, dropped: bool) -> str:
    message = f"The reward function '{name}' needs `{parameter}`, "
    if parameter in ("prompt", "completion"):
        return message + f"but reward functions get lists: call the parameter `{parameter}s`."
    if dropped and parameter in columns:
        return message + (
            f"which is a column of `{dataset}`, but `remove_unused_columns` is True, and then reward functions get no "
            "columns. Set `remove_unused_columns=False`, which is the default."
        )
    others = [column for column in columns if column != "prompt"]
    renamed = others[0] if others else "answer"
    return message + (
        f"but `{dataset}` has no such column (it has: {', '.join(map(str, columns)) or 'none'}). Rename the column "
        f"that holds it, for example `dataset.rename_column('{renamed}', '{parameter}')`, or give the parameter a "
        "default."
    )


def check_messages(reward_funcs: Iterable[Any], prompt: Any) -> None:
    """Raise `ValueError` where a function of TRL reads chat messages and `prompt` is text."""
    for func in reward_funcs:
        name = get_callable_name(func)
        in_trl = getattr(func, "__module__", "").startswith("trl.rewards")
        if isinstance(prompt, str) and name in READ_MESSAGES and in_trl:
            raise ValueError(
                f"The reward function '{name}' of TRL reads chat messages, but the column 'prompt' holds text, so "
                "completions are text. Make the prompts messages, for example `dataset.map(lambda row: {'prompt': "
                "[{'role': 'user', 'content': row['prompt']}]})`, or give a function of your own."
            )
