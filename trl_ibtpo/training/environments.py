"""What a branch needs of an environment: to be as it was at the end of the prefix that the branch continues.

The ladder, from the top:

none      no environment: tools without state need nothing
snapshot  the environment has `_snapshot()`, which returns its state, and `_restore(state)`, which any instance that
          was reset with the same row can be put into that state by, several times
deepcopy  `environment_branching="deepcopy"`: a copy is kept at the end of every turn, and a branch gets a copy of it
replay    otherwise: the actions of the prefix are executed once more on an instance that was reset with the same row,
          and every token that it answers must be the same

The two methods have a leading underscore because TRL offers every public method of an environment to the model as a
tool. One more is optional, `_close()`: it is called once for every instance, on every way out.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers.utils import logging

from .time_limit import LimitedCalls, LimitReached

logger = logging.get_logger(__name__)

EnvironmentBranching = Literal["replay", "deepcopy"]
Rung = Literal["snapshot", "deepcopy", "replay"]


class EnvironmentFailed(Exception):
    """An environment cannot go on. It ends its own trajectory, which then has no reward; other trajectories go on."""


def rung_of(environment: Any, otherwise: EnvironmentBranching) -> Rung:
    """Which rung of the ladder an environment stands on."""
    has = [callable(getattr(environment, name, None)) for name in ("_snapshot", "_restore")]
    return "snapshot" if all(has) else otherwise


def check_environment(environment: Any, otherwise: EnvironmentBranching) -> None:
    """Raise where no branch could have this environment as it was, before anything is trained."""
    name = type(environment).__name__
    for there, missing in (("_snapshot", "_restore"), ("_restore", "_snapshot")):
        if hasattr(environment, there) and not hasattr(environment, missing):
            raise ValueError(
                f"The environment {name} defines `{there}` but not `{missing}`. A branch needs both: `_snapshot()` "
                "returns the state, `_restore(state)` goes back to it. Define both, or neither: then "
                "`environment_branching` says how branches get their environment."
            )
    for method in ("_snapshot", "_restore", "_close"):
        if inspect.iscoroutinefunction(getattr(environment, method, None)):
            raise ValueError(
                f"`{method}` of the environment {name} is asynchronous, and a call alone would do nothing. Make it a "
                "plain `def`, which may wait for what it needs: it does not run on the event loop."
            )
    if rung_of(environment, otherwise) == "deepcopy":
        try:
            close(copy.deepcopy(environment))
        except Exception as error:
            raise ValueError(
                f"`environment_branching` is 'deepcopy', but a copy of the environment {name} cannot be made: "
                f"{type(error).__name__}: {error}. Define `__deepcopy__`, or `_snapshot` and `_restore`, or set "
                "`environment_branching='replay'`."
            ) from error


def close(environment: Any, limit: LimitedCalls | None = None) -> None:
    """Close an environment that can be closed; an error is a warning, since others are still to be closed."""
    closing = getattr(environment, "_close", None)
    if closing is None:
        return
    try:
        closing() if limit is None else limit.call("_close", closing)
    except LimitReached:
        logger.warning(f"Closing the environment {type(environment).__name__} took longer than `tool_timeout`.")
    except Exception as error:
        logger.warning(f"Closing the environment {type(environment).__name__} raised {type(error).__name__}: {error}.")


class Environments:
    """The environments of one generation batch, one a trajectory.

    Args:
        instances: in the order of rows, reset with their row. A trajectory whose environment is a copy has it put into
            this list, from which reward functions get theirs.
        otherwise: how branches get an environment that has no snapshots.
        limit: on each call of an environment.
    """

    def __init__(self, instances: list[Any], otherwise: EnvironmentBranching, limit: LimitedCalls):
        self.instances = instances
        self._otherwise = otherwise
        self._limit = limit
        self._copies: list[Any] | None = []  # made here, to be closed; None once they are
        self._keeping = threading.Lock()

    def rung(self, row: int) -> Rung:
        return rung_of(self.instances[row], self._otherwise)

    def save(self, row: int) -> Any:
        """What a branch needs to have the environment of `row` as it is now."""
        environment, rung = self.instances[row], self.rung(row)
        if rung == "snapshot":
            return self._call(environment, "_snapshot", environment._snapshot)
        return self._copy(environment) if rung == "deepcopy" else None

    def restore(self, row: int, state: Any) -> None:
        """Put the environment of `row` into a saved state; not for replay."""
        environment = self.instances[row]
        if self.rung(row) == "snapshot":
            self._call(environment, "_restore", lambda: environment._restore(state))
        else:
            self.instances[row] = self._copy(state)

    def reset(self, row: int, arguments: dict[str, Any]) -> Any:
        environment = self.instances[row]
        return self._call(environment, "reset", lambda: environment.reset(**arguments))

    def close_copies(self) -> None:
        with self._keeping:
            copies, self._copies = self._copies or [], None
        for environment in copies:
            close(environment, self._limit)

    def _copy(self, environment: Any) -> Any:
        copied = self._call(environment, "deepcopy", lambda: copy.deepcopy(environment))
        with self._keeping:
            if self._copies is not None:
                self._copies.append(copied)
                return copied
        close(copied, self._limit)  # the batch ended while it was made
        raise EnvironmentFailed("the generation batch has ended")

    def _call(self, environment: Any, what: str, call: Callable[[], Any]) -> Any:
        """Call a method of an environment; its error is one of the environment."""
        name = type(environment).__name__
        try:
            return self._limit.call(what, call)
        except LimitReached as error:
            raise EnvironmentFailed(f"{what} of {name} did not end within {self._limit.seconds:g} seconds") from error
        except Exception as error:
            raise EnvironmentFailed(f"{what} of {name} raised {type(error).__name__}: {error}") from error


def same_prompt(prompt: Sequence[dict[str, Any]], row_prompt: Sequence[dict[str, Any]], observation: Any) -> bool:
    """Whether a reset with `observation` makes of a row's prompt the prompt that was made of it before."""
    content, before = prompt[-1]["content"], row_prompt[-1]["content"]
    if observation is None:
        return content == before
    parts = [
        [{"type": "text", "text": each}] if isinstance(each, str) and isinstance(content, list) else each
        for each in (before, observation)
    ]
    return content == parts[0] + parts[1]
