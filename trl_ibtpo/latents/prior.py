"""Where latents come from: N(0, I), or a conditional variational autoencoder over the policy's own hidden states.

    p(z | c) = N(mu_p(c), sigma_p(c))      q(z | c, y) = N(mu_q(c, y), sigma_q(c, y))      y^ = f(c, z)
    loss = |y - y^|^2 + KL(q(z | c, y) || p(z | c))

`c` is the mean of the policy's last hidden states over what comes before the fork, `y` over the question with its
whole rationale; both are scaled to mean 0 and variance 1 over the training rows. MLPs of two hidden layers of 256 and
a latent of 128, as in the authors' code, which has the arguments of KL the other way round.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .noise import LATENT

HIDDEN = 256
FORMAT = "trl_ibtpo.latents/1"
SETTINGS, WEIGHTS = "latents.json", "prior.safetensors"  # in the folder of a trained prior


class Gaussian:
    """Independent normal variables, `(B, Z)`."""

    def __init__(self, parameters: torch.Tensor):
        self.mean, self.log_variance = parameters.chunk(2, dim=-1)

    def draw(self, noise: torch.Tensor) -> torch.Tensor:
        """The draw that `noise` of N(0, I) stands for."""
        return self.mean + noise * (0.5 * self.log_variance).exp()

    def divergence(self, other: "Gaussian") -> torch.Tensor:
        """`KL(self || other)` of every row, in nats."""
        ratio = (self.log_variance - other.log_variance).exp()
        distance = (self.mean - other.mean).pow(2) * (-other.log_variance).exp()
        return 0.5 * (ratio + distance - 1 + other.log_variance - self.log_variance).sum(-1)


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs)
    )


class Prior(nn.Module):
    """The conditional variational autoencoder; after training, only its prior is asked.

    Args:
        embedding: width of the policy's hidden states.
        latent: dimension of z.
    """

    def __init__(self, embedding: int, latent: int = LATENT):
        super().__init__()
        self.latent = latent
        self.embedding = embedding
        self.prior = _mlp(embedding, 2 * latent)
        self.posterior = _mlp(2 * embedding, 2 * latent)
        self.decoder = _mlp(embedding + latent, embedding)
        for name in ("mean", "deviation"):  # of the embeddings that it was trained on
            self.register_buffer(name, torch.zeros(embedding) if name == "mean" else torch.ones(embedding))

    def scaled(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings.float() - self.mean) / self.deviation

    def given(self, condition: torch.Tensor) -> Gaussian:
        """`p(z | c)` of embeddings `(B, E)`."""
        return Gaussian(self.prior(self.scaled(condition)))

    def given_both(self, condition: torch.Tensor, whole: torch.Tensor) -> Gaussian:
        """`q(z | c, y)`."""
        return Gaussian(self.posterior(torch.cat([self.scaled(condition), self.scaled(whole)], -1)))

    def losses(self, condition: torch.Tensor, whole: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Squared error and divergence of every row, `(B,)` each."""
        posterior = self.given_both(condition, whole)
        decoded = self.decoder(torch.cat([self.scaled(condition), posterior.draw(noise)], -1))
        return (decoded - self.scaled(whole)).pow(2).sum(-1), posterior.divergence(self.given(condition))

    def save(self, folder: Path, settings: dict) -> None:
        """Write weights and settings; the settings come last, so that a folder that has them is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS)
        described = {"format": FORMAT, "embedding": self.embedding, "latent": self.latent, **settings}
        (folder / SETTINGS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def read_settings(folder: str | Path) -> dict:
    """What a folder of `trl-ibtpo latents train` says of itself.

    Raises:
        FileNotFoundError: where there is no such folder, or its training has not ended.
        ValueError: where it holds something else.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"`latent_prior` names {str(folder)!r}, which has no {SETTINGS}. Give a folder that `trl-ibtpo latents "
            "train --output_dir FOLDER` has finished, or leave the field out for N(0, I)."
        )
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} has the format {settings.get('format')!r}; this version reads {FORMAT!r}. Train the "
            "latents again."
        )
    return settings


def load_prior(folder: str | Path) -> Prior:
    """The prior of a folder, frozen."""
    settings = read_settings(folder)
    prior = Prior(settings["embedding"], settings["latent"])
    prior.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return prior.eval().requires_grad_(False)


@torch.no_grad()
def mean_hidden_states(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Mean of the policy's last hidden states over the first tokens of sequences.

    Args:
        model: the policy.
        sequences: token ids, of any lengths.
        cuts: for each sequence, numbers of first tokens to take the mean over.

    Returns:
        For each sequence, embeddings `(cuts, E)` in 32 bits.
    """
    width = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=model.device)
    training = model.training
    model.eval()
    states = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    model.train(training)
    sums = states.float().cumsum(1)
    rows = [torch.tensor(row, device=model.device) for row in cuts]
    return [total[row - 1] / row[:, None] for total, row in zip(sums, rows, strict=True)]
