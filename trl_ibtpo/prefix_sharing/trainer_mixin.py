"""Hooks into TRL's trainer for the prefix-shared forward: which batches go through it, and when it is exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import PreTrainedModel
from trl.trainer.utils import split_tensor_dict

from .attention import prepare_model, restore_model, shared_logps_and_entropies, why_not_shared
from .comparison import why_not_exact
from .trie import SharedBatch, share_prefixes


class PrefixSharedForward:
    """For a `GRPOTrainer`: policy, old and reference log-probabilities compute each shared token once."""

    _packed_forward = False  # until it was seen to be exact
    _compare_first = False  # on the first batch, before anything else

    def _prepare_inputs(self, generation_batch):
        if self._compare_first:
            self._compare_first = False
            self._settle(self._why_not_exact())
            self.accelerator.print(f"IB-TPO: forward: {self._forward_in_words()}.")
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._packed_forward and self.model.training and self._buffered_inputs is not before:
            # TRL shuffles rows; what shares tokens has to be in one micro-batch.
            self._buffered_inputs = keep_trees_together(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        shared_batches = [None]
        # The load-balancing loss of a mixture of experts counts tokens, so it would change.
        if self._packed_forward and not compute_aux_loss and all(value is None for value in multimodal.values()):
            size = batch_size or len(input_ids)
            shared_batches = [
                share_prefixes(input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep)
                for start in range(0, len(input_ids), size)
            ]
        if None in shared_batches:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **multimodal,
            )
        logps, entropies = zip(*[self._shared_forward(model, shared) for shared in shared_batches], strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _shared_forward(self, model: torch.nn.Module, shared: SharedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self.accelerator.autocast():
            return shared_logps_and_entropies(model, self._base_model(model), shared)

    def _base_model(self, model: torch.nn.Module) -> PreTrainedModel:
        """The transformers model inside wrappers and adapters."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    # ----- which forward --------------------------------------------------------------------------------------------

    def _choose_forward(self) -> None:
        """Settle which forward runs, before the first step where it can be.

        Once the models are where they compute, they are compared at once. Weights that are still to be sharded or
        moved (FSDP, DeepSpeed) cannot be computed with yet: then the first batch begins with the comparison, on every
        process alike. It uses neither gradients nor torch's random numbers.
        """
        reason = self._why_not_possible()
        self._compare_first = reason is None and not (self.place_model_on_device or self.is_model_parallel)
        if not self._compare_first:
            self._settle(reason or self._why_not_exact())

    def _settle(self, reason: str | None) -> None:
        """Share prefixes, or run TRL's forward for a reason: aloud, and an error where sharing was asked for."""
        self._packed_forward, self._forward_reason = reason is None, reason or "exact for this model"
        if reason is not None and self.args.packed_forward:
            raise ValueError(f"`packed_forward` is True, but {reason}. Leave it out to use TRL's forward here.")

    def _forward_in_words(self) -> str:
        if self._compare_first:
            return "prefix-shared, if the comparison with TRL's on the first batch shows it to be exact"
        forward = "prefix-shared" if self._packed_forward else "TRL's"
        return f"{forward} ({self._forward_reason})"

    def _why_not_possible(self) -> str | None:
        """What arguments and configurations tell."""
        if self.args.packed_forward is False:
            return "`packed_forward` is off"
        if self.args.torch_compile:
            return "`torch_compile` is on, and would compile anew for every batch, each of which has its own layout"
        if self.args.neftune_noise_alpha is not None:
            return "`neftune_noise_alpha` scales its noise by the length of a row, and sharing makes one row of all"
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            return "the adapter puts virtual tokens before the prompt"
        if is_peft_model(model) and any(
            getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()
        ):
            return "the adapter looks for its invocation tokens (`alora_invocation_tokens`) row by row"
        if getattr(self.processing_class, "tokenizer", None) is not None:
            return "the model takes images"
        if self.aux_loss_enabled:
            return (
                "the load-balancing loss of the mixture of experts counts the tokens of every row (with "
                f"`router_aux_loss_coef=0` instead of {self.router_aux_loss_coef:g} there is none)"
            )
        if self.is_model_parallel and self._base_model(self.model).config._attn_implementation == "flex_attention":
            return "the model's layers are on several devices, and the mask of 'flex_attention' is on one"
        reasons = [why_not_shared(self._base_model(model)) for model in self._models_in_use()]
        return next((reason for reason in reasons if reason is not None), None)

    def _why_not_exact(self) -> str | None:
        """What a small batch tells; the same on all processes."""
        reasons = []
        padded_forward = super()._get_per_token_logps_and_entropies
        for model in self._models_in_use():
            base_model = self._base_model(model)

            def padded(*batch, model=model):
                return padded_forward(model, *batch)[0]

            def shared(*batch, model=model):
                return self._shared_forward(model, share_prefixes(*batch))[0]

            prepare, vocabulary = partial(prepare_model, base_model), base_model.config.get_text_config().vocab_size
            device, precision = self.accelerator.device, self._precision(base_model)
            with _without_traces(model):
                reasons.append(why_not_exact(padded, shared, prepare, vocabulary, device, precision))
        reason = next((reason for reason in gather_object(reasons) if reason is not None), None)
        if reason is not None:
            for model in self._models_in_use():
                restore_model(self._base_model(model))
        return reason

    def _models_in_use(self) -> list[torch.nn.Module]:
        return [model for model in (self.model, self.ref_model) if model is not None]

    def _precision(self, model: PreTrainedModel) -> str:
        """GPUs multiply float32 with fewer bits, autocast casts it, and quantized weights are unpacked to 16 bits."""
        full = (
            self.accelerator.device.type == "cpu"
            and self.accelerator.mixed_precision == "no"
            and all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
        )
        return "full" if full else "reduced"


@contextmanager
def _without_traces(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and afterwards every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # On some processors bitsandbytes repacks 4-bit weights for good when they are first used for inference, in a
        # form that has no gradient. Such a layer computes the same while training.
        module.training = hasattr(getattr(module, "weight", None), "quant_state")
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def keep_trees_together(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rearrange shuffled micro-batches so that the rows of a tree follow each other.

    Trees keep the shuffled order of their first rows, and rows within a tree theirs: where the rows of a tree are
    divided between optimizer steps, it is chance which of them a step has.

    Args:
        batches: micro-batches as TRL splits a generation batch, with the entry `tree`, the number of each row's tree,
            `(B,)`.
    """
    if len(batches) == 1:
        return batches
    trees = torch.cat([batch["tree"] for batch in batches]).tolist()
    first = {}  # tree to the place of its first row
    for place, tree in enumerate(trees):
        first.setdefault(tree, place)
    order = sorted(range(len(trees)), key=lambda place: first[trees[place]])

    def merged(values: list) -> Any:
        if isinstance(values[0], torch.Tensor) and values[0].ndim:
            return torch.cat(values)[order]
        if isinstance(values[0], list):
            flat = [item for value in values for item in value]
            return [flat[place] for place in order]
        return values[0]

    batch = {key: merged([each[key] for each in batches]) for key in batches[0]}
    return split_tensor_dict(batch, len(batches))
