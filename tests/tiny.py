"""Small models, tokenizers and tasks made on the spot: no network, milliseconds to build."""

import random

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from trl import GRPOConfig

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
    return _wrap(tokenizer)


def sentencepiece_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """BPE over characters with byte fallback and a visible space, the family of Llama 2, Mistral and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # Without line feeds in the corpus they are written as byte tokens, as in Llama 2.
    corpus = [line for text in CORPUS for line in text.splitlines()]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<unk>", "<pad>", "<eos>", "<user>", "<assistant>", *byte_tokens]
        ),
    )
    # Byte tokens are ordinary pieces, not special tokens.
    kept = [AddedToken(token, special=True) for token in ("<pad>", "<eos>", "<user>", "<assistant>")]
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_without_added_bytes(state))
    tokenizer.add_special_tokens(kept)
    return _wrap(tokenizer)


def _without_added_bytes(state: str) -> str:
    import json

    state = json.loads(state)
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(state)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    wrapped.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    return wrapped


def tiny_qwen3(tokenizer, *, tie_word_embeddings: bool = False, layers: int = 2, hidden: int = 32) -> Qwen3ForCausalLM:
    """A random Qwen3 that writes line feeds and stops often enough to make trees of several steps."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=256,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def tiny_reward_model(tokenizer, num_labels: int = 1) -> Qwen3ForSequenceClassification:
    """A random sequence-classification model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForSequenceClassification(config).eval()


def save_tiny(path, tokenizer, **kwargs) -> str:
    """Write a tiny model and its tokenizer to a folder, as a hub model would be."""
    tiny_qwen3(tokenizer, **kwargs).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_tiny_vlm(path) -> str:
    """Write a tiny LLaVA (CLIP and Qwen3) with its processor to a folder: a vision-language model as on the hub."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    image_side, patch_side = 16, 8
    text = tiny_qwen3(tokenizer).config
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_side,
        patch_size=patch_side,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(path)
    LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": image_side}, crop_size={"height": image_side, "width": image_side}
        ),
        tokenizer,
        patch_size=patch_side,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=template,
    ).save_pretrained(path)
    return str(path)


def grpo_arguments(args) -> GRPOConfig:
    """TRL's config with every value that it shares with an IBTPOConfig."""
    names = {field for field in GRPOConfig.__dataclass_fields__ if GRPOConfig.__dataclass_fields__[field].init}
    shared = {name: getattr(args, name) for name in names if name not in ("generation_batch_size", "logging_dir")}
    return GRPOConfig(**shared)


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


def has_letter(completions, letter, **kwargs) -> list[float | None]:
    """A second reward that uses a column and has no opinion on short completions."""
    return [
        None if len(text_of(completion)) < 8 else text_of(completion).count(vowel) / 4
        for completion, vowel in zip(completions, letter, strict=True)
    ]


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
