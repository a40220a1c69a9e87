"""The prefix-shared forward gives the numbers and gradients of the forward it replaces."""

import re

import numpy as np
import pytest
import tiny
import torch
import transformers
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    OPTConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks import architectures
from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.prefix_sharing import attention
from trl_ibtpo.prefix_sharing.attention import (
    MissingBatchError,
    _trie_attention,
    flash_along_trie,
    model_arguments,
    prepare_model,
    shared_logps_and_entropies,
    why_not_shared,
)
from trl_ibtpo.prefix_sharing.comparison import comparison_batch, why_not_exact
from trl_ibtpo.prefix_sharing.trainer_mixin import keep_trees_together
from trl_ibtpo.prefix_sharing.trie import BLOCK, share_prefixes

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MODELS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "llama": LlamaConfig(**SHAPE),
    "gemma": GemmaConfig(**SHAPE, head_dim=16),  # tied embeddings, scaled
}


def make_model(name: str, implementation: str = "sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    config = MODELS[name]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
    for parameter in model.parameters():  # larger than at the start of training, so that attention matters
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def with_double_norms(model):
    """transformers' RMS norms compute in single precision whatever the model's; these do not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=1e-6, dtype=torch.float64)
                norm.weight.data.copy_(child.weight.data)
                setattr(parent, name, norm)
    return model


@st.composite
def batches(draw, max_length: int = 12):
    """Rows that share prefixes in every way: branches, duplicates, one a prefix of another, nothing to score."""
    groups = draw(st.integers(1, 3))
    rows = []
    for _ in range(groups):
        prompt = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
        completions = [[]]
        for _ in range(draw(st.integers(1, 5))):
            base = draw(st.sampled_from(completions))
            kept = base[: draw(st.integers(0, len(base)))]
            completions.append(kept + draw(st.lists(st.integers(1, 3), max_size=max_length - len(kept))))
        rows += [(prompt, completion) for completion in completions[draw(st.integers(0, 1)) :]]
    return draw(st.permutations(rows))


def padded(rows) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Left-padded prompts and right-padded completions."""
    width, kept = max(len(prompt) for prompt, _ in rows), max(1, *(len(completion) for _, completion in rows))
    ids = torch.zeros(len(rows), width + kept, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, width - len(prompt) : width + len(completion)] = torch.tensor(prompt + completion)
        mask[row, width - len(prompt) : width + len(completion)] = 1
    return ids, mask, kept


# ----- layout --------------------------------------------------------------------------------------------------------


def test_a_trie_by_hand():
    # prompt "5 6"; completions "1 2 3", "1 2 4", "1 2", "1 2 3" again, and nothing
    rows = [([5, 6], [1, 2, 3]), ([5, 6], [1, 2, 4]), ([5, 6], [1, 2]), ([5, 6], [1, 2, 3]), ([5, 6], [])]
    shared = share_prefixes(*padded(rows))
    # "1 2 4" branches after the 2, which is laid out again: each position predicts one token.
    assert shared.input_ids.tolist() == [[5, 6, 1, 2, 3, 2, 4]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert shared.shift_labels.tolist() == [[-100, 1, 2, 3, -100, 4, -100]]
    assert shared.subtree_end.tolist() == [7, 7, 7, 5, 5, 7, 7]
    assert shared.gather.tolist() == [[1, 2, 3], [1, 2, 5], [1, 2, 0], [1, 2, 3], [0, 0, 0]]
    assert shared.scored.sum(1).tolist() == [3, 3, 2, 3, 0]
    assert shared.unpack(torch.arange(1.0, 8)[None]).tolist()[2] == [2, 3, 0]
    assert shared.dense_mask()[0, 0, 6].tolist() == [True, True, True, False, False, True, True]
    additive = shared.additive_mask(torch.device("cpu"), torch.float16)
    assert torch.equal(additive == 0, shared.dense_mask()) and additive.min() == torch.finfo(torch.float16).min
    assert additive.stride(-2) == 16  # kernels copy masks whose rows begin elsewhere


@settings(max_examples=200, deadline=None, database=None)
@given(batches())
def test_every_token_once_and_its_own_ancestors(rows):
    ids, mask, kept = padded(rows)
    shared = share_prefixes(ids, mask, kept)
    attends = shared.dense_mask()[0, 0].numpy()
    tokens = shared.input_ids[0].tolist()
    width = ids.shape[1] - kept
    assert (shared.shift_labels != -100).sum() == len(
        {(tuple(prompt), tuple(completion[:n])) for prompt, completion in rows for n in range(1, len(completion) + 1)}
    )
    at_the_end = bool(mask[:, -1].any())  # else one token more takes the last column
    assert len(tokens) <= int(mask.sum()) + (not at_the_end)
    assert shared.position_ids.max() == ids.shape[1] - 1
    for row, (prompt, completion) in enumerate(rows):
        for place, token in enumerate(completion):
            position = int(shared.gather[row, place])
            seen = np.flatnonzero(attends[position])
            # Exactly the row's prefix is seen, in order, with the columns of the batch; the next token is the label.
            assert [tokens[index] for index in seen] == prompt + completion[:place]
            assert shared.position_ids[0, seen].tolist() == list(range(width - len(prompt), width + place))
            assert shared.shift_labels[0, position] == token
    # The segments say the same as the mask.
    for segment in shared.segments:
        for position in range(segment.start, segment.stop):
            runs = [*segment.ancestors, (segment.start, position + 1)]
            assert np.flatnonzero(attends[position]).tolist() == [index for run in runs for index in range(*run)]
    assert [segment.start for segment in shared.segments[1:]] == [segment.stop for segment in shared.segments[:-1]]


@settings(max_examples=10, deadline=None, database=None)
@given(batches(max_length=150))
def test_the_block_mask_is_the_dense_mask(rows):
    shared = share_prefixes(*padded(rows))
    dense, blocks = shared.dense_mask(), shared.block_mask()
    length = dense.shape[-1]
    count = -(-length // BLOCK)
    some, full = torch.zeros(2, count, count, dtype=torch.bool)
    for kind, number, indices in (
        (some, blocks.kv_num_blocks, blocks.kv_indices),
        (full, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for row in range(count):
            kind[row, indices[0, 0, row, : number[0, 0, row]].long()] = True
    tiles = torch.nn.functional.pad(dense[0, 0], (0, count * BLOCK - length) * 2).view(count, BLOCK, count, BLOCK)
    assert torch.equal(some | full, tiles.any(3).any(1))
    whole = dense[0, 0].new_ones(length, length)
    whole = torch.nn.functional.pad(whole, (0, count * BLOCK - length) * 2).view(count, BLOCK, count, BLOCK)
    # A block that ends the row is full where every query of it sees all of it.
    inside = (tiles | ~whole).all(3).all(1) & (torch.arange(count) < length // BLOCK)[None]
    assert torch.equal(full, inside)
    query, key, value = torch.randn(3, 1, 2, length, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=blocks), expected)


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        ([[0, 0, 1, 1]], 2),  # no prompt
        ([[1, 1, 0, 1]], 2),  # padding before a completion token
        ([[1, 0, 1, 1]], 2),  # padding after a prompt token
    ],
)
def test_what_is_no_padded_batch_is_left_to_trl(mask, kept):
    assert share_prefixes(torch.ones(1, 4, dtype=torch.long), torch.tensor(mask), kept) is None


# ----- numbers and gradients -----------------------------------------------------------------------------------------


def compare(model, rows, head) -> tuple[float, float, float]:
    """Largest difference of log-probabilities and entropies, largest relative one of a parameter's gradient."""
    ids, mask, kept = padded(rows)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(rows), kept, generator=generator, dtype=torch.float64)
    results, gradients = [], []
    for shared in (None, share_prefixes(ids, mask, kept)):
        model.zero_grad()
        logps, entropies = head(model, ids, mask, kept, shared)
        (weights[0] * logps + weights[1] * entropies).sum().backward()
        results.append((logps.detach(), entropies.detach()))
        gradients.append([torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()])
    scale = max(float(gradient.norm()) for gradient in gradients[0])
    return (
        float((results[0][0] - results[1][0]).abs().max()),
        float((results[0][1] - results[1][1]).abs().max()),
        max(
            float((a - b).norm()) / max(float(a.norm()), 1e-3 * scale, 1e-12) for a, b in zip(*gradients, strict=True)
        ),
    )


def fused_head(model, ids, mask, kept, shared):
    if shared is not None:
        return shared_logps_and_entropies(model, model, shared)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-kept] = -100
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -kept:], outputs.entropy[:, -kept:]


