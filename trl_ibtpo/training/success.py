"""Which completions are right: their success, out of what the reward functions gave them.

Names of shapes: `_L` completions, `_F` reward functions.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from ..tree import ROUNDING

COMPARISONS = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}
FORMS = "'accuracy_reward', or a threshold such as ('shaped_reward', '>', 0.5)"

Threshold = tuple[str, str, float]  # name of a reward function, a key of COMPARISONS, and what to compare with
Rule = str | Threshold | None  # a name alone: its value; None: the value of the first function
SuccessFunction = Callable[[dict[str, float | None]], float | bool | None]


def parse_rule(value: Any) -> Rule:
    """`success_reward` as a user may give it, in one form.

    A name; a function, which stands for its name; a threshold as three values, or for a command line as one text,
    `"shaped_reward > 0.5"`.

    Raises:
        ValueError: it is something else.
    """
    if callable(value):
        while isinstance(value, partial):  # as TRL names them
            value = value.func
        value = getattr(value, "__name__", type(value).__name__)
        if value.startswith("<"):
            raise ValueError(
                "`success_reward` is a function without a name, which a configuration cannot keep. Give the name of a "
                f"reward function: {FORMS}; or give the function to the trainer as `success_func`, which gets the "
                "rewards of a completion: success_func=lambda rewards: rewards['shaped_reward'] > 0.5."
            )
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*(\S+)\s*(>=|<=|>|<)\s*(\S+)\s*", value)
        if parts is None:
            return value
        value = parts.groups()
    if value is None:
        return None
    try:
        name, comparison, number = value
        if isinstance(name, str) and comparison in COMPARISONS and np.isfinite(float(number)):
            return name, comparison, float(number)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"`success_reward` is {value!r}; it must be the name of a reward function, {FORMS}.")


def out_of_range(rewards: np.ndarray) -> np.ndarray:
    """Which of them are outside [0, 1] by more than rounding; NaN is not."""
    return np.abs(rewards - 0.5) > 0.5 + ROUNDING


def as_returned(rewards: Any) -> np.ndarray:
    """Rewards as their functions returned them, float64: TRL keeps float32, in which 0.7 is less than 0.7."""
    return np.asarray(rewards, dtype=np.float32).astype(str).astype(np.float64)


class Success:
    """How right completions are.

    Args:
        names: of the reward functions.
        rule: see `parse_rule`; its name must be one of `names`.
        bounds: values of the function that are success 0 and 1 (`success_range`).
        func: gets the rewards of one completion by name (None where there is none) and returns its success; in place
            of `rule`.

    Raises:
        ValueError: the name is none of `names`, or is that of several functions; or both `rule` and `func` are given.
        TypeError: `func` cannot be called.
    """

    def __init__(
        self,
        names: Sequence[str],
        rule: Rule = None,
        bounds: tuple[float, float] | None = None,
        func: SuccessFunction | None = None,
    ):
        if func is not None and not callable(func):
            raise TypeError(
                f"`success_func` is {func!r}; it must be a function of the rewards of a completion, for example "
                "`lambda rewards: rewards['shaped_reward'] > 0.5`. The name of a reward function goes into the "
                "configuration, as `success_reward`."
            )
        if func is not None and rule is not None:
            raise ValueError(
                f"Both `success_func` and `success_reward` ({rule!r}) say what a right completion is. Leave one out."
            )
        self.names, self._func, self._bounds = list(names), func, bounds
        name, self._comparison, self._limit = rule if isinstance(rule, tuple) else (rule, None, None)
        if name is not None and self.names.count(name) != 1:
            what = "the name of several reward functions" if name in self.names else "not a reward function"
            raise ValueError(
                f"`success_reward` is {name!r}, which is {what}. Available: {', '.join(self.names)}. Add a function "
                "that tells right from wrong to `reward_funcs` (its weight in `reward_weights` may be 0), or give the "
                "trainer a function of the rewards of a completion as `success_func`."
            )
        self._index = 0 if name is None else self.names.index(name)

    @property
    def scales(self) -> bool:
        """Whether a tree with a value outside [0, 1] makes success of its own lowest and highest value."""
        return self._comparison is None and self._bounds is None

    @property
    def source(self) -> str:
        """The function whose values are success, in words that can begin a clause."""
        if self._func is not None:
            name = getattr(self._func, "__name__", type(self._func).__name__)
            return "`success_func`" if name.startswith("<") else f"`success_func` {name!r}"
        return f"the reward function {self.names[self._index]!r}"

    def __str__(self) -> str:
        """Words for the line at the start, the model card and records."""
        words = self.source.removeprefix("the reward function ")
        if self._comparison is not None:
            words += f" {self._comparison} {self._limit:g}"
        if self._bounds is not None:
            words += " between {} and {} (`success_range`)".format(*self._bounds)
        return words

    def values(self, rewards_LF: np.ndarray) -> np.ndarray:
        """What a tree makes success of, `(L, F)` to `(L,)`: the function's own values, or 0 and 1 by a threshold."""
        rewards_LF = as_returned(rewards_LF)
        if self._func is not None:
            return np.array([self._judge(rewards_F) for rewards_F in rewards_LF], dtype=np.float64)
        values_L = rewards_LF[:, self._index]
        if self._comparison is None:
            return values_L
        right_L = COMPARISONS[self._comparison](values_L, self._limit)
        return np.where(np.isnan(values_L), np.nan, right_L)

    def _judge(self, rewards_F: np.ndarray) -> float:
        if np.isnan(rewards_F).all():  # unscored, which GRPO leaves out as well
            return np.nan
        given = {
            name: None if np.isnan(reward) else float(reward)
            for name, reward in zip(self.names, rewards_F, strict=True)
        }
        try:
            found = self._func(given)
        except Exception as error:
            raise ValueError(
                f"{self.source} raised {type(error).__name__}: {error} for the rewards {given}."
            ) from error
        if isinstance(found, (bool, np.bool_)) or (isinstance(found, Real) and np.isfinite(found)):
            return float(found)
        if found is None:
            return np.nan
        raise ValueError(
            f"{self.source} returned {found!r} for the rewards {given}; it must return a finite number, True or "
            "False, or None where success is unknown."
        )

    def __call__(self, rewards_LF: np.ndarray) -> np.ndarray:
        """Success in [0, 1] where it is known without the rest of a tree; other values as they are."""
        values_L = self.values(rewards_LF)
        if self._bounds is not None:
            low, high = self._bounds
            return np.clip((values_L - low) / (high - low), 0, 1)
        return np.where(out_of_range(values_L), values_L, np.clip(values_L, 0, 1))


