"""Adapters of peft: a folder or a Hub repository that holds what was trained on top of another model."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In a folder of a model: what decides its completions, and nothing that an evaluation or a training writes beside it.
MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*.json", "chat_template*")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its `max_lora_rank` may be


def base_of(model: str) -> str | None:
    """The model that an adapter was trained on; `None` where `model` is a model itself."""
    settings = _settings_of(model)
    return None if settings is None else settings["base_model_name_or_path"]


def rank_of(model: str) -> int:
    """The smallest `max_lora_rank` of vLLM that holds an adapter; its largest where none does, which vLLM refuses."""
    settings = _settings_of(model)
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    return next((each for each in VLLM_RANKS if each >= rank), VLLM_RANKS[-1])


def _settings_of(model: str) -> dict[str, Any] | None:
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(model)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def files_stamp(folder: str | Path, patterns: Sequence[str] = MODEL_FILES) -> str | None:
    """A text that changes with the names, sizes and times of the files in a folder; `None` where there is none."""
    if not Path(folder).is_dir():
        return None  # a name on the Hub
    found = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    facts = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def model_stamp(model: str) -> str | None:
    """`files_stamp` of a model, and of the base of an adapter; `None` where both have names on the Hub."""
    stamps = [files_stamp(each) for each in (model, base_of(model)) if each is not None]
    return ", ".join(filter(None, stamps)) or None


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model or an adapter, which is small: the first to find out that there is no such model."""
    from transformers import AutoTokenizer

    try:
        try:
            return AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError):
            base = base_of(model)  # an adapter may have been saved without it
            if base is None:
                raise
            return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of {model!r} cannot be loaded; is it a folder or a Hub name? {error}"
        ) from error


def merged(model: str, base: str, **arguments: Any) -> Any:
    """The model that an adapter makes of its base.

    Raises:
        ImportError: peft is missing.
        ValueError: the base is not there.
    """
    try:
        from peft import AutoPeftModelForCausalLM
    except ImportError as error:
        raise ImportError(
            f"{model!r} is an adapter, for which peft is needed ({error}). Install it with: pip install peft."
        ) from error
    try:
        return AutoPeftModelForCausalLM.from_pretrained(model, **arguments).merge_and_unload()
    except OSError as error:
        raise ValueError(
            f"{model!r} is an adapter of {base!r}, which cannot be loaded ({error}). Put the base where "
            "adapter_config.json says, or merge the adapter where the base is: docs/serving.md."
        ) from error
