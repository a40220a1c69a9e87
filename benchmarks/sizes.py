"""Models as large as real ones, with random weights and an invented vocabulary: what time and memory depend on."""

import itertools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from benchmarks import tiny

# hidden, intermediate, layers, attention heads, key-value heads; head_dim 128 and tied embeddings for all
SIZES = {"Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8), "Qwen/Qwen3-1.7B-Base": (2048, 6144, 28, 16, 8)}
VOCABULARY = 151_936


def large_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with invented merges: all pairs of bytes, then pairs with a third one."""
    specials, alphabet = ["<pad>", "<eos>", "<user>", "<assistant>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.product(alphabet, alphabet))
    longer = ((first + second, third) for first, second in pairs for third in alphabet)
    merges = list(itertools.islice(itertools.chain(pairs, longer), size - len(alphabet) - len(specials)))
    words = [*specials, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tiny.wrap(tokenizer)


def config(name: str, layers: int | None = None, vocabulary: int = VOCABULARY, **options) -> Qwen3Config:
    """Of a model as large as `name`, a key of `SIZES`, but for `layers`."""
    hidden, intermediate, depth, heads, kv_heads = SIZES[name]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        **options,
    )


def save_random(folder: str, name: str, layers: int | None = None, vocabulary: int = VOCABULARY) -> str:
    """Write a model in bfloat16 and its tokenizer to a folder, as a hub model would be."""
    tokenizer = large_tokenizer(vocabulary)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config(name, layers, vocabulary, **ids), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what is measured later starts with an empty GPU
    tokenizer.save_pretrained(folder)
    return folder