def double_head(model, ids, mask, kept, shared):
    """TRL's head computes in single precision; the model's own logits keep the doubles."""
    if shared is None:
        logits, labels = model(input_ids=ids, attention_mask=mask).logits[:, -kept - 1 : -1], ids[:, -kept:]
    else:
        logits = model(**model_arguments(model, shared)).logits
        labels = shared.shift_labels.clamp(min=0)
    logps = torch.log_softmax(logits, dim=-1)
    entropies = -(logps.exp() * logps).sum(-1)
    logps = logps.gather(-1, labels[..., None])[..., 0]
    if shared is not None:
        return shared.unpack(logps), shared.unpack(entropies)
    scored = mask[:, -kept:].bool()
    return logps.masked_fill(~scored, 0), entropies.masked_fill(~scored, 0)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None, database=None)
@given(rows=batches())
def test_double_precision(name, rows):
    model = with_double_norms(make_model(name, dtype=torch.float64))
    prepare_model(model)
    assert max(compare(model, rows, double_head)) < 1e-9


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None, database=None)
@given(rows=batches())
def test_single_precision(name, implementation, checkpointing, rows):
    model = make_model(name, implementation)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    prepare_model(model)
    assert max(compare(model, rows, fused_head)) < 2e-5  # rounding of gradients reaches 1e-5


