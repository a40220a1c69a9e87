"""What a person sees of a training run: one line of words per log step, and a bar with the figures that matter.

A person is watching where standard output is a terminal: there the words take the place of the dictionary of all
metrics. In a file, they stand beside it. Trackers get all metrics either way.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler


def in_words(logs: dict[str, Any], trees: int) -> str | None:
    """What the trees of a log step say; `None` where none were grown."""
    if logs.get("tree/effective_rate") is None:
        return None
    words = [f"{round(logs['tree/effective_rate'] * trees)} of {trees} trees teach", f"{logs['tree/depth']:.1f} steps"]
    if logs.get("tree/branch_position") is not None:
        words.append(f"branched at {logs['tree/branch_position']:.0%}")
    if logs.get("tree/average_success") is not None:
        success = f"success {logs['tree/average_success']:.2f}"
        if logs.get("tree/initial_success") is not None:
            success += f", initial rollouts {logs['tree/initial_success']:.2f}"
        words.append(success)
    return "; ".join(words)


class TreeProgress(ProgressCallback):
    """The bar of `transformers`, with figures behind it.

    Args:
        trees: how many trees the log step that is being logged covers.
        max_str_len: see `ProgressCallback`.
    """

    def __init__(self, trees: Callable[[], int], max_str_len: int = 100):
        super().__init__(max_str_len)
        self._trees = trees
        self._since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._since = time.monotonic()

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self._since = time.monotonic()  # nothing is trained on meanwhile

    def on_log(self, args, state, control, logs=None, **kwargs):
        words = in_words(logs, self._trees())
        if words is None or not sys.stdout.isatty():
            super().on_log(args, state, control, logs=logs, **kwargs)
        if words is None or self.training_bar is None:
            return
        self.training_bar.write(f"Step {state.global_step}: {words}")
        now = time.monotonic()
        tokens = logs["tree/generated_tokens"] * self._trees() / (now - self._since)
        self._since = now
        figures = [f"{logs['tree/effective_rate']:.0%} effective", f"{tokens:,.0f} tokens/s"]
        if logs.get("reward") is not None:
            figures.insert(0, f"reward {logs['reward']:.2f}")
        self.training_bar.set_postfix_str(", ".join(figures))


class TreePrinter(PrinterCallback):
    """The dictionary that `transformers` prints under `disable_tqdm=True`, and the words below it."""

    def __init__(self, trees: Callable[[], int]):
        super().__init__()
        self._trees = trees

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        words = in_words(logs, self._trees())
        if words is not None and state.is_local_process_zero:
            print(f"Step {state.global_step}: {words}", flush=True)


def show_trees(handler: CallbackHandler, trees: Callable[[], int]) -> None:
    """Put them in the place of those two classes of `transformers`; classes of a user's own are left alone."""
    for place, callback in enumerate(handler.callbacks):
        if type(callback) is ProgressCallback:
            handler.callbacks[place] = TreeProgress(trees, callback.max_str_len)
        elif type(callback) is PrinterCallback:
            handler.callbacks[place] = TreePrinter(trees)
