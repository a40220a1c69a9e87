"""How a model attends along the trie of a shared batch, and for which models that is exact."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .trie import Sequences, SharedBatch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10; the arguments that are needed came with 2.11
    varlen_attn = None

TRIE_ATTENTION = "ibtpo_trie"  # sdpa, and along the trie where a shared batch comes with the forward
# In place of a mask where the batch says who attends to whom. transformers takes a mask of four dimensions as it is,
# and one of no keys fits no attention: a layer that gets it without the batch cannot go on.
_NO_KEYS = torch.ones(1, 1, 1, 0, dtype=torch.bool)

DENSE_LIMIT = 8192  # tokens of a shared batch whose mask of all positions still fits a GPU: 256 MiB in float32

UNUSED_WINDOWS = {"max_window_layers"}  # fields of configurations that are no number of tokens


class MissingBatchError(RuntimeError):
    """A prefix-shared forward reached an attention layer without its batch: it would attend to anything."""


def _trie_attention(module, query, key, value, attention_mask, shared_batch: SharedBatch | None = None, **kwargs):
    """Scaled dot-product attention along a shared batch, `(1, H, L, D)` each.

    Each segment costs what it costs in a row of its own, where a mask of all positions costs the square of all of
    them. On a CPU the segments are computed one after another. A GPU would wait for the launch of each: there all of
    them are one call of flash attention, or, where that cannot be had and the batch is small, of one mask.
    """
    if shared_batch is None:
        if attention_mask is not None and not attention_mask.shape[-1]:
            raise MissingBatchError(
                f"{type(module).__name__} is not given the keyword arguments of the model's forward, which say what "
                "each token attends to; `packed_forward=False` does without them"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.is_cuda:
        queries, keys, values = _as_autocast(query, key, value)
        if _has_flash_attention(queries, values, kwargs):
            sequences = shared_batch.sequences(query.device)
            return flash_along_trie(queries, keys, values, sequences, kwargs.get("scaling"), varlen_attn), None
        if query.shape[2] <= DENSE_LIMIT:
            mask = shared_batch.additive_mask(query.device, queries.dtype)
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    outputs = []
    for own, keys, mask in shared_batch.segment_indices(query.device):
        key_part, value_part = (
            (key[:, :, own], value[:, :, own])
            if keys is None
            else (key.index_select(2, keys), value.index_select(2, keys))
        )
        outputs.append(sdpa_attention_forward(module, query[:, :, own], key_part, value_part, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As autocast would have it, which knows torch's own attention and not `varlen_attn`."""
    if not torch.is_autocast_enabled("cuda"):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors]


def _has_flash_attention(query: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's kernel computes this: 16 bits, a GPU since Ampere, nothing but scaled dot products."""
    width, capability = query.shape[-1], torch.cuda.get_device_capability(query.device)
    return (
        varlen_attn is not None
        and {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()
        and torch.backends.cuda.is_flash_attention_available()
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[-1]
        and width <= 256
        and width % 8 == 0
        and capability >= (8, 0)
        and (not 192 < width <= 224 or capability in ((8, 0), (9, 0)))  # its backward pass has more conditions
        and not options.get("dropout")
        and options.get("softcap") is None
        and options.get("s_aux") is None
    )


def flash_along_trie(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scaling: float | None,
    kernel: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention of all segments in one call of a kernel for sequences of unequal lengths.

    Args:
        query: `(1, H, L, D)`.
        key, value: `(1, H', L, D)`, each of the `H'` heads for `H / H'` heads of the queries.
        sequences: of the shared batch.
        scaling: of the dot products; None for `1 / sqrt(D)`.
        kernel: such as `torch.nn.attention.varlen.varlen_attn`, causal from the bottom right.

    Returns:
        `(1, L, H, D)`.
    """
    groups = query.shape[1] // key.shape[1]
    seen = [part[0].transpose(0, 1).index_select(0, sequences.keys) for part in (key, value)]
    if groups > 1:
        seen = [part.repeat_interleave(groups, dim=1) for part in seen]
    return kernel(
        query[0].transpose(0, 1),
        *seen,
        sequences.query_offsets,
        sequences.key_offsets,
        sequences.most_queries,
        sequences.most_keys,
        scale=scaling,
        window_size=(-1, 0),
    )[None]


AttentionInterface.register(TRIE_ATTENTION, _trie_attention)
AttentionMaskInterface.register(TRIE_ATTENTION, sdpa_mask)


def model_arguments(model: PreTrainedModel, shared: SharedBatch) -> dict[str, Any]:
    """Arguments with which the forward of `model` attends along the trie."""
    config = model.config.get_text_config()
    arguments: dict[str, Any] = {"input_ids": shared.input_ids, "position_ids": shared.position_ids}
    if getattr(config, "output_router_logits", False):
        arguments["output_router_logits"] = False  # the loss that TRL's head makes of them takes no such masks
    implementation = config._attn_implementation
    if implementation == TRIE_ATTENTION:
        return {**arguments, "attention_mask": _NO_KEYS.to(shared.input_ids.device), "shared_batch": shared}
    if implementation == "flex_attention":
        return {**arguments, "attention_mask": shared.block_mask()}
    return {**arguments, "attention_mask": shared.additive_mask(shared.input_ids.device, model.dtype)}


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why the prefix-shared forward would not be exact, as far as the configuration tells; None where it may be."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        return f"the model has layers of other kinds than full attention ({', '.join(sorted(layer_types))})"
    unused = UNUSED_WINDOWS if getattr(config, "use_sliding_window", True) else {*UNUSED_WINDOWS, "sliding_window"}
    for name, value in config.to_dict().items():  # whatever code of a model's own calls it
        if ("window" in name or "attention_chunk" in name) and name not in unused and type(value) is int and value > 0:
            return f"the model attends to a sliding window (of {value} tokens)"
    if not getattr(config, "rope_parameters", None):
        return "the model's positions are not rotary, so they may depend on the padding"
    if not model._can_set_attn_implementation():
        return "the model computes its attention in a way of its own"
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "flex_attention", TRIE_ATTENTION):
        return (
            f"`attn_implementation` is '{implementation}', which takes no such mask; 'sdpa', 'eager' and "
            "'flex_attention' do"
        )
    return None


def prepare_model(model: PreTrainedModel) -> None:
    """Let `model` attend along the trie of a shared batch; its other forwards stay as they are."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(TRIE_ATTENTION)


def restore_model(model: PreTrainedModel) -> None:
    """Undo `prepare_model`."""
    if model.config.get_text_config()._attn_implementation == TRIE_ATTENTION:
        model.set_attn_implementation("sdpa")


def shared_logps_and_entropies(
    model: torch.nn.Module, base_model: PreTrainedModel, shared: SharedBatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and entropies of the completion tokens, both `(B, C)`, zero where there is none.

    Args:
        model: with TRL's fused head; possibly wrapped.
        base_model: the transformers model inside.
        shared: the batch.
    """
    outputs = model(
        **model_arguments(base_model, shared),
        shift_labels=shared.shift_labels,
        fused_lm_head=True,
    )
    entropies = None if outputs.entropy is None else shared.unpack(outputs.entropy)
    return shared.unpack(outputs.log_probs), entropies
