"""Hooks into TRL's trainer for the prefix-shared forward: which batches go through it, and when it is exact."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from trl.trainer.utils import split_tensor_dict

from .attention import packed_logps_and_entropies, prepare_model, why_not_packed
from .trie import pack_prefixes


class PrefixSharedForward:
    """For a `GRPOTrainer`: policy, old and reference log-probabilities compute each shared token once."""

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._packed_forward and self.model.training and self._buffered_inputs is not before:
            # TRL shuffles rows; what shares tokens has to be in one micro-batch.
            self._buffered_inputs = keep_groups_together(self._buffered_inputs, self.num_generations)
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
        pixel_values=None,
        image_grid_thw=None,
        num_images=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        num_tiles=None,
        image_sizes=None,
        token_type_ids=None,
        mm_token_type_ids=None,
        image_position_ids=None,
    ):
        multimodal = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "num_images": num_images,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "num_tiles": num_tiles,
            "image_sizes": image_sizes,
            "token_type_ids": token_type_ids,
            "mm_token_type_ids": mm_token_type_ids,
            "image_position_ids": image_position_ids,
        }
        packed_batches = [None]
        # The load-balancing loss of a mixture of experts counts tokens, so it would change.
        if self._packed_forward and not compute_aux_loss and all(value is None for value in multimodal.values()):
            size = batch_size or len(input_ids)
            packed_batches = [
                pack_prefixes(input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep)
                for start in range(0, len(input_ids), size)
            ]
        if None in packed_batches:
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
        base_model = self._base_model(model)
        with self.accelerator.autocast():
            parts = [packed_logps_and_entropies(model, base_model, packed) for packed in packed_batches]
        logps, entropies = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _base_model(self, model: torch.nn.Module) -> PreTrainedModel:
        """The transformers model inside wrappers and adapters."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _choose_forward(self) -> tuple[bool, str]:
        """Whether to share prefixes in the forward pass, and why."""
        if self.args.packed_forward is False:
            return False, "`packed_forward` is off"
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            reason = "the adapter puts virtual tokens before the prompt"
        elif getattr(self.processing_class, "tokenizer", None) is not None:
            reason = "the model takes images"
        else:
            reason = why_not_packed(self._base_model(self.model))
        if reason is None:
            for each in (self.model, self.ref_model):
                if each is not None:
                    prepare_model(self._base_model(each))
            return True, "exact for this model"
        if self.args.packed_forward:
            raise ValueError(f"`packed_forward` is True, but {reason}. Leave it out to use TRL's forward here.")
        return False, reason


def keep_groups_together(batches: list[dict[str, Any]], group_size: int) -> list[dict[str, Any]]:
    """Rearrange shuffled micro-batches so that the rows of a group follow each other.

    Groups keep the shuffled order of their first rows, and rows within a group that of generation.

    Args:
        batches: micro-batches as TRL splits a generation batch, with the entry `row`: each row's place in it, `(B,)`.
        group_size: rows of a group.
    """
    if len(batches) == 1:
        return batches
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    first = {}  # group to the place of its first row
    for place, row in enumerate(rows):
        first.setdefault(row // group_size, place)
    order = sorted(range(len(rows)), key=lambda place: (first[rows[place] // group_size], rows[place]))

    def merged(values: list) -> Any:
        if isinstance(values[0], torch.Tensor) and values[0].ndim:
            return torch.cat(values)[order]
        if isinstance(values[0], list):
            flat = [item for value in values for item in value]
            return [flat[place] for place in order]
        return values[0]

    batch = {key: merged([each[key] for each in batches]) for key in batches[0]}
    return split_tensor_dict(batch, len(batches))
