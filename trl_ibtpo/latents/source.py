"""Latents for a trainer: where they come from, what they do to its model, and the proof that they do it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..engines.base import RolloutRequest
from .attention import LayerSteering
from .injection import LayerInjection, LogitInjection
from .logits import LogitSteering
from .noise import LATENT, latent_noise
from .prior import Prior, load_prior, mean_hidden_states, read_settings
from .proof import measured_scales, measured_spread, why_no_layers, why_not_steered
from .strength import Strength

MODES = ("none", "psa", "softmax")
INJECTIONS = {"psa": "psa.safetensors", "softmax": "softmax.safetensors"}  # in the folder of a trained prior


class LatentSource:
    """Latents as the configuration describes them.

    A trainer makes one, attaches it to its model before training, and gives what it gets to its engines:

        source = LatentSource.from_config(args)              # None with latent_mode='none'
        steering = source.attach(model, args.latent_mode)    # refuses a model on which it cannot prove itself
        engine = TransformersEngine(..., latents=steering)   # or VLLMEngine(..., latents=steering) with 'softmax'
        RolloutRequest(..., latent=source.noise([*tree_seed, leaf]), fork=tokens_before_the_fork)

    A request carries noise of N(0, I), so that growth needs neither a model nor torch; with a trained prior, the
    steering turns it into `z ~ p(z | c)`, where `c` is the prefix up to the fork, under the policy as it is then.

    The random projections are fixed by `seed` and by what `attach` measures on the model (how large its norms'
    weights, keys and values are). Attach before a checkpoint is loaded, so that a resumed run has the same ones.

    Args:
        strength: how strongly latents act, and how fast that decays.
        seed: of the random projections, where none were trained.
        folder: what `trl-ibtpo latents train` has written; None for N(0, I) and random projections.
    """

    def __init__(self, strength: Strength, seed: int = 0, folder: str | Path | None = None):
        self.strength = strength
        self.seed = seed
        self.folder = None if folder is None else Path(folder)
        self.dimension: int = LATENT if folder is None else read_settings(folder)["latent"]

    @classmethod
    def from_config(cls, args: Any) -> "LatentSource | None":
        """From the fields `latent_mode`, `latent_strength`, `latent_decay`, `latent_prior` and `seed`."""
        if args.latent_mode == "none":
            return None
        return cls(Strength(args.latent_strength, args.latent_decay), args.seed, args.latent_prior)

    def noise(self, seed: Sequence[int]) -> tuple[float, ...]:
        """What a request of the branch that `seed` names carries as its latent."""
        return latent_noise(seed, self.dimension)

    def attach(self, model: torch.nn.Module, mode: str) -> "Steering":
        """What steers `model` in `mode`, `"psa"` or `"softmax"`, for engines.

        Args:
            model: the policy, possibly with an adapter, unwrapped, with its weights on this machine.
            mode: how latents act.

        Raises:
            ValueError: where latents cannot act on this model as they should; the message says why.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        prior = None if self.folder is None else load_prior(self.folder)
        width = base.config.get_text_config().hidden_size
        if prior is not None and prior.embedding != width:
            raise ValueError(
                f"`latent_prior` names {str(self.folder)!r}, which was trained with a model whose hidden states have "
                f"{prior.embedding} entries; this one's have {width}. Train the latents with this model."
            )
        if mode == "softmax":
            vocabulary = base.get_output_embeddings().weight.shape[0]
            injection = self._trained(mode, LogitInjection, vocabulary) or LogitInjection.random(
                vocabulary, measured_spread(base), self.seed, self.dimension
            )
            return Steering(LogitSteering(base, injection.to(base.device), self.strength), prior)
        steering = None
        if (reason := why_no_layers(base)) is None:
            scales = measured_scales(base)
            shape = (scales.key_heads * scales.key_width, scales.key_heads * scales.value_width)
            injection = self._trained(mode, LayerInjection, len(scales.key), scales.hidden, *shape)
            if injection is None:
                injection = LayerInjection.random(scales, self.seed, self.dimension)
            # Proved at full strength: one of 0 would hide a layer that latents do not reach.
            steering = LayerSteering(base, injection.to(base.device), Strength(1.0, self.strength.decay))
            reason = why_not_steered(base, steering)
        if reason is not None:
            raise ValueError(
                f"`latent_mode` is 'psa', which this model ({type(base).__name__}) does not allow: {reason}. "
                "`latent_mode='softmax'` works with any model, 'none' forks without latents."
            )
        return Steering(LayerSteering(base, steering.injection, self.strength), prior)

    def _trained(self, mode: str, kind: type, *shape: int) -> Any | None:
        """The trained projections of the folder; None where it has none."""
        path = None if self.folder is None else self.folder / INJECTIONS[mode]
        if path is None or not path.is_file():
            return None
        injection = kind(*shape, self.dimension)
        try:
            injection.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} was trained with another model: {error}") from error
        return injection.requires_grad_(False)


