"""Checks of the model and its tokenizer, and of what they make of a prompt."""

import os
from typing import Any

from torch import nn
from trl import GRPOConfig
from trl.data_utils import is_conversational

from ..steps import special_ids


def check_model(model: Any, args: GRPOConfig, processing_class: Any, kwargs: dict[str, Any]) -> None:
    """Raise where `model` is none, or where what goes with it cannot be found."""
    if isinstance(model, str):
        check_path("model", model)
    elif not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` is {model!r}; give the name of a model on the Hub, the path of its folder, or a loaded model, "
            "for example 'Qwen/Qwen3-1.7B-Base'."
        )
    elif not model.config._name_or_path:
        # TRL loads what is missing by the name of the model.
        if processing_class is None:
            raise ValueError(
                f"`model` is a {type(model).__name__} that was not loaded from a folder or the Hub, so its tokenizer "
                "is not known. Give it as `processing_class`."
            )
        if args.beta != 0 and kwargs.get("peft_config") is None and not hasattr(model, "peft_config"):
            raise ValueError(
                f"`beta` is {args.beta}, which needs a reference model, but `model` is a {type(model).__name__} that "
                "was not loaded from a folder or the Hub, so there is nothing to load it from. Save the model and "
                "give its path, or set `beta=0.0`."
            )


def check_path(name: str, value: str) -> None:
    """Raise where a path names no folder; of what can only be a path, the Hub's client says that it is a bad name."""
    if (value.startswith(("/", ".", "~")) or value.count("/") > 1) and not os.path.isdir(value):
        raise FileNotFoundError(
            f"`{name}` names {value!r}, which is no folder here (from {os.getcwd()!r}). Give a folder with a saved "
            "model, or a name on the Hub, for example 'Qwen/Qwen3-1.7B-Base'."
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise where a tokenizer cannot end a completion."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer's `eos_token` is None, so that no completion could end. Set it to the token that ends a "
            "text, for example `tokenizer.eos_token = '<|endoftext|>'`, and give the tokenizer as `processing_class`."
        )


def check_markers(tokenizer: Any, args: GRPOConfig) -> None:
    """Raise where a text that is looked for in completions holds a special token, of which their text has nothing."""
    special = {text for text in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))) if text.strip()}
    for name, texts in (("step_delimiter", args.step_delimiters), ("answer_marker", args.answer_marker or [])):
        for text in texts:
            if (token := next((each for each in sorted(special) if each in text), None)) is not None:
                raise ValueError(
                    f"`{name}` holds {text!r}, but {token!r} is a special token of this tokenizer, and special tokens "
                    "are left out of the text that is searched: it would never be found. Give a text that the model "
                    "writes as ordinary tokens, for example 'Final answer'."
                )


def check_template(processing_class: Any, row: dict[str, Any] | None) -> None:
    """Raise where a row holds chat messages that the tokenizer, or the processor, has no template for."""
    if processing_class.chat_template is None and row is not None and is_conversational({"prompt": row.get("prompt")}):
        name = getattr(processing_class, "name_or_path", "") or "no name"
        raise ValueError(
            f"The column 'prompt' holds chat messages, but the tokenizer ({name}) has "
            "no chat template. Set one, `tokenizer.chat_template = ...`, and give the tokenizer as "
            "`processing_class`; or make the prompts text. docs/base_models.md shows both."
        )


def check_prompt(token_ids: list[int], model: nn.Module) -> None:
    """Raise where a prompt cannot be fed to `model`."""
    if not token_ids:
        raise ValueError(
            "A 'prompt' of `train_dataset` is empty: it has no token to continue. Drop such rows, for example "
            "`dataset.filter(lambda row: row['prompt'])`."
        )
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if embeddings is not None and max(token_ids) >= embeddings:
        raise ValueError(
            f"A prompt holds the token id {max(token_ids)}, but the model has embeddings for {embeddings} tokens. "
            "Give the model's own tokenizer as `processing_class`."
        )
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    # Where rotary embeddings are scaled, the configuration may still hold the length before scaling.
    scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if positions is not None and not scaled and len(token_ids) >= positions:
        raise ValueError(
            f"A prompt has {len(token_ids)} tokens, which leaves no room for a completion: `max_position_embeddings` "
            f"of the model is {positions}. Drop rows with prompts of {positions} tokens or more from `train_dataset`, "
            "or use a model with a longer context."
        )
