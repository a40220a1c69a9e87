"""A model that answers every question with a digit from 1 to 4, for evaluations with a known way of being right."""

import json
import random
from pathlib import Path

import tiny
import torch

DIGITS = "1234"


def save_guesser(folder: Path) -> str:
    """Overfit a tiny Qwen3 for a second, until it writes any of four digits and stops, whatever it is asked."""
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = None
    model = tiny.tiny_qwen3(tokenizer)
    questions = [row["question"] for row in rows()]
    texts = [question + digit + tokenizer.eos_token for question in questions for digit in DIGITS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows() -> list[dict[str, str]]:
    """50 questions whose answer is one of the four digits."""
    rng = random.Random(1)
    return [{"question": f"{index} + 4 =", "answer": rng.choice(DIGITS)} for index in range(50)]


def write_rows(path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(path)