def test_flex_attention_attends_along_the_trie():
    """Forward alone: torch has no backward pass of flex attention on a CPU."""
    rows = [([1, 2], [3] * 90 + [last] * 60) for last in (4, 5, 6)] + [([7], [8] * 40)]
    ids, mask, kept = padded(rows)
    flex, plain = make_model("qwen3", "flex_attention"), make_model("qwen3")
    with torch.no_grad():
        expected = fused_head(plain, ids, mask, kept, None)
        found = shared_logps_and_entropies(flex, flex, share_prefixes(ids, mask, kept))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ----- in the trainer ------------------------------------------------------------------------------------------------


def train(config, model, seen: list | None = None, conversational: bool = False, **overrides):
    """Train a few steps; `seen` gets the shapes of what the model computes while it is trained."""
    kwargs = {name: overrides.pop(name) for name in ("peft_config", "quantization_config") if name in overrides}
    args = config(**{"max_steps": 5, "beta": 0.01, "learning_rate": 1e-4, **overrides})
    trainer = IBTPOTrainer(model, tiny.even_length, args, tiny.questions(conversational=conversational), **kwargs)
    if seen is not None:

        def look(module, positional, keywords):
            if keywords.get("fused_lm_head"):
                seen.append(tuple(keywords["input_ids"].shape))

        trainer._base_model(trainer.model).register_forward_pre_hook(look, with_kwargs=True)
    trainer.start = {name: value.clone() for name, value in weights(trainer).items()}
    trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"gradient_checkpointing": True, "num_iterations": 2},
        {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},  # half a tree in a micro-batch
        {"branching": "independent", "tree_levels": 1, "tree_initial_rollouts": 8, "loss_type": "dapo"},
        {"ib_regularization_coef": 0.1, "shared_token_weight": "once", "max_steps": 3},
        {"peft_config": "lora"},
        # Rounded to 8 bits, log-probabilities differ enough for the second step to sample other tokens.
        {"bf16": True, "max_steps": 1},
        {"peft_config": "lora", "quantization_config": "4bit", "max_steps": 1},
    ],
    ids=lambda overrides: "-".join(map(str, overrides)) or "default",
)
def test_training_is_the_same(config, model_path, overrides):
    overrides = dict(overrides)
    if "peft_config" in overrides:
        overrides["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0)
    if "quantization_config" in overrides:
        overrides["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
        )
    shapes = {True: [], False: []}
    runs = {on: train(config, model_path, seen=shapes[on], packed_forward=on, **overrides) for on in (True, False)}
    assert {shape[0] for shape in shapes[True]} == {1}  # one row
    tokens = {on: sum(rows * length for rows, length in shapes[on]) for on in shapes}
    assert tokens[True] < 0.8 * tokens[False]
    tolerance = 1e-5 if overrides.get("max_steps") != 1 else 1e-3
    torch.testing.assert_close(weights(runs[True]), weights(runs[False]), atol=tolerance, rtol=0)
    logs = [[entry for entry in run.state.log_history if "loss" in entry] for run in runs.values()]
    for shared, plain in zip(*logs, strict=True):
        for key in {"loss", "entropy", "kl", "grad_norm", "reward"} & plain.keys():
            assert shared[key] == pytest.approx(plain[key], abs=tolerance, rel=1e-5 if tolerance == 1e-5 else 0.02), (
                key
            )


@pytest.mark.parametrize("bits", [16, 4])
def test_a_step_with_fewer_bits_moves_weights_alike(config, model_path, bits):
    """By plain gradient descent: Adam's first step is as long whatever the gradient."""
    kwargs = {"bf16": True}
    if bits == 4:
        four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.0)
        kwargs = {"peft_config": adapter, "quantization_config": four_bits}
    kwargs |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}
    runs = [train(config, model_path, packed_forward=on, **kwargs) for on in (True, False)]
    shared, plain = (
        torch.cat([(moved - run.start[name]).flatten() for name, moved in weights(run).items() if "quant" not in name])
        for run in runs
    )
    assert plain.norm() > 1e-2 and (shared - plain).norm() < 0.05 * plain.norm()