def save_projections(injection: LayerInjection | LogitInjection, folder: Path) -> None:
    """Write trained projections to where `LatentSource` finds them."""
    save_file(
        {name: weight.detach().cpu().contiguous() for name, weight in injection.state_dict().items()},
        folder / INJECTIONS[injection.mode],
    )


class Steering:
    """What engines need to steer their requests; see `engines.base.LatentSteering`.

    Args:
        acting: what latents do to the model.
        prior: turns noise into latents; None where they are the same.
    """

    def __init__(self, acting: LayerSteering | LogitSteering, prior: Prior | None):
        self.acting = acting
        self.model: PreTrainedModel = acting.model
        self.prior = prior

    @contextmanager
    def steer(self, requests: Sequence[RolloutRequest], padding: Sequence[int]) -> Iterator[list[Any]]:
        """Steer a batch of requests; see `engines.base.LatentSteering`."""
        forks = [
            None if request.latent is None else pad + request.fork
            for pad, request in zip(padding, requests, strict=True)
        ]
        with self.acting.steered(self.latents(requests), forks) as processors:
            yield processors

    def install(self, llm: Any) -> None:
        """Let the vLLM engine of `llm`, in this process, steer the requests that carry `vllm_arguments`.

        Raises:
            ValueError: with pseudo self-attention, and where vLLM takes no logits processor.
        """
        from . import vllm

        if not isinstance(self.acting, LogitSteering):
            raise ValueError(
                "`latent_mode` is 'psa', which vLLM has no place for in its layers. Generate branches with "
                "transformers, or use `latent_mode='softmax'`."
            )
        vllm.install(llm, self.acting.injection.logits.data, self.acting.strength)

    def vllm_arguments(self, requests: Sequence[RolloutRequest]) -> list[dict[str, Any] | None]:
        """`SamplingParams.extra_args` of every request; None where a request has no latent."""
        from . import vllm

        if all(request.latent is None for request in requests):
            return [None] * len(requests)
        return [
            None
            if request.latent is None
            else {vllm.ARGUMENT: {"z": latent, "since_fork": len(request.prefix_ids) - request.fork}}
            for request, latent in zip(requests, self.latents(requests).tolist(), strict=True)
        ]

    @torch.no_grad()
    def latents(self, requests: Sequence[RolloutRequest]) -> torch.Tensor:
        """`z` of every request, `(B, Z)`; zeros where a request has no latent."""
        device = self.model.device
        self.acting.injection.to(device)
        dimension = next(len(request.latent) for request in requests if request.latent is not None)
        noise = torch.tensor([request.latent or [0.0] * dimension for request in requests], device=device)
        if self.prior is None:
            return noise
        rows = [row for row, request in enumerate(requests) if request.latent is not None]
        conditions = [tuple(requests[row].prefix_ids[: requests[row].fork]) for row in rows]
        distinct = list(dict.fromkeys(conditions))  # the branches of a fork share theirs
        embeddings = [
            each[0]
            for start in range(0, len(distinct), 16)
            for each in mean_hidden_states(
                self.model, distinct[start : start + 16], [[len(ids)] for ids in distinct[start : start + 16]]
            )
        ]
        embedding = dict(zip(distinct, embeddings, strict=True))
        given = self.prior.to(device).given(torch.stack([embedding[ids] for ids in conditions]))
        latents = torch.zeros_like(noise)
        latents[rows] = given.draw(noise[rows])
        return latents
