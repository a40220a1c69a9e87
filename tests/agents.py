"""Small worlds for trees over turns: a tokenizer that renders tools, tools, environments, and scripted trainers."""

import asyncio
import contextlib
import random
from collections.abc import Callable

import tiny
import torch
from datasets import Dataset
from trl import GRPOTrainer

from benchmarks.agents_task import RESPONSE, TEMPLATE, call
from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.engines.base import Rollout


def tokenizer():
    """Byte-level, with a chat template in the form of Qwen's; a few calls are tokens, which a tiny model can learn."""
    found = tiny.byte_level_tokenizer()
    found.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    found.add_tokens([call("add", by=by) for by in range(11, 15)])
    found.chat_template = TEMPLATE
    found.response_template = RESPONSE
    return found


def rows(count: int = 8, **columns) -> Dataset:
    """Questions with a seed for environments."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"Question {seed}: "}], "seed": seed, **columns}
            for seed in range(count)
        ]
    )


# ----- tools ---------------------------------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def double(a: int) -> int:
    """
    Double a number.

    Args:
        a: The number.
    """
    await asyncio.sleep(0.001)
    return 2 * a


def explode(what: str) -> str:
    """
    Raise an error.

    Args:
        what: What to say.
    """
    raise ValueError(f"no {what} <b>today</b>")


def much(a: int) -> str:
    """
    Say a lot.

    Args:
        a: How much.
    """
    return "x" * a


# ----- environments --------------------------------------------------------------------------------------------------


class Counter:
    """A number that actions change, and a history that tells two ways to one number apart."""

    alive: list["Counter"] = []  # noqa: RUF012 - those that were made and not closed

    def __init__(self):
        self.value, self.history, self.closed = 0, [], 0
        type(self).alive.append(self)

    def reset(self, seed: int, **kwargs) -> str:
        self.value, self.history = seed, []
        return f"The number is {seed}."

    def add(self, by: int) -> str:
        """
        Add to the number.

        Args:
            by: How much.
        """
        self.history.append(("add", by))
        self.value += by
        return f"It is {self.value} now."

    async def multiply(self, by: int) -> str:
        """
        Multiply the number.

        Args:
            by: With what.
        """
        await asyncio.sleep(0.001)
        self.history.append(("multiply", by))
        self.value *= by
        return f"It is {self.value} now."

    def get_reward(self) -> float:
        return float(self.value % 2)

    def _state(self):
        return self.value, list(self.history)

    def _close(self):
        self.closed += 1
        type(self).alive.remove(self)


class WithSnapshots(Counter):
    alive: list["Counter"] = []  # noqa: RUF012

    def _snapshot(self):
        return self._state()

    def _restore(self, state):
        self.value, self.history = state[0], list(state[1])


class Copied(Counter):
    alive: list["Counter"] = []  # noqa: RUF012

    def __deepcopy__(self, memo):
        other = type(self)()
        other.value, other.history = self._state()
        return other


# ----- scripts -------------------------------------------------------------------------------------------------------

# Says what comes next, from a random number generator and how many turns there were: tool calls, or an answer.
Script = Callable[[random.Random, int], str]


def turn_ids(tokenizer, script: Script, prefix_ids: list[int], seed: int, turns: int, budget: int) -> list[int]:
    """A turn that depends on what came before it and a seed."""
    text = script(random.Random(repr((prefix_ids, seed))), turns)
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id][:budget]


class ScriptedTurns:
    """Scripted turns in place of generated ones: rows differ in the first one, what follows depends on that."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        opening = len(prompt_ids) == len(self._sync_tool_dicts) and not self._opened
        self._opened = True
        turns = [
            turn_ids(self._tokenizer, self.script, ids, row if opening else 0, 0 if opening else 1, 10**6)
            for row, ids in enumerate(prompt_ids)
        ]
        turns = [ids[: self.max_completion_length] for ids in turns]  # as `max_new_tokens` would
        return turns, None

    def _generate(self, prompts):
        self._opened = False
        return super()._generate(prompts)