def test_a_whole_tree_is_in_a_micro_batch(config, model_path, monkeypatch):
    batches = []
    compute_loss = IBTPOTrainer._compute_loss
    monkeypatch.setattr(
        IBTPOTrainer,
        "_compute_loss",
        lambda self, model, inputs: batches.append(inputs["tree"]) or compute_loss(self, model, inputs),
    )
    orders = set()
    for seed in range(3):
        batches.clear()
        train(config, model_path, max_steps=1, gradient_accumulation_steps=4, seed=seed)
        assert [len(set(trees.tolist())) for trees in batches] == [1, 1, 1, 1]
        orders.add(tuple(int(trees[0]) for trees in batches))
        assert sorted(torch.cat(batches).tolist()) == [tree for tree in range(4) for _ in range(12)]
    assert len(orders) > 1  # trees are still shuffled


@pytest.mark.parametrize("field, value", [("torch_compile", True), ("neftune_noise_alpha", 5.0)])
def test_nothing_is_shared_where_that_would_change_something_else(config, model_path, field, value):
    trainer = IBTPOTrainer(model_path, tiny.even_length, config(**{field: value}), tiny.questions())
    assert not trainer._packed_forward and trainer._forward_reason.startswith(f"`{field}` ")


def test_keep_trees_together_moves_every_entry():
    rows = torch.tensor([3, 0, 2, 1])
    batches = [
        {"row": part, "ids": part[:, None] * 10, "text": [str(int(row)) for row in part], "count": torch.tensor(7)}
        | {"tree": part // 2, "none": None}
        for part in rows.split(2)
    ]
    first, second = keep_trees_together(batches)
    # The order within a tree is the shuffled one: what an optimizer step has of a tree is not always its first rows.
    assert first["row"].tolist() == [3, 2] and second["row"].tolist() == [0, 1]
    assert first["ids"].tolist() == [[30], [20]] and first["text"] == ["3", "2"]
    assert int(second["count"]) == 7 and second["none"] is None


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "use_sliding_window": True}
OTHER_MODELS = {
    "sliding layers": (Qwen3Config(**SHAPE, head_dim=16, **SLIDING), "sdpa", "layers of other kinds .*sliding_att"),
    "sliding window": (MistralConfig(**SHAPE, sliding_window=16), "sdpa", "a sliding window (of 16 tokens)"),
    "linear layers": (
        Qwen3_5TextConfig(
            **SHAPE,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        "sdpa",
        "layers of other kinds .*linear_attention",
    ),
    # Their layers do not pass keyword arguments on.
    "stablelm": (StableLmConfig(**SHAPE), "sdpa", "StableLmAttention is not given the keyword arguments"),
    "nemotron": (NemotronConfig(**SHAPE), "sdpa", "NemotronAttention is not given the keyword arguments"),
}


def save_model(shape, model_path, path, implementation: str = "sdpa") -> str:
    """A model of that configuration beside the tokenizer of `model_path`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    torch.manual_seed(0)
    shape = type(shape)(**{**shape.to_dict(), "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    AutoModelForCausalLM.from_config(shape, attn_implementation=implementation).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_where_it_is_not_exact_trl_computes(name, config, model_path, tmp_path, capsys):
    shape, implementation, reason = OTHER_MODELS[name]
    save_model(shape, model_path, tmp_path / "model", implementation)
    runs = []
    for packed_forward in (None, False):
        seen = []
        runs.append(train(config, str(tmp_path / "model"), seen, packed_forward=packed_forward, max_steps=2))
        assert {rows for rows, _ in seen} == {12}
        said = capsys.readouterr().out
        assert said.count("forward: TRL's") == 1
        if packed_forward is None:
            assert re.search(reason.replace("(of 16 tokens)", r"\(of 16 tokens\)"), said)
    assert weights(runs[0]).keys() == weights(runs[1]).keys()
    for key, value in weights(runs[0]).items():
        assert torch.equal(value, weights(runs[1])[key])
    with pytest.raises(ValueError, match="`packed_forward` is True, but the model"):
        train(config, str(tmp_path / "model"), packed_forward=True)


def test_a_model_that_takes_images_trains_on_text_with_trls_forward(config, tmp_path, capsys):
    model = tiny.save_tiny_vlm(tmp_path / "model")
    runs = []
    for packed_forward, reason in ((None, "the model takes images"), (False, "`packed_forward` is off")):
        seen = []
        runs.append(train(config, model, seen, conversational=True, packed_forward=packed_forward))
        assert {rows for rows, _ in seen} == {12}
        assert capsys.readouterr().out.count(f"forward: TRL's ({reason}).") == 1
    for key, value in weights(runs[0]).items():
        assert torch.equal(value, weights(runs[1])[key])
    with pytest.raises(ValueError, match="`packed_forward` is True, but the model takes images"):
        train(config, model, packed_forward=True)


def test_images_are_evaluated_as_in_trl(config, tmp_path):
    """Training on images is refused; an evaluation on them gives every number of TRL's."""
    model = tiny.save_tiny_vlm(tmp_path / "model")
    question = [{"role": "user", "content": "What is it?"}]
    images = Dataset.from_list(
        [{"prompt": question, "image": Image.new("RGB", (20, 20), (60 * i, 0, 0))} for i in range(4)]
    )
    args = config(beta=0.01)
    found = []
    for trainer_class, arguments in ((IBTPOTrainer, args), (GRPOTrainer, tiny.grpo_arguments(args))):
        text = tiny.questions(conversational=True)
        trainer = trainer_class(model, tiny.even_length, arguments, text, eval_dataset=images)
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():  # apart from the reference model
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        pixels = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=pixels: seen.append(kwargs.get("pixel_values")), with_kwargs=True
        )
        found.append(trainer.evaluate())
        assert any(each is not None for each in pixels)
    assert found[0].keys() == found[1].keys() and found[0]["eval_kl"] > 0
    for key in found[0].keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
        assert found[0][key] == found[1][key], key


