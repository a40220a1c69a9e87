"""A tiny model, its tokenizer and a task, for benchmarks and tests: no network, milliseconds to build."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CORPUS = [
    "What is 3 + 4?\n\nFirst add 3 and 4.\n\nThat gives 7.\n\nThe answer is 7.",
    "Let x = 2.\nThen 2 x = 4.\n\nSo the answer is 4.\n\n\nDone.",
    "Naïve café, 数学 and π.\r\n\r\n- item one\n- item two\n\n",
]


def byte_level_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE, the family of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<eos>", "<user>", "<assistant>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    wrapped.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return wrapped


def tiny_qwen3(tokenizer, *, layers: int = 2, hidden: int = 32, **changes) -> Qwen3ForCausalLM:
    """A random Qwen3 that writes line feeds and stops often enough to make trees of several steps."""
    torch.manual_seed(0)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,  # the smallest that vLLM's CPU attention takes
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen3ForCausalLM(Qwen3Config(**options | changes))


def save_tiny(path, tokenizer, **kwargs) -> str:
    """Write a tiny model and its tokenizer to a folder, as a hub model would be."""
    tiny_qwen3(tokenizer, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def questions(count: int = 64, conversational: bool = False) -> Dataset:
    """Prompts with a `letter` column for reward functions."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        text = f"What is {rng.randint(1, 9)} + {rng.randint(1, 9)}?"
        prompt = [{"role": "user", "content": text}] if conversational else text
        rows.append({"prompt": prompt, "letter": rng.choice("aeiou")})
    return Dataset.from_list(rows)


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def even_length(completions, **kwargs) -> list[float]:
    """A 0/1 reward that a random model gets right about half of the time."""
    return [float(len(text_of(completion)) % 2 == 0) for completion in completions]


# Arguments of a run that takes a second: sampling from the full distribution, so that trees differ in length.
FAST = {
    "max_steps": 3,
    "step_delimiter": "e",  # random models write it often, so their trees have many steps
    "max_completion_length": 32,
    "learning_rate": 1e-3,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
