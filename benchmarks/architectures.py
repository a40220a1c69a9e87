"""For which architectures the prefix-shared forward is exact: all causal language models of transformers, built small.

    python -m benchmarks.architectures [--quick] [--json FILE]

Each architecture gets a configuration of a few thousand parameters and random weights, large enough for attention to
matter. `shared` is what a trainer would decide, `reason` why not, and `max_logp_diff` by how much log-probabilities of
both forwards differ, in nats, where the shared one was compared. An architecture that cannot be built small says why.
"""

import warnings
from contextlib import suppress
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer.utils import add_fused_lm_head

from benchmarks import common
from trl_ibtpo.prefix_sharing.attention import prepare_model, shared_logps_and_entropies, why_not_shared
from trl_ibtpo.prefix_sharing.comparison import comparison_batch, why_not_exact
from trl_ibtpo.prefix_sharing.trie import share_prefixes

VOCABULARY = 64
MOST_PARAMETERS = 10_000_000
NOT_BUILT = "not built: "
QUICK = ["qwen3", "llama", "gemma", "mixtral", "phi3", "olmo2", "stablelm", "nemotron", "opt", "mamba", "gemma2"]
# Fields of configurations and their small values, by the name's end; a field that a configuration lacks is left out.
SMALL = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "attention_hidden_size", "embedding_size"], 64),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "num_query_groups"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "attention_head_dim", "v_head_dim", "qk_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}
SMALL_ENDINGS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "dim_ff")


class CannotBuildError(Exception):
    """The reason why an architecture has no small model here."""


def small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The class's default configuration with small sizes."""
    default = config_class()
    if default.sub_configs:
        raise CannotBuildError(
            "a model of several parts; its text model is an architecture of its own where it is one"
        )
    values = {}
    for name, value in default.to_dict().items():
        if name in SMALL and type(value) in (int, type(None)):
            values[name] = SMALL[name]
        elif name.endswith(SMALL_ENDINGS) and type(value) is int:
            values[name] = 96
    if "kv_lora_rank" in values:  # latent attention
        values |= {"head_dim": values["qk_rope_head_dim"], "num_key_value_heads": SMALL["num_attention_heads"]}
    return config_class(**values | OWN.get(config_class.model_type, {}))


def build(config_class: type[PreTrainedConfig], dtype=torch.float32) -> transformers.PreTrainedModel:
    """A model with random weights, in evaluation mode and with TRL's fused head."""
    try:
        config = small_config(config_class)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise CannotBuildError(f"its small configuration still has {size / 1e6:.0f}M parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():  # larger than at the start of training, so that attention matters
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        add_fused_lm_head(model)
    except CannotBuildError:
        raise
    except Exception as error:
        raise CannotBuildError(f"building it ends in {described(error)}") from error
    return model


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def padded_logps(model, ids, mask, kept) -> torch.Tensor:
    """As TRL computes them."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-kept] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -kept:]


def shared_logps(model, ids, mask, kept) -> torch.Tensor:
    return shared_logps_and_entropies(model, model, share_prefixes(ids, mask, kept))[0]


@torch.no_grad()
def compare(config_class: type[PreTrainedConfig], dtype=torch.float32) -> dict[str, Any]:
    """One row of the table."""
    row = {"architecture": config_class.model_type, "shared": False, "reason": "", "max_logp_diff": None}
    try:
        model = build(config_class, dtype)
    except CannotBuildError as error:
        return {**row, "reason": f"{NOT_BUILT}{error}"}
    batch = comparison_batch(VOCABULARY)
    reason = why_not_shared(model)
    if reason is None:
        try:
            expected = padded_logps(model, *batch)
        except Exception as error:
            return {**row, "reason": f"{NOT_BUILT}TRL's own forward of it ends in {described(error)}"}
        reason = why_not_exact(
            lambda *batch: padded_logps(model, *batch),
            lambda *batch: shared_logps(model, *batch),
            lambda: prepare_model(model),
            VOCABULARY,
            "cpu",
            "full" if dtype == torch.float32 else "reduced",
        )
        with suppress(Exception):  # it is named in `reason`
            row["max_logp_diff"] = float((expected - shared_logps(model, *batch)).abs().max())
    return {**row, "shared": reason is None, "reason": reason or ""}


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    args = arguments.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    classes = [each for each in MODEL_FOR_CAUSAL_LM_MAPPING if not args.quick or each.model_type in QUICK]
    rows = [compare(each) for each in tqdm(classes, unit="model")]
    rows.sort(key=lambda row: (not row["shared"], row["max_logp_diff"] is None, row["reason"], row["architecture"]))
    shared = sum(row["shared"] for row in rows)
    built = sum(not row["reason"].startswith(NOT_BUILT) for row in rows)
    common.report(
        f"Prefix sharing is exact for {shared} of {built} architectures; {len(rows) - built} were not built",
        rows,
        args,
    )


if __name__ == "__main__":
    main()
