"""Checks of a dataset: its kind, its columns and its rows."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from .reward_checks import REWARD_ARGUMENTS

NO_IMAGES = (
    "Images are not supported in training: a tree branches text prefixes. Remove the 'image'/'images' columns, or "
    "train this model with TRL's GRPOTrainer."
)

DIFFERENT_PROMPTS = (
    "`reset` of the environment {name} gave different prompts for one row: {prompts}. A tree has one question, so "
    "`reset` must depend on its arguments alone. Give the dataset a column that decides the task, for example `seed`, "
    "and use it: `def reset(self, seed, **kwargs): self.rng = random.Random(seed)`."
)


def check_dataset(dataset: Any, args: GRPOConfig, environment_factory: Any) -> None:
    """Raise where the dataset to train on is none, lacks a column or has too few rows."""
    if dataset is None and environment_factory:
        return  # TRL makes rows of its own
    if dataset is None:
        raise ValueError("`train_dataset` is required; it must have a column 'prompt'.")
    if isinstance(dataset, str):
        raise TypeError(
            f"`train_dataset` is {dataset!r}; it must be a dataset, not its name. Load it, for example "
            "`load_dataset('json', data_files='questions.jsonl', split='train')`."
        )
    if isinstance(dataset, dict):
        splits = list(dataset)
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__} with the splits {', '.join(map(str, splits)) or 'none'}. "
            f"Give one of them, for example `dataset[{(splits or ['train'])[0]!r}]`, or load one: "
            f"`load_dataset(..., split={(splits or ['train'])[0]!r})`."
        )
    columns = columns_of(dataset)
    if columns is not None and "prompt" not in columns and not environment_factory:
        raise ValueError(
            f"`train_dataset` has no column 'prompt' (it has: {', '.join(map(str, columns)) or 'none'}). Rename the "
            "question's column, for example `dataset.rename_column('question', 'prompt')`."
        )
    if columns is not None and args.path_filter == "pmi" and args.answer_column not in columns:
        raise ValueError(
            f"`train_dataset` has no column '{args.answer_column}' (it has: {', '.join(map(str, columns))}), but "
            "`path_filter='pmi'` asks how likely the right answer is. Name the column that holds it in "
            "`answer_column`, or use `path_filter='advantage'`."
        )
    if columns is not None and {"image", "images"} & set(columns):
        raise ValueError(NO_IMAGES)
    # TRL drops an incomplete batch, and so would end at once without a word.
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(dataset, "__len__") and len(dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, but {prompts} prompts are generated for at a time "
            f"(`generation_batch_size` {args.generation_batch_size} / {args.num_generations} trajectories), so that "
            "no batch could be filled. Give more rows, or lower `per_device_train_batch_size` or "
            "`steps_per_generation`."
        )


def check_columns(train_dataset: Any, eval_dataset: Any, args: GRPOConfig) -> None:
    """`refuse_columns`, of all datasets."""
    if args.remove_unused_columns:  # then reward functions get no column at all
        return
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    for name, dataset in (("train_dataset", train_dataset), *(("eval_dataset", each) for each in evaluation.values())):
        refuse_columns(columns_of(dataset) or [], name)


def refuse_columns(columns: Iterable[str], dataset: str) -> None:
    """Raise where a column would replace, or be replaced by, what reward functions get from the trainer."""
    for column in columns:
        if column in REWARD_ARGUMENTS:
            raise ValueError(
                f"`{dataset}` has a column '{column}', but reward functions get their `{column}` from the trainer. "
                f"Rename it, for example `dataset.rename_column('{column}', 'dataset_{column}')`."
            )


def check_rows(rows: list[dict[str, Any]], tools: Sequence[Any] = (), environments: Any = None) -> None:
    """Raise where a row has no prompt that can be continued; streamed rows are seen here first.

    Args:
        rows: dataset rows.
        tools: with any, prompts are messages.
        environments: with any, they may make the prompt.
    """
    if isinstance(rows, dict):
        raise TypeError(
            f"`rows` is one row (with {', '.join(map(str, rows))}); give a list of rows, for example `[row]`."
        )
    for row in rows:
        if {"image", "images"} & row.keys():
            raise ValueError(NO_IMAGES)
        refuse_columns(row, "train_dataset")
        prompt = row.get("prompt")
        if isinstance(prompt, str) and not tools:
            continue
        if isinstance(prompt, str):
            raise ValueError(
                f"The column 'prompt' of `train_dataset` holds the text {prompt!r}, but tools need messages, which "
                "the chat template renders with them. Give [{'role': 'user', 'content': ...}]."
            )
        if prompt is None and environments is not None:
            continue
        if not (prompt and isinstance(prompt, list) and all(_is_message(message) for message in prompt)):
            raise ValueError(
                f"The column 'prompt' of `train_dataset` holds {prompt!r}; a prompt must be text or a list of "
                "messages, for example 'What is 3 + 4?' or [{'role': 'user', 'content': 'What is 3 + 4?'}]."
            )
        contents = [message.get("content") for message in prompt]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(part.get("type") == "image" for part in parts):
            raise ValueError(NO_IMAGES)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and "role" in message and bool({"content", "tool_calls"} & message.keys())


def columns_of(dataset: Any) -> list[str] | None:
    """What its rows have, which a transform (`with_transform`) may make of other columns; None where nobody knows."""
    if isinstance(dataset, Dataset) and len(dataset) and dataset.format["type"] == "custom":
        return list(dataset[0])
    return getattr(dataset, "column_names", None)


def first_row(dataset: Any) -> dict[str, Any] | None:
    """The first row of a dataset that can be looked at without consuming it."""
    return dataset[0] if isinstance(dataset, Dataset) and len(dataset) else None
