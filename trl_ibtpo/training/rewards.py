"""Score leaves while trees grow: every reward function sees every leaf once.

Functions get the arguments that TRL gives them (`prompts`, `completions`, `completion_ids`, the other columns,
`trainer_state`, `log_extra`, `log_metric`); a call covers the leaves that finished together, so its lists are shorter
than the generation batch. What a function logs is put back into the order of the rows.

Synchronous functions and reward models run at once, or, where no tree waits for rewards, when nothing is left to
sample; asynchronous ones run on TRL's event loop while trees go on growing. Both kinds of function can be given a time
limit; what they do not score in time is unknown, as if they had returned None. Reward models are not limited.
"""

import asyncio
import concurrent.futures
import textwrap
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging
from trl.trainer.utils import is_async_callable

from .reward_calls import RewardFunctionError, call_async, call_function, limited, score_with_model
from .success import Success
from .time_limit import TimeLimitExceeded

logger = logging.get_logger(__name__)


@dataclass
class _Call:
    """Leaves that are scored together."""

    leaves: list[tuple[int, int]]
    rows: list[int]
    arguments: dict[str, Any]
    pending: dict[concurrent.futures.Future, int] = field(default_factory=dict)  # future to reward function
    postponed: bool = False  # whether synchronous functions have yet to see them
    submitted: float = field(default_factory=time.monotonic)


