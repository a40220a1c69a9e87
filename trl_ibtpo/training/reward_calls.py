"""One call of one reward function or reward model: its time limit, its errors, and what it may return."""

import asyncio
import math
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from trl.data_utils import apply_chat_template, is_conversational

from .time_limit import TimeLimitExceeded, call_within, can_interrupt

LARGEST = float(np.finfo(np.float32).max)  # TRL computes with rewards of this precision


class RewardFunctionError(RuntimeError):
    """A reward function raised or returned something that is not one number (or None) per completion.

    Args:
        message: what is wrong.
        details: lines that end the text of the error, such as a traceback.
    """

    def __init__(self, message: str, details: str = ""):
        super().__init__(message + details)
        self.details = details


def call_function(
    name: str, compute: Callable[[], Sequence[float | None]], arguments: dict[str, Any], count: int
) -> list[float]:
    """One number per completion, NaN where a reward function gives none.

    Args:
        name: of the function.
        compute: calls it.
        arguments: that it gets, for a message.
        count: how many completions it scores.

    Raises:
        RewardFunctionError: where it raises, or returns something else.
        TimeLimitExceeded: where it takes too long.
    """
    try:
        values = compute()
    except Exception as error:
        raise RewardFunctionError(
            f"The reward function '{name}' raised {type(error).__name__}: {error}\n"
            f"while scoring {count} completions, the first for the prompt "
            f"{arguments['prompts'][0]!r}.{_hint(error, arguments['completions'][0])}\n",
            details=f"Original traceback:\n{''.join(traceback.format_exception(error))}",
        ) from error
    try:
        if isinstance(values, (str, dict)):  # iterable, but not over rewards
            raise TypeError
        numbers = [_number(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RewardFunctionError(
            f"The reward function '{name}' returned {values!r}; it must return a list with one number or None "
            "per completion."
        ) from error
    if len(numbers) != count:
        raise RewardFunctionError(
            f"The reward function '{name}' returned {len(numbers)} rewards, but {count} were expected: "
            "one per completion."
        )
    for value in numbers:
        if abs(value) > LARGEST:
            raise RewardFunctionError(
                f"The reward function '{name}' returned {value}; a reward must be a finite number, or None where "
                "there is none."
            )
    return numbers


def limited(name: str, compute: Callable[[], Any], timeout: float | None) -> Callable[[], Any]:
    """A call of the synchronous function `name` with its time limit in seconds, if there is one."""
    if timeout is None:
        return compute
    if not can_interrupt():
        raise ValueError(
            f"`reward_timeout` is {timeout}, but the reward function '{name}' cannot "
            "be interrupted here: that takes POSIX signals, which only reach the main thread. Train in the main "
            "thread, make the function `async`, or set `reward_timeout=None`."
        )
    return partial(call_within, timeout, compute)


def score_with_model(
    model: nn.Module,
    processing_class: Any,
    arguments: dict[str, Any],
    chat_template_kwargs: dict[str, Any],
    device: torch.device,
) -> list[float]:
    """Score with a sequence-classification model: its first logit."""
    prompts, completions = arguments["prompts"], arguments["completions"]
    if is_conversational({"prompt": prompts[0]}):
        texts = [
            apply_chat_template({"messages": prompt + completion}, processing_class, **chat_template_kwargs)["text"]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    else:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batch = processing_class(
        text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    ).to(device)
    with torch.inference_mode():
        return model(**batch).logits[:, 0].float().tolist()


def _number(value: Any) -> float:
    if isinstance(value, str):  # `float` would read it
        raise TypeError
    return math.nan if value is None else float(value)


def _hint(error: Exception, completion: Any) -> str:
    """For the commonest mistake of all: a function written for chat messages or for text gets the other."""
    if not isinstance(error, (TypeError, AttributeError)):
        return ""
    if isinstance(completion, str):
        return " Completions are text here, since prompts are: `completion`, not `completion[0]['content']`."
    return " Completions are lists of messages here, since prompts are: `completion[0]['content']` is the text."


async def call_async(func: Callable, arguments: dict[str, Any], timeout: float | None) -> Sequence[float | None]:
    """What an asynchronous function returns, within its time limit in seconds if there is one."""
    task = asyncio.ensure_future(func(**arguments))
    try:
        # Unlike `wait_for`, this tells the limit from a TimeoutError of the function's own.
        await asyncio.wait([task], timeout=timeout)
        if not task.done():
            raise TimeLimitExceeded
        return task.result()
    finally:
        task.cancel()  # where the limit or the scorer ended the wait; nothing happens to a task that is done
