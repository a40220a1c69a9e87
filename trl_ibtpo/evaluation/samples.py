"""Independent completions of questions, with vLLM or transformers.

What a question is given depends on the settings and its own number alone, not on the questions beside it.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..engines.base import RolloutEngine, RolloutRequest
from .adapters import base_of, load_tokenizer, rank_of


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


def _start_vllm(settings: SamplingSettings, longest: int, arguments: dict[str, Any]) -> RolloutEngine:
    # In this process, so that an error is the cause itself and not that another process has died.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise ImportError(
            f"vLLM cannot be imported ({error}). Install it with: pip install '.[vllm]' in a copy of the repository; "
            "or choose --engine transformers."
        ) from error

    from ..engines.vllm import VLLMEngine
    from ..engines.vllm_cpu import runs_on_cpu

    share = arguments.get("gpu_memory_utilization")
    if share is None:
        share = free_share(on_cpu=runs_on_cpu(), gpus=arguments.get("tensor_parallel_size", 1))
    arguments = {**arguments, "gpu_memory_utilization": share}
    base, adapter = base_of(settings.model), None
    if base is not None:
        adapter = LoRARequest("adapter", 1, settings.model)
        arguments |= {"enable_lora": True, "max_lora_rank": rank_of(settings.model)}
    if runs_on_cpu():  # it cannot take back a seeded sample after one part of a prompt
        parts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, longest)}
        arguments = {**arguments, **parts}
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    try:
        llm = LLM(model=base or settings.model, max_model_len=longest, **arguments)
    except Exception as error:
        raise RuntimeError(
            f"vLLM does not start with {settings.model!r}: {type(error).__name__}: {error} It was given {share:.2f} "
            "of the memory: --gpu_memory_utilization sets another share; --engine transformers does without vLLM."
        ) from error
    return VLLMEngine(llm, sampling, lora_request=adapter)


def free_share(on_cpu: bool, gpus: int = 1) -> float:
    """Share of the whole memory that is safe to take beside what else is running: most of what is free now."""
    if on_cpu:
        import psutil

        memory = psutil.virtual_memory()
        return 0.5 * memory.available / memory.total  # the rest is for whoever needs it next
    import torch

    return min(0.9 * free / total for free, total in map(torch.cuda.mem_get_info, range(gpus)))


def _start_transformers(settings: SamplingSettings, longest: int, arguments: dict[str, Any]) -> RolloutEngine:
    from transformers import AutoModelForCausalLM, GenerationConfig

    from ..engines.transformers import TransformersEngine

    tokenizer = load_tokenizer(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto", device_map="auto", **arguments).eval()
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # any token will do
    greedy = settings.temperature == 0
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0 if greedy else settings.temperature,
        top_p=settings.top_p,
        top_k=1 if greedy else settings.top_k,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=pad_id,
    )
    model.generation_config = GenerationConfig()  # `generate` would fill what is not set from the checkpoint's own
    return TransformersEngine(model, config, pad_id, request_seeds=True)


# From settings, the most tokens of a question with its completion, and further arguments of vLLM's `LLM` or
# transformers' `from_pretrained`.
ENGINES = {"vllm": _start_vllm, "transformers": _start_transformers}


def sample(
    settings: SamplingSettings, prompt_ids: dict[int, list[int]], engine: RolloutEngine
) -> Iterator[tuple[int, list[list[int]]]]:
    """Token ids of the completions of every question, with its number, as soon as they are finished."""
    # Where a poll is one batch, a question has it for itself: in another batch, rounding might change a sample.
    batches = [[index] for index in prompt_ids] if engine.clock == "polls" else [list(prompt_ids)]
    for batch in batches:
        engine.submit(
            [
                RolloutRequest(
                    request_id=(index, number),
                    prefix_ids=prompt_ids[index],
                    max_tokens=settings.max_new_tokens,
                    seed=seed_of(settings.seed, index, number),
                )
                for index in batch
                for number in range(settings.num_samples)
            ]
        )
        finished: dict[int, dict[int, list[int]]] = {index: {} for index in batch}
        while finished:
            for rollout in engine.poll():
                index, number = rollout.request_id
                finished[index][number] = rollout.token_ids
                if len(finished[index]) == settings.num_samples:
                    yield index, [token_ids for _, token_ids in sorted(finished.pop(index).items())]


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, for example of the run, the question and the sample."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def as_applied(settings: SamplingSettings) -> SamplingSettings:
    """The settings with `chat_template` as it is: whether one is asked for and the tokenizer has one."""
    used = settings.chat_template and load_tokenizer(settings.model).chat_template is not None
    return replace(settings, chat_template=used)


def encode_prompts(settings: SamplingSettings, questions: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of every question; an error where one leaves no room for `max_new_tokens`."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(settings.model)
    prompt_ids = []
    for question in questions:
        if settings.chat_template:
            is_text = isinstance(question, str)
            messages = [{"role": "user", "content": question}] if is_text else question
            prompt_ids.append(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
            )
        elif isinstance(question, str):
            prompt_ids.append(tokenizer(question)["input_ids"])
        else:
            raise ValueError("The questions are chat messages, which need a chat template; this run applies none.")
    config = AutoConfig.from_pretrained(base_of(settings.model) or settings.model).get_text_config()
    context, longest = getattr(config, "max_position_embeddings", None), max(map(len, prompt_ids))
    if context is not None and longest + settings.max_new_tokens > context:
        raise ValueError(
            f"The longest question has {longest} tokens and `max_new_tokens` is {settings.max_new_tokens}, but "
            f"the model's context holds {context}. Lower `max_new_tokens` to at most {context - longest}."
        )
    return prompt_ids


class SamplesFile(dict[int, dict[str, Any]]):
    """Records by their `index`, kept in a JSONL whose first line holds the settings and every further one a record.

    A last line that a kill left unfinished is taken off again.

    Args:
        path: the file; `None` keeps the records in memory only.
        settings: JSON-ready. A file that was made with other settings is an error.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        super().__init__()
        self._path = None if path is None else Path(path)
        if self._path is not None and not (self._path.exists() and self._read(settings)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": settings})

    def say_found(self, total: int, what: str) -> None:
        """Say on stderr how much will not be sampled again."""
        if self:
            tqdm.write(f"{len(self)} of {total} {what} come from {self._path}", file=sys.stderr)

    def append(self, record: dict[str, Any]) -> None:
        """Keep a record under its `index` and write it out at once."""
        self[record["index"]] = record
        self._write(record)

    def _write(self, row: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    def _read(self, settings: dict[str, Any]) -> bool:
        """Take over the records of the file; whether it holds settings."""
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line counts when its end was written
        try:
            if not whole and not _line({"settings": settings}).encode().startswith(content):
                raise ValueError("not the beginning of the first line, which alone may be written anew")
            rows = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
            found = rows[0]["settings"] if rows else settings
            self.update({row["index"]: row for row in rows[1:]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is not a samples file of an evaluation. Give another name.") from error
        differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if differing:
            words = ", ".join(f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now" for name in differing)
            raise ValueError(f"{self._path} was made with other settings ({words}). Give another name, or delete it.")
        with self._path.open("r+b") as file:
            file.truncate(len(whole))
        return bool(rows)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