class RewardScorer:
    """Scores the leaves of one generation batch.

    Args:
        inputs: dataset rows, one per leaf: G equal rows per tree, trees in order.
        prompts: one per leaf, with what its environment has added; those of the rows where there is none.
        environments: one per leaf, where there are any.
        failed_rows: says of which leaves the environment is broken: no function sees these, they have no reward.
        leaves_per_tree: G.
        uneven: whether trees differ in size, G on average; then `arrange` puts the leaves into order in the end.
        reward_funcs, reward_names, reward_processing_classes: as in TRL's trainer.
        success: how right a leaf is, out of its rewards.
        decode: completion token ids (one list per leaf) and their rows to completions as TRL passes them on.
        shared_arguments: arguments that do not depend on rows (`trainer_state`).
        event_loop: where asynchronous functions run; needed only if there are any.
        chat_template_kwargs: passed to the chat template of reward models.
        device: of the reward models.
        timeout: seconds that one call of a function may take; reward models are not limited.
        postpone: leave synchronous functions and models until somebody waits for a reward: generation does not stand
            still meanwhile, and without a time limit each of them is called once.
    """

    patience = 30.0  # seconds beyond the limit after which an event loop that did not keep it counts as stuck

    def __init__(
        self,
        *,
        inputs: Sequence[dict[str, Any]],
        prompts: Sequence[Any] | None = None,
        environments: Sequence[Any] | None = None,
        failed_rows: Callable[[], set[int]] = set,
        leaves_per_tree: int,
        reward_funcs: Sequence[Callable | nn.Module],
        reward_names: Sequence[str],
        reward_processing_classes: Sequence[Any],
        success: Success,
        decode: Callable[[list[list[int]], list[int]], list],
        shared_arguments: dict[str, Any],
        event_loop: asyncio.AbstractEventLoop | None,
        chat_template_kwargs: dict[str, Any],
        device: torch.device,
        timeout: float | None = None,
        postpone: bool = False,
        uneven: bool = False,
    ):
        self.rewards = np.full((len(inputs), len(reward_funcs)), np.nan, dtype=np.float32)
        self.timed_out = np.zeros(self.rewards.shape, dtype=bool)  # not scored within the limit
        self.completions: list = [None] * len(inputs)  # which reward functions may have edited
        self.decoded: list = [None] * len(inputs)  # the same as text, before
        self.extra_columns: dict[str, list] = {}
        self.metrics: dict[str, list[tuple[float, int]]] = {}  # value and number of leaves of each call
        self._inputs, self._environments = inputs, environments
        self._prompts = prompts
        self._failed_rows = failed_rows
        self._leaves_per_tree = leaves_per_tree
        # Place of each leaf in the lists above, as they came; without `uneven`, trees are in order from the start.
        self._places: dict[tuple[int, int], int] | None = {} if uneven else None
        self._reward_funcs = reward_funcs
        self._reward_names = reward_names
        self._reward_processing_classes = reward_processing_classes
        self._success = success
        self._decode = decode
        self._shared_arguments = shared_arguments
        self._event_loop = event_loop
        self._chat_template_kwargs = chat_template_kwargs
        self._device = device
        self._timeout = timeout
        self._postpone = postpone
        self._calls: list[_Call] = []

    def submit(self, leaves: Sequence[tuple[int, int, list[int]]]) -> None:
        # Any of the equal rows of a tree, where it has more leaves than rows.
        sources = [tree * self._leaves_per_tree + number % self._leaves_per_tree for tree, number, _ in leaves]
        rows = sources
        if self._places is not None:
            rows = [self._places.setdefault((tree, number), len(self._places)) for tree, number, _ in leaves]
        completion_ids = [ids for _, _, ids in leaves]
        completions = self._decode(completion_ids, sources)
        inputs = [self._inputs[source] for source in sources]
        if self._places is not None:
            inputs = deepcopy(inputs)  # functions may edit them, and another leaf may need them
        for row, completion in zip(rows, completions, strict=True):
            self.completions[row], self.decoded[row] = completion, repr(completion)
        failed = self._failed_rows()
        kept = [place for place, row in enumerate(rows) if row not in failed]
        if len(kept) < len(rows):  # no function sees these
            gone = [place for place, row in enumerate(rows) if row in failed]
            self._calls.append(_Call([leaves[at][:2] for at in gone], [rows[at] for at in gone], arguments={}))
            if not kept:
                return
            leaves, rows, completion_ids, inputs = (
                [each[at] for at in kept] for each in (leaves, rows, completion_ids, inputs)
            )
        call = self._make_call([(tree, number) for tree, number, _ in leaves], rows, inputs, completion_ids)
        # Asynchronous functions first: they run while the synchronous ones compute.
        for index, func in enumerate(self._reward_funcs):
            if not isinstance(func, nn.Module) and is_async_callable(func):
                coroutine = call_async(func, call.arguments, self._timeout)
                future = asyncio.run_coroutine_threadsafe(coroutine, self._event_loop)
                call.pending[future] = index
        self._calls.append(call)
        call.postponed = self._postpone
        if not call.postponed:
            self._run_synchronous(call)

    def _make_call(
        self,
        leaves: list[tuple[int, int]],
        rows: list[int],
        inputs: Sequence[dict[str, Any]],
        completion_ids: list[list[int]],
    ) -> _Call:
        columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
        return _Call(
            leaves=leaves,
            rows=rows,
            arguments={
                **{key: [row[key] for row in inputs] for key in columns},
                "prompts": [row["prompt"] for row in inputs]
                if self._prompts is None
                else [self._prompts[row] for row in rows],
                "completions": [self.completions[row] for row in rows],
                "completion_ids": completion_ids,
                **self._shared_arguments,
                **({} if self._environments is None else {"environments": [self._environments[row] for row in rows]}),
                "log_extra": lambda column, values: self._log_extra(rows, column, values),
                "log_metric": lambda name, value: self.metrics.setdefault(name, []).append((value, len(rows))),
            },
        )

    def _run_synchronous(self, call: _Call) -> None:
        for index, func in enumerate(self._reward_funcs):
            if isinstance(func, nn.Module):
                compute = partial(
                    score_with_model,
                    func,
                    self._reward_processing_classes[index],
                    call.arguments,
                    self._chat_template_kwargs,
                    self._device,
                )
                self._record(call, index, compute)
            elif not is_async_callable(func):
                compute = partial(func, **call.arguments)
                self._record(call, index, limited(self._reward_names[index], compute, self._timeout))

    def _run_postponed(self) -> None:
        """Let synchronous functions see what they have not seen, in one call unless a time limit may cut it short."""
        postponed = [call for call in self._calls if call.postponed]
        if self._timeout is None and postponed:
            ids_of = {
                row: ids
                for call in postponed
                for row, ids in zip(call.rows, call.arguments["completion_ids"], strict=True)
            }
            rows = sorted(ids_of)
            leaves = [divmod(row, self._leaves_per_tree) for row in rows]
            inputs = [self._inputs[row] for row in rows]
            self._run_synchronous(self._make_call(leaves, rows, inputs, [ids_of[row] for row in rows]))
        for call in postponed:
            if self._timeout is not None:
                self._run_synchronous(call)
            call.postponed = False

    def collect(self, wait: bool) -> list[tuple[int, int, float]]:
        if wait:
            self._run_postponed()
        while True:
            for call in self._calls:
                for future in [future for future in call.pending if future.done()]:
                    self._record(call, call.pending.pop(future), future.result)
            complete = [call for call in self._calls if not call.pending and not call.postponed]
            self._calls = [call for call in self._calls if call.pending or call.postponed]
            if complete or not wait or not self._calls:
                break
            # One of several functions may finish first, which completes no leaf yet.
            futures = [future for call in self._calls for future in call.pending]
            self._wait(futures)
        rows = [row for call in complete for row in call.rows]
        values = self._success.values(self.rewards[rows]).tolist()
        leaves = [leaf for call in complete for leaf in call.leaves]
        return [(*leaf, value) for leaf, value in zip(leaves, values, strict=True)]

    def arrange(self, sizes: Sequence[int]) -> None:
        """Put all leaves into the order of trees, and those of a tree into their own, now that sizes are known."""
        if self._places is None:
            return
        leaves = [(tree, number) for tree, size in enumerate(sizes) for number in range(size)]
        inputs = [self._inputs[tree * self._leaves_per_tree] for tree, _ in leaves]
        self.keep([self._places[leaf] for leaf in leaves])
        self._inputs = inputs

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, and put these into this order; nothing is pending by now."""
        self.rewards, self.timed_out = self.rewards[rows], self.timed_out[rows]
        self.completions, self.decoded = ([each[row] for row in rows] for each in (self.completions, self.decoded))
        self.extra_columns = {name: [cells[row] for row in rows] for name, cells in self.extra_columns.items()}
        self._inputs = [self._inputs[row] for row in rows]

    def warn_of_timeouts(self) -> None:
        """Name each function that left completions unscored because of its time limit."""
        for index in np.flatnonzero(self.timed_out.any(axis=0)):
            rows = np.flatnonzero(self.timed_out[:, index])
            said = [row["prompt"] for row in self._inputs] if self._prompts is None else self._prompts
            prompts = [repr(said[row]) for row in rows]
            logger.warning(
                f"The reward function '{self._reward_names[index]}' did not answer within `reward_timeout` "
                f"({self._timeout} seconds) for {len(rows)} of {len(self._inputs)} completions; "
                f"prompts: {len(set(prompts))}, the first {textwrap.shorten(prompts[0], 120)}. They count as None."
            )

    def cancel(self) -> None:
        for call in self._calls:
            for future in call.pending:
                future.cancel()
        self._calls = []

    def _wait(self, futures: list[concurrent.futures.Future]) -> None:
        """Wait until one of `futures` is done; each ends by its limit, unless something blocks the event loop."""
        longest = None
        if self._timeout is not None:
            longest = max(0, self._calls[0].submitted + self._timeout + self.patience - time.monotonic())
        done, _ = concurrent.futures.wait(futures, longest, return_when=concurrent.futures.FIRST_COMPLETED)
        if not done:
            names = {self._reward_names[index] for call in self._calls for index in call.pending.values()}
            raise RewardFunctionError(
                f"`reward_timeout` is {self._timeout}, but {' or '.join(map(repr, sorted(names)))} holds up the event "
                "loop: code inside an `async def` that does not `await` cannot be interrupted. Make it a plain `def`, "
                "which can, or await what it waits for."
            )

    def _record(self, call: _Call, index: int, compute: Callable[[], Sequence[float | None]]) -> None:
        try:
            numbers = call_function(self._reward_names[index], compute, call.arguments, len(call.rows))
        except TimeLimitExceeded:
            self.timed_out[call.rows, index] = True
        else:
            self.rewards[call.rows, index] = numbers

    def _log_extra(self, rows: list[int], column: str, values: Sequence[Any]) -> None:
        cells = self.extra_columns.setdefault(column, [None] * len(self._inputs))
        if len(values) != len(rows):
            raise ValueError(f"log_extra('{column}') got {len(values)} values for {len(rows)} completions.")
        for row, value in zip(rows, values, strict=True):
            cells[row] = value
