"""A tiny Qwen3 that samples with less bookkeeping, so that a run of `benchmarks.learning` costs a third.

With two layers and a few dozen rows, nearly all of the time of `generate` goes into Python around the model. Trainers
call `generate` of the model they are given, so they stay as they are.
"""

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, Qwen3ForCausalLM


class QuickQwen3(Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with plain sampling at temperature 1: a cache of fixed size, no options."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=(),
        stopping_criteria=(),
        synced_gpus: bool = False,
        max_new_tokens: int | None = None,
    ) -> torch.Tensor:
        """As in transformers: prompts padded on the left, rows that have ended are filled with the padding token."""
        options = generation_config or GenerationConfig()
        if (options.temperature or 1.0) != 1.0 or options.top_k or (options.top_p or 1.0) != 1.0:
            raise ValueError(f"This model samples at temperature 1 without truncation, not with {options}.")
        rows, begin = input_ids.shape
        end = begin + (max_new_tokens or options.max_new_tokens)
        stops = torch.tensor(self.config.eos_token_id).view(-1)
        sequences = torch.full((rows, end), self.config.pad_token_id)
        sequences[:, :begin] = input_ids
        present = torch.ones(rows, end, dtype=torch.bool)
        if attention_mask is not None:
            present[:, :begin] = attention_mask.bool()
        step = _Step(self, present)
        ended = torch.zeros(rows, dtype=torch.bool)
        for place in range(begin, end):
            scores = step(sequences, 0 if place == begin else place - 1, place)
            so_far = sequences[:, :place]
            for processor in logits_processor:
                scores = processor(so_far, scores)
            chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            sequences[:, place] = torch.where(ended, self.config.pad_token_id, chosen)
            ended |= torch.isin(chosen, stops)
            for criterion in stopping_criteria:
                ended |= criterion(sequences[:, : place + 1], scores)
            if ended.all():
                return sequences[:, : place + 1]
        return sequences


class _Step:
    """Computes the next tokens' logits, and keeps the keys and values of all tokens before."""

    def __init__(self, model: Qwen3ForCausalLM, present: torch.Tensor):
        config, inner = model.config, model.model
        self._heads, self._size, self._eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        if config.num_key_value_heads != self._heads:
            raise ValueError("This model shares no keys and values between heads.")
        self._embed, self._norm, self._head = inner.embed_tokens.weight, inner.norm.weight, model.lm_head.weight
        self._layers = []
        shape = present.shape[0], self._heads, present.shape[1], self._size
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._layers.append(
                (
                    layer.input_layernorm.weight,
                    torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
                    torch.stack([attention.q_norm.weight, attention.k_norm.weight])[:, None],
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                    torch.zeros(shape),
                    torch.zeros(shape),
                )
            )
        positions = (present.long().cumsum(1) - 1).clamp(min=0)
        cos, sin = inner.rotary_emb(self._embed, positions)  # (B, T, D)
        self._cos = cos[:, :, None, None]
        half = self._size // 2
        self._sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None, None]
        self._hidden = torch.zeros(present.shape).masked_fill(~present, torch.finfo(torch.float32).min)

    def __call__(self, sequences: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Logits after the token before `end`, `(B, V)`, of tokens `begin` to `end`, whose past is in the cache."""
        rows, new, half = len(sequences), end - begin, self._size // 2
        mask = self._hidden[:, None, None, :end]
        if new > 1:
            future = torch.ones(new, end, dtype=torch.bool).triu(1 + begin)
            mask = mask.masked_fill(future, torch.finfo(torch.float32).min)
        cos, sin = self._cos[:, begin:end], self._sin[:, begin:end]
        x = F.embedding(sequences[:, begin:end], self._embed)
        for first_norm, qkv, qk_norm, out, second_norm, gate_up, down, keys, values in self._layers:
            q_k_v = F.linear(F.rms_norm(x, x.shape[-1:], first_norm, self._eps), qkv)
            q_k_v = q_k_v.view(rows, new, 3, self._heads, self._size)
            qk = F.rms_norm(q_k_v[:, :, :2], (self._size,), None, self._eps) * qk_norm
            qk = qk * cos + qk.roll(half, -1) * sin
            keys[:, :, begin:end] = qk[:, :, 1].transpose(1, 2)
            values[:, :, begin:end] = q_k_v[:, :, 2].transpose(1, 2)
            query = qk[:, :, 0].transpose(1, 2) * self._size**-0.5
            weights = (query @ keys[:, :, :end].transpose(2, 3)).add_(mask).softmax(-1)
            mixed = weights @ values[:, :, :end]
            x = x + F.linear(mixed.transpose(1, 2).reshape(rows, new, -1), out)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], second_norm, self._eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x[:, -1], x.shape[-1:], self._norm, self._eps), self._head)
