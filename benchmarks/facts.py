"""Tasks on which a small model learns for real, and the models that start on them.

A question takes several steps, and each step a *fact* that the model has to know. The solutions that the model starts
from know their facts with different reliability: most are nearly always right, some now and then, some seldom. A
mistake is one of two results that go with the fact, and is carried on. So what reinforcement learning has to find out
is which of the model's habits are right.
"""

import hashlib
import json
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from benchmarks.sampling import QuickQwen3

# Share of the facts, and the range from which their probability of being right is drawn.
RELIABILITY = [(0.6, (0.98, 0.98)), (0.3, (0.4, 0.8)), (0.1, (0.03, 0.2))]


@dataclass(frozen=True)
class FactTask:
    """What tasks share; every field is part of the warm start's name in the cache.

    A task says what there is to know (`all_facts`), asks (`questions`), works through a question (`solution`), and
    says which completions are right (`reward`).
    """

    name: str
    _: KW_ONLY
    warm_steps: tuple[int, ...] = (1200, 600)  # optimizer steps of each cycle of the learning rate
    warm_rows: int = 48  # worked solutions of an optimizer step of the warm start
    warm_learning_rate: float = 3e-3
    hidden: int = 64
    layers: int = 2
    seed: int = 0  # of the facts and the warm start
    base: "FactTask | None" = None  # whose warm start is where this one begins, with its tokenizer and its facts

    COLUMNS: ClassVar[Sequence[str]] = ("solution",)  # of a row of `questions`, for the reward

    def all_facts(self) -> Iterator[tuple[Hashable, Any, list]]:
        """What there is to know: the name of a fact, its right result, and all results that are possible."""
        raise NotImplementedError

    def words(self) -> list[str]:
        """All words of questions and solutions, but for those that every task has."""
        raise NotImplementedError

    def questions(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Rows with `prompt`, `solution` and `COLUMNS`. Training seeds are at least 0; -1 warm starts, -2 held out."""
        raise NotImplementedError

    def solution(self, row: dict[str, Any], rng: random.Random | None = None) -> str:
        """The right solution; with `rng`, one from the warm start's data. All of a task have as many tokens."""
        raise NotImplementedError

    def reward(self, completions: list[str], **columns: list) -> list[float]:
        """1 for each right completion, else 0."""
        raise NotImplementedError

    @property
    def max_completion_length(self) -> int:
        raise NotImplementedError

    @cached_property
    def facts(self) -> dict[Hashable, tuple[float, list]]:
        """Of each fact: the probability that the warm start's data has it right, and the wrong results."""
        rng, facts = random.Random(self.seed), {}
        shares, ranges = zip(*RELIABILITY, strict=True)
        for fact, right, possible in self.all_facts():
            (low, high) = rng.choices(ranges, shares)[0]
            wrong = [result for result in possible if result != right]
            facts[fact] = rng.uniform(low, high), rng.sample(wrong, 2)
        return facts

    def recalled(self, fact: Hashable, right: Any, rng: random.Random | None) -> Any:
        """The result of a fact in the warm start's data; the right one without `rng`."""
        if rng is None:
            return right
        reliability, wrong = self.facts[fact]
        return right if rng.random() < reliability else rng.choice(wrong)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token for each word, and one for a blank line."""
        words = ["<pad>", "<eos>", "\n\n", ":", *self.words()]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\S+"), "removed", invert=True)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        )

    def model(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
        """A Qwen3 with random weights: 0.11 million parameters with the default sizes."""
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=self.hidden // 4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        return Qwen3ForCausalLM(config)

    def warm_start(self, cache: Path) -> Path:
        """A folder with a model that was trained on worked solutions, and its tokenizer; made where it is missing."""
        settings = {**asdict(self), "reliability": RELIABILITY}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        folder = cache / f"{self.name}-{digest}"
        if (folder / "settings.json").exists():
            return folder
        set_seed(self.seed)
        if self.base is None:
            tokenizer = self.tokenizer()
            model = self.model(tokenizer)
        else:
            begun = self.base.warm_start(cache)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(begun)
            model = Qwen3ForCausalLM.from_pretrained(begun, dtype=torch.float32)
        for cycle in range(len(self.warm_steps)):
            self.train_cycle(model, tokenizer, cycle)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1))  # last: the folder is whole
        return folder

    def train_cycle(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, cycle: int) -> None:
        """One cycle of the learning rate on worked solutions, none of which is seen twice."""
        rng, steps = random.Random(f"warm {self.seed + cycle}"), self.warm_steps[cycle]
        rows = self.questions(steps * self.warm_rows, seed=-1 - 10 * cycle)
        solutions = [f"{row['prompt']} {self.solution(row, rng)} <eos>" for row in rows]
        ids = torch.tensor(tokenizer(solutions)["input_ids"])  # all of one length
        prompt = len(tokenizer.encode(rows[0]["prompt"]))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.warm_learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps // 4), steps)
        with tqdm(ids.split(self.warm_rows), desc=f"Warm start of '{self.name}'", unit="step") as progress:
            for batch in progress:
                logits = model(input_ids=batch).logits[:, prompt - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, prompt:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


class RightSolutions:
    """How probable the right solutions of held-out questions are, computed and not sampled.

    The sum over questions of the probability that the model samples the right solution, token by token, is the
    expected number of right solutions: accuracy at temperature 1 with infinitely many samples a question. It has no
    sampling noise and costs one forward pass.
    """

    def __init__(self, task: FactTask, tokenizer: PreTrainedTokenizerFast, count: int = 256, seed: int = -2):
        rows = task.questions(count, seed)
        prompts = [tokenizer.encode(row["prompt"]) for row in rows]
        solutions = [[*tokenizer.encode(row["solution"]), tokenizer.eos_token_id] for row in rows]
        self._prompt_length = len(prompts[0])  # all questions of a task are as long
        self._ids = torch.tensor([prompt + solution for prompt, solution in zip(prompts, solutions, strict=True)])

    @torch.no_grad()
    def probability(self, model: Qwen3ForCausalLM, batch: int = 64) -> float:
        training, total = model.training, 0.0
        model.eval()
        for ids in self._ids.split(batch):
            kept = ids.shape[1] - self._prompt_length + 1
            logits = model(input_ids=ids, logits_to_keep=kept).logits[:, :-1]
            chosen = ids[:, self._prompt_length :, None]
            total += logits.log_softmax(-1).gather(2, chosen).sum((1, 2)).exp().sum().item()
        model.train(training)
        return total / len(self._ids)


def sampled_accuracy(
    task: FactTask, model: QuickQwen3, tokenizer, count: int = 512, seed: int = -2
) -> tuple[float, float]:
    """Share of held-out questions whose sampled answer is right, as the reward counts it, and its standard error."""
    rows = task.questions(count, seed)
    ids = torch.tensor([tokenizer.encode(row["prompt"]) for row in rows])
    model.eval()
    sampled = model.generate(ids, max_new_tokens=task.max_completion_length)
    texts = tokenizer.batch_decode(sampled[:, ids.shape[1] :], skip_special_tokens=True)
    rewards = task.reward(texts, **{name: [row[name] for row in rows] for name in task.COLUMNS})
    accuracy = sum(rewards) / count
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / count)
