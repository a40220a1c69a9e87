"""What the commands share: how arguments are read and refused, how datasets are found, and how JSON is written."""

import argparse
import glob
import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..viewing.lines import one_line

FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # to builders of `datasets`


class UsageError(Exception):
    """Arguments that are wrong by themselves, whatever the files and the machine."""


class OneLineErrors:
    """Mixed into a parser: a wrong argument is one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} ({self.prog} --help shows the arguments)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, str) and not action.default.strip():
            return f"{action.help} (default: {json.dumps(action.default)})".replace("%", "%%")
        return super()._get_help_string(action)


class Parser(OneLineErrors, argparse.ArgumentParser):
    """Options with underscores, as TRL's; hyphens are accepted too, and defaults are shown."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})

    def option(self, name: str, **kwargs: Any) -> None:
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **kwargs)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        return found


def load_named(dataset_name: str, config: str | None = None, streaming: bool = False) -> Any:
    """By name on the Hub, a file, or a folder: files that `load_dataset` knows, or what `save_to_disk` wrote."""
    import datasets

    folder = Path(dataset_name)
    if folder.suffix in FILE_KINDS:
        if not folder.is_file():
            raise FileNotFoundError(f"--dataset_name is {dataset_name!r}, which is no file here.")
        return datasets.load_dataset(
            FILE_KINDS[folder.suffix], data_files=glob.escape(dataset_name), streaming=streaming
        )
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return datasets.load_from_disk(dataset_name)
    return datasets.load_dataset(dataset_name, name=config, streaming=streaming)


def split_of(dataset: Any, name: str) -> Any:
    """One split of what `load_named` gives."""
    if not isinstance(dataset, dict):  # saved to disk without splits
        return dataset
    if name not in dataset:
        raise ValueError(f"The dataset has no split {name!r}; it has: {', '.join(dataset)}.")
    return dataset[name]


def write_json(path: str | None, value: Any) -> None:
    """Strict JSON: a figure that is not a number becomes null."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def say_written(*paths: str | Path | None) -> None:
    """Name the files that a command has written; on stderr, so that what it prints can be piped."""
    for path in paths:
        if path is not None:
            print(f"Written: {path}", file=sys.stderr, flush=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
