"""What all benchmarks share: arguments, models made on the spot, tables, rows as JSON."""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_argument("--quick", action="store_true", help="smaller sizes, same code path")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    return arguments


def report(title: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print rows of equal keys as a table, and write them as a list of flat JSON objects.

    Args:
        title: what was measured.
        rows: at least one.
        args: what `parser` parsed.
    """
    caution = " - quick: these figures mean nothing" if args.quick else ""
    table = Table()
    for key in rows[0]:
        table.add_column(key, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = Console(width=200)
    console.print(f"{title} ({platform.machine()}, {date.today()}){caution}")
    console.print(table)
    write_rows(rows, args)


def write_rows(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write rows to the file that `--json` names, if any."""
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(list(rows), indent=1) + "\n")


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


class FixedSteps:
    """Cuts completions into steps of a fixed number of tokens: random weights write no blank lines."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        return [*range(self.tokens, len(token_ids), self.tokens), len(token_ids)]


def one_in_five(tree: int, completion_ids: list[int]) -> float:
    """A success that the tokens decide."""
    return float(sum(completion_ids) % 5 == 0)


class ScriptedScorer:
    """Knows the success of a leaf at once: `success(tree, completion_ids)`."""

    def __init__(self, success: Callable[[int, list[int]], float] = one_in_five):
        self.success, self.scored = success, []

    def submit(self, leaves):
        self.scored += [(tree, leaf, self.success(tree, ids)) for tree, leaf, ids in leaves]

    def collect(self, wait):
        scored, self.scored = self.scored, []
        return scored

    def cancel(self):
        self.scored = []


def qwen3_config(layers: int, hidden: int, vocabulary: int, **options: Any):
    """A Qwen3 of the proportions of the small ones."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        **options,
    )
