"""The tool calls of one turn, each with its limit, for TRL's own loop to execute."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, Protocol

from trl import GRPOTrainer

from .time_limit import LimitedCalls, LimitReached

NO_TOOL_IMAGES = (
    "A tool returned an image, which is not supported: a tree branches text prefixes. Return text that describes it, "
    "or train with TRL's GRPOTrainer."
)


class Host(Protocol):
    """What the tool calls of a generation batch have in common, see `tools.ToolHost`."""

    limit: LimitedCalls
    tasks: set[asyncio.Task]  # asynchronous calls under way
    stopped: bool  # nothing may start any more
    tokenizing: threading.Lock

    def method(self, row: int, tool: Callable) -> Callable | None:
        """The method of the environment of `row` that `tool` is; None for any other tool."""

    def count(self, what: str) -> None:
        """Count one more of `what`."""


class OneIteration:
    """Stands in for the trainer in one iteration of TRL's loop: with this row's tools, and without generation.

    Args:
        host: whose tools these are.
        trainer: TRL's.
        row: whose tools and environment.
        budget: completion tokens, the observation included.
        recorded: results of the same calls, which tools without state are not asked for again.
    """

    max_tool_calling_iterations = 1

    def __init__(self, host: Host, trainer: GRPOTrainer, row: int, budget: int, recorded: list[dict[str, Any]] | None):
        self.environment_error: str | None = None
        self.returned_image = False
        self.max_completion_length = budget
        self._host, self._trainer, self._row, self._recorded = host, trainer, row, recorded
        self._sync_tool_dicts = [self._prepared(self._trainer._sync_tool_dicts[row], self._call)]
        self._async_tool_dicts = [self._prepared(self._trainer._async_tool_dicts[row], self._start)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        return [[]], None  # the next turn is the engine's; without one, TRL's loop ends here

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        with self._host.tokenizing:
            return self._trainer._get_tool_suffix_ids(tool_messages)

    def _prepared(self, tools: dict[str, Callable], call: Callable) -> dict[str, Callable]:
        """Tools by name, as TRL keeps them, each with its limit."""
        prepared = {}
        for name, tool in tools.items():
            method = self._host.method(self._row, tool)
            if method is None and self._recorded is not None:
                limited = partial(call, name, self._repeat(name, call), False)
            else:
                limited = partial(call, name, method or tool, method is not None)
            prepared[name] = update_wrapper(limited, tool)  # Python's errors name the tool, as those of TRL's call do
        return prepared

    def _repeat(self, name: str, call: Callable) -> Callable:
        """What a tool answered before, in the same order."""
        answers = iter([message["content"] for message in self._recorded if message["name"] == name])
        if call == self._call:
            return lambda **arguments: next(answers)

        async def repeat(**arguments):
            return next(answers)

        return repeat

    def _call(self, name: str, tool: Callable, of_environment: bool, /, **arguments: Any) -> Any:
        if self._host.stopped:  # by an error elsewhere, between two calls of one turn
            raise RuntimeError("The generation batch has ended.")
        try:
            return self._checked(self._host.limit.call(name, lambda: tool(**arguments)))
        except LimitReached as error:
            raise self._late(name, of_environment) from error

    def _start(self, name: str, tool: Callable, of_environment: bool, /, **arguments: Any) -> Any:
        coroutine = tool(**arguments)  # at once: TRL takes the error of wrong arguments from the call

        async def wait() -> Any:
            task = asyncio.ensure_future(coroutine)
            self._host.tasks.add(task)
            if self._host.stopped:
                task.cancel()
            try:
                # Unlike `wait_for`, this tells the limit from a TimeoutError of the tool's own.
                await asyncio.wait([task], timeout=self._host.limit.seconds)
                if not task.done():
                    raise self._late(name, of_environment)
                return self._checked(task.result())
            finally:
                task.cancel()  # nothing happens to a task that is done
                self._host.tasks.discard(task)

        return wait()

    def _late(self, name: str, of_environment: bool) -> TimeoutError:
        """What the model is told of a call that took too long; an environment cannot be used after one."""
        self._host.count("timeouts")
        message = f"{name} did not answer within {self._host.limit.seconds:g} seconds"
        if of_environment:
            self.environment_error = message
        return TimeoutError(f"{message}.")

    def _checked(self, result: Any) -> Any:
        parts = result if isinstance(result, list) else []
        self.returned_image |= any(isinstance(part, dict) and part.get("type") == "image" for part in parts)
        if self.returned_image:
            raise ValueError(NO_TOOL_IMAGES)
        return result