def describe_scaling(source: str, values_L: np.ndarray) -> str | None:
    """What a user should know where the values that success is made of are not all in [0, 1]."""
    outside = values_L[out_of_range(values_L)]
    if not len(outside):
        return None
    low, high = np.nanmin(values_L), np.nanmax(values_L)
    if low == high:
        low, high = min(low, 0), max(high, 1)
    digits = next(digits for digits in range(4, 18) if f"{low:.{digits}g}" != f"{high:.{digits}g}")
    shown, low, high = float(f"{outside[0]:.4g}"), float(f"{low:.{digits}g}"), float(f"{high:.{digits}g}")
    return (
        f"{source[0].upper()}{source[1:]} returned {shown}, outside [0, 1]. Trees with such a value scale their "
        "rewards from their own lowest to their own highest, to know which steps to branch and to favour: success "
        "then says which completion of a question is better, not how good it is. "
        f"`success_range=({low}, {high})` would fix the scale; it fits what was seen so far. Said once."
    )


def describe_unknown(success: Success, rewards_LF: np.ndarray, sizes: Sequence[int]) -> str | None:
    """What a user should know where whole trees have rewards, but none that success is made of."""
    ends = np.cumsum(sizes)[:-1]
    scored_L, known_L = ~np.isnan(rewards_LF).all(axis=1), ~np.isnan(success(rewards_LF))
    trees = [
        columns_LF
        for columns_LF, scored, known in zip(
            *(np.split(each, ends) for each in (rewards_LF, scored_L, known_L)), strict=True
        )
        if scored.any() and not known.any()
    ]
    if not trees:
        return None
    found = ~np.isnan(np.concatenate(trees)).all(axis=0)
    scorers = " and ".join(f"'{name}'" for name, there in zip(success.names, found, strict=True) if there)
    return (
        f"No completion of {len(trees)} of {len(sizes)} trees has a known success, though {scorers} scored them: "
        f"success comes from {success}. Which steps of these trees are branched and favoured does not depend on "
        "their rewards. Where different functions score different rows, tell the trainer what success is: "
        "`success_func=lambda rewards: next((r for r in rewards.values() if r is not None), None)`. Said once."
    )


class SuccessWatch:
    """Notices that success never tells the completions of a question apart, from the first tree on."""

    patience, patience_with_one_value = 32, 8  # trees; one value for all says more than one value for each

    def __init__(self):
        self._trees = 0
        self._counts: dict[float, int] = {}
        self._done = False

    def add(self, success: Success, rewards_LF: np.ndarray, sizes: Sequence[int]) -> str | None:
        """Look at further trees, which have so many rows; returns what to warn of, once."""
        if self._done:
            return None
        success_L = success(rewards_LF)
        for values in np.split(success_L, np.cumsum(sizes)[:-1]):
            known = values[~np.isnan(values)]
            if len(known) and known.min() < known.max():
                self._done = True  # for good: it can tell them apart
                return None
            for value in known.tolist():
                self._counts[value] = self._counts.get(value, 0) + 1
            self._trees += 1
        patience = self.patience_with_one_value if len(self._counts) == 1 else self.patience
        if self._trees < patience or not self._counts:
            return None
        self._done = True
        seen = ", ".join(f"{value:g} for {count}" for value, count in sorted(self._counts.items())[:4])
        others = "; ".join(
            f"'{name}' {np.nanmin(column):g} to {np.nanmax(column):g}"
            for name, column in zip(success.names, np.asarray(rewards_LF, dtype=float).T, strict=True)
            if not np.isnan(column).all()
        )
        return (
            f"Success did not differ within any of the first {self._trees} trees, so that they teach nothing about "
            f"steps. It comes from {success}, and was {seen} of {sum(self._counts.values())} completions. The rewards "
            f"of the last batch were: {others}. If another function tells right from wrong, name it in "
            "`success_reward` (an accuracy function that is there for this alone may have weight 0 in "
            "`reward_weights`), or give a threshold: `success_reward=('shaped_reward', '>', 0.5)`. If this one does, "
            "the questions are too hard or too easy. Said once."
        )
