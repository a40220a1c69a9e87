"""Score leaves while trees grow: every reward function sees every leaf once.

Functions get the arguments that TRL gives them (`prompts`, `completions`, `completion_ids`, the other columns,
`trainer_state`, `log_extra`, `log_metric`); a call covers the leaves that finished together, so its lists are shorter
than the generation batch. What a function logs is put back into the order of the rows.

Synchronous functions and reward models run at once; asynchronous ones run on TRL's event loop while trees go on
growing.
"""

import asyncio
import concurrent.futures
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from trl.data_utils import apply_chat_template, is_conversational
from trl.trainer.utils import is_async_callable


class RewardFunctionError(RuntimeError):
    """A reward function raised or returned something that is not one number (or None) per completion."""


@dataclass
class _Call:
    """Leaves that are scored together."""

    rows: list[int]
    arguments: dict[str, Any]
    pending: dict[concurrent.futures.Future, int] = field(default_factory=dict)  # future to reward function


class RewardScorer:
    """Scores the leaves of one generation batch.

    Args:
        inputs: dataset rows, one per leaf: G equal rows per tree, trees in order.
        leaves_per_tree: G.
        reward_funcs, reward_names, reward_processing_classes: as in TRL's trainer.
        success_index: the reward function whose value is the success of a leaf.
        decode: completion token ids (one list per leaf) and their rows to completions as TRL passes them on.
        shared_arguments: arguments that do not depend on rows (`trainer_state`).
        event_loop: where asynchronous functions run; needed only if there are any.
        chat_template_kwargs: passed to the chat template of reward models.
        device: of the reward models.
    """

    def __init__(
        self,
        *,
        inputs: Sequence[dict[str, Any]],
        leaves_per_tree: int,
        reward_funcs: Sequence[Callable | nn.Module],
        reward_names: Sequence[str],
        reward_processing_classes: Sequence[Any],
        success_index: int,
        decode: Callable[[list[list[int]], list[int]], list],
        shared_arguments: dict[str, Any],
        event_loop: asyncio.AbstractEventLoop | None,
        chat_template_kwargs: dict[str, Any],
        device: torch.device,
    ):
        self.rewards = np.full((len(inputs), len(reward_funcs)), np.nan, dtype=np.float32)
        self.completions: list = [None] * len(inputs)
        self.extra_columns: dict[str, list] = {}
        self.metrics: dict[str, list[tuple[float, int]]] = {}  # value and number of leaves of each call
        self._inputs = inputs
        self._leaves_per_tree = leaves_per_tree
        self._reward_funcs = reward_funcs
        self._reward_names = reward_names
        self._reward_processing_classes = reward_processing_classes
        self._success_index = success_index
        self._decode = decode
        self._shared_arguments = shared_arguments
        self._event_loop = event_loop
        self._chat_template_kwargs = chat_template_kwargs
        self._device = device
        self._calls: list[_Call] = []

    def submit(self, leaves: Sequence[tuple[int, int, list[int]]]) -> None:
        rows = [tree * self._leaves_per_tree + number for tree, number, _ in leaves]
        completion_ids = [ids for _, _, ids in leaves]
        completions = self._decode(completion_ids, rows)
        inputs = [self._inputs[row] for row in rows]
        for row, completion in zip(rows, completions, strict=True):
            self.completions[row] = completion
        columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
        call = _Call(
            rows=rows,
            arguments={
                "prompts": [row["prompt"] for row in inputs],
                "completions": completions,
                "completion_ids": completion_ids,
                **{key: [row[key] for row in inputs] for key in columns},
                **self._shared_arguments,
                "log_extra": lambda column, values: self._log_extra(rows, column, values),
                "log_metric": lambda name, value: self.metrics.setdefault(name, []).append((value, len(rows))),
            },
        )
        # Asynchronous functions first: they run while the synchronous ones compute.
        for index, func in enumerate(self._reward_funcs):
            if not isinstance(func, nn.Module) and is_async_callable(func):
                future = asyncio.run_coroutine_threadsafe(_await(func, call.arguments), self._event_loop)
                call.pending[future] = index
        self._calls.append(call)
        for index, func in enumerate(self._reward_funcs):
            if isinstance(func, nn.Module):
                self._record(call, index, lambda index=index: self._run_model(index, call.arguments))
            elif not is_async_callable(func):
                self._record(call, index, lambda func=func: func(**call.arguments))

    def collect(self, wait: bool) -> list[tuple[int, int, float]]:
        while True:
            for call in self._calls:
                for future in [future for future in call.pending if future.done()]:
                    self._record(call, call.pending.pop(future), future.result)
            complete = [call for call in self._calls if not call.pending]
            self._calls = [call for call in self._calls if call.pending]
            if complete or not wait or not self._calls:
                break
            # One of several functions may finish first, which completes no leaf yet.
            futures = [future for call in self._calls for future in call.pending]
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
        rows = [row for call in complete for row in call.rows]
        success = np.clip(self.rewards[rows, self._success_index], 0, 1).tolist()
        return [(*divmod(row, self._leaves_per_tree), value) for row, value in zip(rows, success, strict=True)]

    def cancel(self) -> None:
        for call in self._calls:
            for future in call.pending:
                future.cancel()
        self._calls = []

    def _record(self, call: _Call, index: int, compute: Callable[[], Sequence[float | None]]) -> None:
        name = self._reward_names[index]
        try:
            values = compute()
        except Exception as error:
            raise RewardFunctionError(
                f"The reward function '{name}' raised {type(error).__name__}: {error}\n"
                f"while scoring {len(call.rows)} completions, the first for the prompt "
                f"{call.arguments['prompts'][0]!r}.\n"
                f"Original traceback:\n{''.join(traceback.format_exception(error))}"
            ) from error
        try:
            if isinstance(values, (str, dict)):  # iterable, but not over rewards
                raise TypeError
            numbers = [math.nan if value is None else float(value) for value in values]
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardFunctionError(
                f"The reward function '{name}' returned {values!r}; it must return a list with one number or None "
                "per completion."
            ) from error
        if len(numbers) != len(call.rows):
            raise RewardFunctionError(
                f"The reward function '{name}' returned {len(numbers)} rewards, but {len(call.rows)} were expected: "
                "one per completion."
            )
        if index == self._success_index:
            for value in numbers:
                if not (math.isnan(value) or -1e-6 <= value <= 1 + 1e-6):
                    raise RewardFunctionError(
                        f"The reward function '{name}' returned {value}, but it is the success of a completion and "
                        "must lie in [0, 1]. Rescale it, or name another reward function in `success_reward` "
                        f"(available: {', '.join(self._reward_names)})."
                    )
        self.rewards[call.rows, index] = numbers

    def _run_model(self, index: int, arguments: dict[str, Any]) -> list[float]:
        """Score with a sequence-classification model: its first logit."""
        prompts, completions = arguments["prompts"], arguments["completions"]
        processing_class = self._reward_processing_classes[index]
        if is_conversational({"prompt": prompts[0]}):
            texts = [
                apply_chat_template({"messages": prompt + completion}, processing_class, **self._chat_template_kwargs)[
                    "text"
                ]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        batch = processing_class(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(self._device)
        with torch.inference_mode():
            return self._reward_funcs[index](**batch).logits[:, 0].float().tolist()

    def _log_extra(self, rows: list[int], column: str, values: Sequence[Any]) -> None:
        cells = self.extra_columns.setdefault(column, [None] * len(self._inputs))
        if len(values) != len(rows):
            raise ValueError(f"log_extra('{column}') got {len(values)} values for {len(rows)} completions.")
        for row, value in zip(rows, values, strict=True):
            cells[row] = value


async def _await(func: Callable, arguments: dict[str, Any]) -> Sequence[float | None]:
    return await func(**arguments)