def test_positions_that_depend_on_padding_are_left_alone():
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "vocab_size": 8}
    model = AutoModelForCausalLM.from_config(OPTConfig(**shape, word_embed_proj_dim=16))
    assert "positions are not rotary" in why_not_shared(model)


def flash_attention_on_cpu(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What the kernel computes, which no CPU has: causal attention over a mask of the tokens that are no padding."""
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :keys].bool() | torch.eye(keys, dtype=torch.bool)[-queries:]
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)


def test_flash_attention_is_left_alone(config, model_path, capsys, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_attention_on_cpu)
    runs, seen = [], []
    for packed_forward in (None, False):
        model = AutoModelForCausalLM.from_pretrained(model_path)
        assert why_not_shared(model) is None
        model.config._attn_implementation = "flash_attention_2"
        runs.append(train(config, model, seen, packed_forward=packed_forward, max_steps=2, beta=0.0))
        said = capsys.readouterr().out
        assert said.count("forward: TRL's") == 1
        assert ("'flash_attention_2', which takes no such mask" in said) == (packed_forward is None)
    assert {rows for rows, _ in seen} == {12}
    for key, value in weights(runs[0]).items():
        assert torch.equal(value, weights(runs[1])[key])


def test_a_model_says_the_same_after_it_was_prepared(model_path, tmp_path):
    """Generation, plain forwards and the saved configuration do not change."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    ids = torch.arange(5, 25).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    config = model.config.to_dict()
    prepare_model(model)
    assert torch.equal(before, model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(text, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert model.config.to_dict() == config


def test_what_comes_with_images_is_left_to_trl(config, model_path):
    """Whatever TRL passes beside text; such trainings are refused, evaluations are not."""
    trainer = IBTPOTrainer(model_path, tiny.even_length, config(), tiny.questions())
    ids, mask, kept = padded([([5, 6], [7, 8, 9]), ([5, 6], [7, 8])])
    theirs = GRPOTrainer._get_per_token_logps_and_entropies
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    arguments = (trainer.model, ids, mask, kept)
    found = trainer._get_per_token_logps_and_entropies(*arguments, token_type_ids=torch.zeros_like(ids))
    assert shapes == [(2, 5)] and torch.equal(found[0], theirs(trainer, *arguments)[0])
    trainer._get_per_token_logps_and_entropies(*arguments)
    assert shapes[-1] == (1, 5)  # "5 6 7 8 9": the other row is a prefix of it


# ----- sharing that says exact is exact ------------------------------------------------------------------------------


def without_positions(model) -> None:
    """Code that makes its own positions, as in a row without branches."""

    def drop(module, args, kwargs):
        return args, {**kwargs, "position_ids": None}

    model.model.register_forward_pre_hook(drop, with_kwargs=True)


def with_a_look_back(model) -> None:
    """A layer that mixes each token with the one before it, as short convolutions do."""

    def look_back(module, args, output):
        return output + torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    model.model.embed_tokens.register_forward_hook(look_back)


@pytest.mark.parametrize("first_batch", [False, True], ids=["at once", "on the first batch"])
@pytest.mark.parametrize("change", [without_positions, with_a_look_back])
def test_a_model_whose_configuration_does_not_tell(change, first_batch, config, model_path, capsys):
    """The numbers differ, so TRL's forward computes: as in a run without sharing, and aloud."""
    runs, sentence = [], r"the model's log-probabilities would differ from those of TRL's forward by up to [\d.]+ nats"
    place = {"bf16_full_eval": first_batch}  # then the trainer places the model when training begins
    for packed_forward in (None, False):
        model, seen = AutoModelForCausalLM.from_pretrained(model_path), []
        change(model)
        runs.append(train(config, model, seen, packed_forward=packed_forward, max_steps=2, **place))
        said = capsys.readouterr().out
        assert said.count("forward: TRL's") == 1
        assert bool(re.search(rf"forward: TRL's \({sentence}, where rounding explains", said)) != (
            packed_forward is False
        )
        assert ("if the comparison with TRL's on the first batch" in said) == (first_batch and packed_forward is None)
        assert model.config._attn_implementation == "sdpa"
    assert {rows for rows, _ in seen} == {12}
    for key, value in weights(runs[0]).items():
        assert torch.equal(value, weights(runs[1])[key])
    model = AutoModelForCausalLM.from_pretrained(model_path)
    change(model)
    with pytest.raises(ValueError, match=f"`packed_forward` is True, but {sentence}"):
        train(config, model, packed_forward=True, **place)


def test_the_comparison_on_the_first_batch_comes_before_anything_is_shared(config, model_path, capsys):
    shapes = []
    trainer = train(config, model_path, shapes, bf16_full_eval=True)
    said = capsys.readouterr().out
    assert "forward: prefix-shared, if the comparison with TRL's on the first batch shows it to be exact." in said
    assert said.count("IB-TPO: forward: prefix-shared (exact for this model).") == 1
    batch = comparison_batch(320)[0].shape
    assert shapes[:3].count(tuple(batch)) == 2 and shapes[3][0] == 1  # padded, padded more, padded again, shared
    assert {rows for rows, _ in shapes[4:]} == {1}
    plain = train(config, model_path, packed_forward=False, bf16_full_eval=True)
    torch.testing.assert_close(weights(trainer), weights(plain), atol=1e-5, rtol=0)


def test_the_comparison_leaves_no_traces(config, model_path):
    """Neither random numbers nor modes nor gradients; dropout would use all three."""
    states = []
    for packed_forward in (True, False):
        model = AutoModelForCausalLM.from_pretrained(model_path, attention_dropout=0.5)
        model.train()
        model.lm_head.eval()
        modes = [module.training for module in model.modules()]
        trainer = IBTPOTrainer(
            model, tiny.even_length, config(packed_forward=packed_forward, beta=0.01), tiny.questions()
        )
        assert trainer._packed_forward == packed_forward
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_adapter_that_looks_for_its_tokens_in_a_row(config, model_path):
    """A new adapter adds nothing, so the comparison before the first step could not tell."""
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    trainer = IBTPOTrainer(model_path, tiny.even_length, config(), tiny.questions(), peft_config=adapter)
    assert not trainer._packed_forward and "`alora_invocation_tokens`" in trainer._forward_reason


def test_a_reference_model_of_other_code_is_compared_as_well(config, model_path):
    trainer = IBTPOTrainer(model_path, tiny.even_length, config(beta=0.01), tiny.questions())
    assert trainer._packed_forward
    with_a_look_back(trainer.ref_model)
    trainer._choose_forward()
    assert not trainer._packed_forward and "would differ" in trainer._forward_reason
    assert {each.config._attn_implementation for each in (trainer.model, trainer.ref_model)} == {"sdpa"}


def reason_of(model, precision: str) -> str | None:
    return why_not_exact(
        lambda *batch: fused_head(model, *batch, None)[0],
        lambda *batch: fused_head(model, *batch, share_prefixes(*batch))[0],
        lambda: prepare_model(model),
        VOCABULARY,
        "cpu",
        precision,
    )


@pytest.mark.parametrize("change", [None, without_positions, with_a_look_back])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_tolerance_tells_rounding_from_errors(name, dtype, change):
    model = make_model(name, dtype=dtype)
    if change is not None:
        change(model)
    with torch.no_grad():
        reason = reason_of(model, "full" if dtype == torch.float32 else "reduced")
    assert reason is None if change is None else "would differ" in reason


def test_no_number_is_no_agreement():
    batch = comparison_batch(VOCABULARY)
    broken = torch.full(batch[0].shape, torch.nan)
    assert "by up to inf nats" in why_not_exact(
        lambda *_: broken, lambda *_: broken, lambda: None, VOCABULARY, "cpu", "full"
    )


def test_attention_without_the_batch_is_an_error():
    """Not a forward in which every token sees every other one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(StableLmConfig(**SHAPE))
    add_fused_lm_head(model)
    ids, mask, kept = padded([([1, 2], [3, 4, 5]), ([1, 2], [3, 6])])
    before = model(ids, attention_mask=mask).logits
    prepare_model(model)
    with pytest.raises(MissingBatchError, match=r"StableLmAttention is not given .* `packed_forward=False` does"):
        shared_logps_and_entropies(model, model, share_prefixes(ids, mask, kept))
    assert torch.equal(before, model(ids, attention_mask=mask).logits)
    one = torch.ones(1, 1, dtype=torch.long)
    assert model.generate(one, attention_mask=one, max_new_tokens=3, min_new_tokens=3).shape == (1, 4)


def test_windows_of_any_name_are_found():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, local_window_size=16))
    assert why_not_shared(model) == "the model attends to a sliding window (of 16 tokens)"
    unused = Qwen3Config(**SHAPE, head_dim=16, sliding_window=16, use_sliding_window=False)
    assert why_not_shared(AutoModelForCausalLM.from_config(unused)) is None


FAMILIES = {
    **dict.fromkeys(["llama", "qwen3", "olmo2", "phi3", "mixtral", "deepseek_v3", "gpt_neox"], ""),
    **dict.fromkeys(["stablelm", "nemotron"], "is not given the keyword arguments"),
    "gemma2": "layers of other kinds than full attention",
    "opt": "positions are not rotary",
    "xlm": "not built: its small configuration still has",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """A few of `benchmarks.architectures`: each is exact, or says why it is not shared."""
    row = architectures.compare(CONFIG_MAPPING[family])
    assert row["architecture"] == family and row["shared"] == (FAMILIES[family] == "")
    assert FAMILIES[family] in row["reason"]
    assert row["max_logp_diff"] < 1e-4 if row["shared"] else row["max_logp_diff"] is None


# ----- mixtures of experts -------------------------------------------------------------------------------------------

EXPERTS = Qwen3MoeConfig(**SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def test_a_load_balancing_loss_needs_every_row(config, model_path, tmp_path, capsys):
    path, runs = save_model(EXPERTS, model_path, tmp_path / "model"), []
    for packed_forward in (None, False):
        seen = []
        runs.append(train(config, path, seen, packed_forward=packed_forward, max_steps=2))
        assert {rows for rows, _ in seen} == {12}
        said = capsys.readouterr().out
        assert said.count("forward: TRL's (the load-balancing loss of the mixture of experts") == (not runs[1:])
        assert ("`router_aux_loss_coef=0` instead of 0.001" in said) == (not runs[1:])
        assert "aux_loss" in runs[-1].state.log_history[0]
    for key, value in weights(runs[0]).items():
        assert torch.equal(value, weights(runs[1])[key])
    with pytest.raises(ValueError, match="`packed_forward` is True, but the load-balancing loss"):
        train(config, path, packed_forward=True)


def test_without_that_loss_experts_share_prefixes(config, model_path, tmp_path):
    """Experts are chosen token by token."""
    path, runs = save_model(EXPERTS, model_path, tmp_path / "model"), []
    for packed_forward in (True, False):
        seen = []
        runs.append(train(config, path, seen, packed_forward=packed_forward, router_aux_loss_coef=0.0))
        assert {rows for rows, _ in seen[4 * packed_forward :]} == {1 if packed_forward else 12}
        assert "aux_loss" not in runs[-1].state.log_history[0]
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-5, rtol=0)


def test_router_logits_that_nobody_asks_for():
    """TRL's head would make a loss of them, and it takes masks of two dimensions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPERTS)
    model.config.output_router_logits = True
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    assert reason_of(model, "full") is None


# ----- positions and devices -----------------------------------------------------------------------------------------

ROTARY = {
    "default": {"rope_type": "default"},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_frequencies_that_depend_on_the_longest_position(kind):
    """A batch is padded beyond the 16 positions of training, and the rows of this micro-batch are shorter."""
    shape = {**SHAPE, "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = Qwen3Config(**shape, head_dim=16, rope_parameters={"rope_theta": 100.0, **ROTARY[kind]})
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    prepare_model(models[1])
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids, mask, kept = padded([([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3], [4, 5, 8])])
    for extra in (0, 20, 40, 2, 20):  # the frequencies remember earlier batches
        wide = [torch.nn.functional.pad(each, (0, extra)) for each in (ids, mask)]
        with torch.no_grad():
            expected = fused_head(models[0], *wide, kept + extra, None)
            found = fused_head(models[1], *wide, kept + extra, share_prefixes(*wide, kept + extra))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_layers_on_several_devices():
    """A layer attends on its own device, wherever the batch is; what it needs there is made once."""
    shared = share_prefixes(*padded([([1, 2], [3, 4, 5]), ([1, 2], [3, 6])]))
    length = shared.input_ids.shape[1]
    module = torch.nn.Module()
    for device in ("cpu", "meta", "cpu"):
        query, key, value = torch.randn(3, 1, 2, length, 8, device=device)
        out, _ = _trie_attention(module, query, key, value, None, shared_batch=shared)
        assert out.device.type == device and out.shape == (1, length, 2, 8)
    for device in (torch.device("cpu"), torch.device("meta")):
        indices = shared.segment_indices(device)
        assert {each.device for _, keys, mask in indices if keys is not None for each in (keys, mask)} == {device}
        assert shared.segment_indices(device) is indices


def causal_from_the_bottom_right(query, key, value, query_offsets, key_offsets, most_queries, most_keys, **options):
    """What flash attention computes of sequences of unequal lengths, one after another."""
    assert options["window_size"] == (-1, 0) and query_offsets.dtype == key_offsets.dtype == torch.int32
    outputs = []
    for number in range(len(query_offsets) - 1):
        own, seen = (slice(*offsets[number : number + 2].tolist()) for offsets in (query_offsets, key_offsets))
        queries, keys = own.stop - own.start, seen.stop - seen.start
        assert 0 < queries <= most_queries and queries <= keys <= most_keys
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[own].transpose(0, 1),
                key[seen].transpose(0, 1),
                value[seen].transpose(0, 1),
                attn_mask=torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries),
                scale=options["scale"],
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@settings(max_examples=25, deadline=None, database=None)
@given(batches(), st.sampled_from([1, 2, 4]))
def test_one_call_of_flash_attention_is_all_segments(rows, groups):
    """The kernel itself runs on GPUs alone, where `benchmarks.packed_forward` compares it with TRL's forward."""
    shared = share_prefixes(*padded(rows))
    length = shared.input_ids.shape[1]
    query = torch.randn(1, 4, length, 16, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 4 // groups, length, 16, dtype=torch.float64, requires_grad=True) for _ in "kv")
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    weights, found = torch.randn(1, length, 4, 16, dtype=torch.float64), []
    for output in (
        _trie_attention(module, query, key, value, None, shared_batch=shared, scaling=0.3)[0],
        flash_along_trie(query, key, value, shared.sequences(key.device), 0.3, causal_from_the_bottom_right),
    ):
        gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
        found.append((output, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16, "width": 256}, True),
        ({"dtype": torch.float32}, False),
        ({"width": 12}, False),
        ({"width": 320}, False),
        ({"value_width": 32}, False),
        ({"capability": (7, 5)}, False),
        ({"width": 208, "capability": (9, 0)}, True),
        ({"width": 208, "capability": (8, 6)}, False),
        ({"options": {"dropout": 0.1}}, False),
        ({"options": {"dropout": 0.0, "softcap": 30.0}}, False),
        ({"options": {"s_aux": torch.zeros(4)}}, False),
        ({"kernel": lambda query, key, value, is_causal: query}, False),  # that of torch 2.10
        ({"kernel": None}, False),
        ({"built": False}, False),
    ],
)
def test_where_flash_attention_can_be_had(change, expected, monkeypatch):
    """As the GPU and torch's build would answer."""
    asked = {"dtype": torch.bfloat16, "width": 64, "capability": (9, 0), "options": {}, "built": True} | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: asked["built"])
    if "kernel" in asked:
        monkeypatch.setattr(attention, "varlen_attn", asked["kernel"])
    query = torch.zeros(1, 4, 3, asked["width"], dtype=asked["dtype"])
    value = torch.zeros(1, 4, 3, asked.get("value_width", asked["width"]), dtype=asked["dtype"])
    assert attention._has_flash_attention(query, value, asked["options"]) == expected


def test_hooks_that_move_arguments_leave_the_batch_as_it_is():
    """Models on several devices have accelerate's hooks: they move tensors, not what is inside the batch."""
    shared = share_prefixes(*padded([([1, 2], [3, 4, 5]), ([1, 2], [3, 6])]))
    model = make_model("qwen3")
    prepare_model(model)
    arguments = send_to_device(model_arguments(model, shared), torch.device("meta"))
    assert arguments["shared_batch"] is shared and shared.input_ids.device.type == "cpu"
    assert {arguments[name].device.type for name in ("input_ids", "position_ids", "attention_mask")} == {"meta"}


def test_a_model_on_several_devices(config, model_path):
    """Dispatched as transformers does it, here to one kind of device."""
    runs = []
    for packed_forward in (True, False):
        model = AutoModelForCausalLM.from_pretrained(model_path)
        layers = {f"model.layers.{number}": "cpu" for number in range(2)}
        rest = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        dispatch_model(model, {**layers, **rest}, main_device="cpu", force_hooks=True)
        runs.append(train(config, model, packed_forward=packed_forward))
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-5, rtol=0)