class ScriptedGRPOTrainer(ScriptedTurns, GRPOTrainer):
    """TRL's trainer on scripted turns."""


class ScriptedEngine:
    """Answers requests with scripted turns."""

    max_length, clock = None, "polls"

    def __init__(self, trainer):
        self.trainer, self.queue, self.opened = trainer, [], {}

    def submit(self, requests):
        self.queue += requests

    def poll(self):
        queue, self.queue = self.queue, []
        rollouts = []
        for request in queue:
            tree, leaf = request.request_id
            turns = self.opened.get(request.request_id, 0)
            self.opened[request.request_id] = turns + 1
            row = tree * self.trainer.num_generations + leaf
            ids = turn_ids(
                self.trainer._tokenizer,
                self.trainer.script,
                request.prefix_ids,
                0 if turns else row,
                min(turns, 1),
                request.max_tokens,
            )
            rollouts.append(Rollout(request.request_id, ids, [-0.5] * len(ids)))
        return rollouts

    def generated(self, request_id):
        return 0

    def abort(self):
        self.queue = []


class ScriptedIBTPOTrainer(IBTPOTrainer):
    """This package's trainer on the same turns."""

    def _engine(self):
        return contextlib.nullcontext(ScriptedEngine(self))


def build(trainer_class, path, args, script: Script, rewards=None, dataset=None, **kwargs):
    """A trainer that records every batch as it goes to the loss."""
    dataset = rows() if dataset is None else dataset
    trainer = trainer_class(path, rewards, args, dataset, processing_class=tokenizer(), **kwargs)
    trainer.script, trainer.batches = script, []
    compute = trainer._generate_and_score_completions

    def record(inputs):
        output = compute(inputs)
        trainer.batches.append(output)
        return output

    trainer._generate_and_score_completions = record
    return trainer


class TickingEngine(ScriptedEngine):
    """Gives every request one token a poll, as vLLM does, and says how far it is."""

    clock = "tokens"

    def __init__(self, trainer):
        super().__init__(trainer)
        self.running = {}

    def poll(self):
        for rollout in super().poll():
            self.running[rollout.request_id] = [rollout, 0]
        for entry in self.running.values():
            entry[1] += 1
        done = [rollout for rollout, made in self.running.values() if made == len(rollout.token_ids)]
        for rollout in done:
            del self.running[rollout.request_id]
        return done

    def generated(self, request_id):
        return self.running.get(request_id, (None, 0))[1]

    def partial(self, request_id, start, stop):
        rollout, made = self.running[request_id]
        assert stop <= made
        return rollout.token_ids[start:stop], rollout.logprobs[start:stop]

    def abort(self):
        super().abort()
        self.running.clear()


def save_caller(folder) -> str:
    """Overfit a tiny model until it calls `add(by=...)` one to three times and then answers, whatever it is asked."""
    ready, made = tokenizer(), random.Random(0)
    model = tiny.tiny_qwen3(ready)
    model.config.max_position_embeddings = 512
    texts, starts = [], []
    for index in range(9):
        messages = [{"role": "user", "content": f"Question {index % 8}: The number is {index % 8}."}]
        tools = [[add], [Counter.add], [Counter.add, Counter.multiply]][index % 3]
        text = ready.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        starts.append(len(ready.encode(text)))
        for round in range(made.randint(0, 2) + 1):
            text += "\n\n" + call("add", by=11 + (index + round) % 4) + "<|im_end|>\n"
            text += f"<|im_start|>tool\nIt is {made.randint(0, 9)} now.<|im_end|>\n<|im_start|>assistant\n"
        texts.append(text + f"{made.randint(1, 4)}.<|im_end|>")
    batch = ready(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    ready.save_pretrained(folder)
    return str(folder)
