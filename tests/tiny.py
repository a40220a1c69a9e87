"""More small models, tokenizers and rewards for tests, beside those that benchmarks use as well."""

import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from trl import GRPOConfig

from benchmarks.tiny import (  # noqa: F401
    CORPUS,
    FAST,
    byte_level_tokenizer,
    even_length,
    questions,
    save_tiny,
    text_of,
    tiny_qwen3,
    wrap,
)


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
    return wrap(tokenizer)


def _without_added_bytes(state: str) -> str:
    state = json.loads(state)
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(state)


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


def has_letter(completions, letter, **kwargs) -> list[float | None]:
    """A second reward that uses a column and has no opinion on short completions."""
    return [
        None if len(text_of(completion)) < 8 else text_of(completion).count(vowel) / 4
        for completion, vowel in zip(completions, letter, strict=True)
    ]
