"""A calculator as a tool, and a small model that uses it now and then: the task of the benchmarks of agents.

A question is a chain of operations, worked out from the left modulo 23: `3+4*2-1`. Each step of an answer is either a
call of the tool, which ends the turn, or a guess that the model writes itself, and goes on: `14-1=9` and a blank line.
The last turn says the result: `=13`. The solutions that the model starts from call the tool for nearly every addition,
for some subtractions and for few products, and their guesses are wrong. So what is to be learned is to ask.
"""

import json
import operator
import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup, set_seed

from benchmarks.tiny import tiny_qwen3

# In the form of Qwen's; a message may hold parts, as an environment's prompt does.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": "</tool_call>\\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<\\|im_end\\|>\\s*", "content": "text"},
    },
}

MODULUS = 23
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HABIT = {"+": 0.95, "-": 0.6, "*": 0.3}  # how often the solutions to start from call the tool
MAX_LENGTH = 112  # tokens of a completion


def call(name: str, **arguments) -> str:
    """What the model writes to call a tool."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def calculate(expression: str) -> str:
    """
    Calculate modulo 23.

    Args:
        expression: Two numbers and what to do with them, one of + - *.
    """
    for sign, operation in OPERATIONS.items():
        left, found, right = expression.partition(sign)
        if found:
            return str(operation(int(left), int(right)) % MODULUS)
    raise ValueError("no operation")


def right_answer(completions, answer, **kwargs) -> list[float]:
    """1 where the last turn ends with the result."""
    said = [completion[-1]["content"].rpartition("=")[2].strip() for completion in completions]
    return [float(mine == right) for mine, right in zip(said, answer, strict=True)]


def chains(count: int, seed: int, operations: int = 4) -> list[list]:
    """A first number, and so many pairs of an operation and a number."""
    rng = random.Random(f"chains {seed}")
    return [
        [rng.randrange(MODULUS), *((rng.choice([*OPERATIONS]), rng.randrange(2, MODULUS)) for _ in range(operations))]
        for _ in range(count)
    ]


def results(chain: list) -> list[int]:
    """After every operation."""
    value, found = chain[0], []
    for sign, number in chain[1:]:
        value = OPERATIONS[sign](value, number) % MODULUS
        found.append(value)
    return found


def question(chain: list) -> str:
    return str(chain[0]) + "".join(f"{sign}{number}" for sign, number in chain[1:])


def rows(count: int, seed: int, operations: int = 4) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question(chain)}], "answer": str(results(chain)[-1])}
            for chain in chains(count, seed, operations)
        ]
    )


def solution(chain: list, rng: random.Random) -> list[tuple[str, bool]]:
    """The text of an answer to start from, in parts: those that the model writes, and those that it reads."""
    value, parts = chain[0], []
    for sign, number in chain[1:]:
        step = f"{value}{sign}{number}"
        if rng.random() < HABIT[sign]:
            value = OPERATIONS[sign](value, number) % MODULUS
            parts.append((call("calculate", expression=step) + "<|im_end|>", True))
            parts.append((f"\n<|im_start|>tool\n{value}<|im_end|>\n<|im_start|>assistant\n", False))
        else:
            value = rng.randrange(MODULUS)
            parts.append((f"{step}={value}\n\n", True))
    return [*parts, (f"={value}<|im_end|>", True)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with a token for everything around the numbers of a call, and one for each digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["assistant\n", "user\n", "tool\n", "tools calculate", "=\n\n"] * 8,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", padding_side="left"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    before, _, after = call("calculate", expression="?").partition("?")
    wrapped.add_tokens([before, after])
    wrapped.chat_template, wrapped.response_template = TEMPLATE, RESPONSE
    return wrapped


def warm_start(folder: Path, steps: int = 300, batch: int = 48, operations: int = 4) -> Path:
    """A model that was shown solutions, and its tokenizer; made where `folder` does not hold them."""
    if (folder / "done").exists():
        return folder
    set_seed(0)
    ready = tokenizer()
    model = tiny_qwen3(ready, hidden=64, intermediate_size=192, num_key_value_heads=2, max_position_embeddings=512)
    rng, shown = random.Random(0), []
    for chain in chains(steps * batch, -1, operations):
        messages = [{"role": "user", "content": question(chain)}]
        prompt = ready.apply_chat_template(messages, tools=[calculate], tokenize=False, add_generation_prompt=True)
        ids, labels = [], []
        for text, written in [(prompt, False), *solution(chain, rng)]:
            part = ready.encode(text, add_special_tokens=False)
            ids += part
            labels += part if written else [-100] * len(part)
        shown.append((torch.tensor(ids), torch.tensor(labels)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(30, steps // 4), steps)
    for step in tqdm(range(steps), desc="Warm start", unit="step"):
        ids, labels = zip(*shown[step * batch : (step + 1) * batch], strict=True)
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=ready.pad_token_id)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    ready.save_pretrained(folder)
    (folder / "done").touch()
    return folder
