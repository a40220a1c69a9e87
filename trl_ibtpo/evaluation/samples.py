"""Independent completions of questions, with vLLM or transformers.

What a question is given depends on the settings and its own number alone, not on the questions beside it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SamplingSettings:
    """What decides the completions besides the questions; a samples file belongs to one of these."""

    model: str
    engine: str = "vllm"  # or "transformers"
    num_samples: int = 4
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 20  # 0: all tokens
    max_new_tokens: int = 2048
    chat_template: bool = True  # where the tokenizer has one
    seed: int = 0

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` is {self.engine!r}; it must be one of {list(ENGINES)}.")
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"`temperature` is {self.temperature}, `top_k` {self.top_k} and `top_p` {self.top_p}; the first two "
                "must not be negative and `top_p` must lie in (0, 1]."
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"`temperature` is 0, so that all {self.num_samples} completions of a question would be the same. "
                "Take one sample, or a positive temperature."
            )


# index of the question, then text and number of tokens of each of its completions
Sampled = tuple[int, list[str], list[int]]


def sample_with_vllm(
    settings: SamplingSettings, prompt_ids: dict[int, list[int]], engine_arguments: dict[str, Any]
) -> Iterator[Sampled]:
    """All questions at once in one engine; each is yielded as soon as its completions are finished."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from ..engines.vllm_cpu import runs_on_cpu

    length = max(map(len, prompt_ids.values())) + settings.max_new_tokens
    if runs_on_cpu():  # it cannot take back a seeded sample after one part of a prompt
        engine_arguments = {
            **engine_arguments,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(2048, length),
        }
    engine = LLM(model=settings.model, max_model_len=length, **engine_arguments).llm_engine
    for index, ids in prompt_ids.items():
        parameters = SamplingParams(
            n=settings.num_samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=settings.max_new_tokens,
            seed=question_seed(settings.seed, index),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(index), {"prompt_token_ids": ids}, parameters)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                texts = [completion.text for completion in output.outputs]
                yield int(output.request_id), texts, [len(completion.token_ids) for completion in output.outputs]


def sample_with_transformers(
    settings: SamplingSettings, prompt_ids: dict[int, list[int]], engine_arguments: dict[str, Any]
) -> Iterator[Sampled]:
    """One question at a time, all its completions in one batch."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = load_tokenizer(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto", device_map="auto", **engine_arguments)
    model.eval()
    stop_ids = model.generation_config.eos_token_id or tokenizer.eos_token_id
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids or [])
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop_ids or [0])[0]
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    # Replaced rather than passed on, since `generate` fills what is not set from the checkpoint's own.
    model.generation_config = GenerationConfig(
        do_sample=settings.temperature > 0,
        num_return_sequences=settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stop_ids or None,
        pad_token_id=pad_id,
        **(sampling if settings.temperature > 0 else {}),
    )
    for index, ids in prompt_ids.items():
        torch.manual_seed(question_seed(settings.seed, index))
        input_ids = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            sequences = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        completions = [_until_stop(row, stop_ids) for row in sequences[:, len(ids) :].tolist()]
        yield index, tokenizer.batch_decode(completions, skip_special_tokens=True), [len(row) for row in completions]


ENGINES = {"vllm": sample_with_vllm, "transformers": sample_with_transformers}


def question_seed(seed: int, index: int) -> int:
    """Seed of one question, so that what it is given does not depend on what was sampled before it."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Without the padding behind the first stop token."""
    return ids[: next((position + 1 for position, token in enumerate(ids) if token in stop_ids), len(ids))]


def load_tokenizer(model: str):
    """The tokenizer of a model, which is small: the first to find out that there is no such model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of {model!r} cannot be loaded; is it a folder or a Hub name? {error}"
        ) from error


def encode_prompts(settings: SamplingSettings, questions: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of every question; an error where one leaves no room for `max_new_tokens`."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(settings.model)
    chat = settings.chat_template and tokenizer.chat_template is not None
    prompt_ids = []
    for question in questions:
        if chat:
            is_text = isinstance(question, str)
            messages = [{"role": "user", "content": question}] if is_text else question
            prompt_ids.append(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            )
        elif isinstance(question, str):
            prompt_ids.append(tokenizer(question)["input_ids"])
        else:
            raise ValueError("The questions are chat messages, which need a chat template; this run applies none.")
    if not Path(settings.model, "adapter_config.json").is_file():  # an adapter has no context of its own
        config = AutoConfig.from_pretrained(settings.model).get_text_config()
        context, longest = getattr(config, "max_position_embeddings", None), max(map(len, prompt_ids))
        if context is not None and longest + settings.max_new_tokens > context:
            raise ValueError(
                f"The longest question has {longest} tokens and `max_new_tokens` is {settings.max_new_tokens}, but "
                f"the model's context holds {context}. Lower `max_new_tokens` to at most {context - longest}."
            )
    return prompt_ids


class SamplesFile:
    """A JSONL whose first line holds the settings and every further line one record with its `index`.

    Use it as a context manager. A last line that a kill left unfinished is taken off again.

    Args:
        path: the file; `None` keeps the records in memory only.
        settings: JSON-ready. A file that was made with other settings is an error.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._records: dict[int, dict[str, Any]] = {}
        self._file = None
        if self._path is not None and self._path.exists():
            self._read(settings)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            if self._file.tell() == 0:
                self._write({"settings": settings})

    def __enter__(self) -> "SamplesFile":
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, index: int) -> bool:
        return index in self._records

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def append(self, record: dict[str, Any]) -> None:
        """Keep a record under its `index` and write it out at once."""
        self._records[record["index"]] = record
        if self._file is not None:
            self._write(record)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _read(self, settings: dict[str, Any]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line counts when its end was written
        try:
            rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
            found = rows[0]["settings"] if rows else settings
            self._records = {row["index"]: row for row in rows[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is not a samples file of an evaluation. Give another name.") from error
        differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differing:
            words = ", ".join(f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now" for name in differing)
            raise ValueError(f"{self._path} was made with other settings ({words}). Give another name, or delete it.")
        if len(whole) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
