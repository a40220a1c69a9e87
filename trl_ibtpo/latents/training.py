"""Training of latents: the autoencoder that gives the prior, and the projections with the policy frozen.

Both are resumable: every so many steps, weights and AdamW's state go to a safetensors file. Batches and noise depend
on the seed and the number of the step alone, so a run that was interrupted ends where an uninterrupted one does.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .attention import LayerSteering
from .logits import LogitSteering
from .prior import Prior, mean_hidden_states

CUTS = 4  # conditions of a rationale: the question alone, and up to three beginnings of the rationale
SAVE_EVERY = 100  # steps

Advance = Callable[[str], None]  # of a progress bar: one step, and what to show beside it


def _silent(shown: str) -> None: ...


@dataclass(frozen=True)
class Rows:
    """Token ids of questions, and of their rationales with an end; ragged `(R, T)`."""

    questions: list[list[int]]
    rationales: list[list[int]]

    def __len__(self) -> int:
        return len(self.questions)

    def whole(self, row: int) -> list[int]:
        return self.questions[row] + self.rationales[row]

    def halves(self, held_out: int) -> tuple["Rows", "Rows"]:
        """To train on, and the last `held_out`."""
        kept = len(self) - held_out
        return (
            Rows(self.questions[:kept], self.rationales[:kept]),
            Rows(self.questions[kept:], self.rationales[kept:]),
        )


@dataclass(frozen=True)
class Embeddings:
    """Mean hidden states of rows, in the memory of the machine."""

    conditions: torch.Tensor  # c, (R, CUTS, E)
    whole: torch.Tensor  # y, (R, E)


def embed(model: PreTrainedModel, rows: Rows, seed: int, batch: int, advance: Advance = _silent) -> Embeddings:
    """Mean hidden states of the policy over questions, beginnings of rationales, and all of them."""
    generator = torch.Generator().manual_seed(seed)
    conditions, whole = [], []
    for start in range(0, len(rows), batch):
        numbers = range(start, min(start + batch, len(rows)))
        sequences = [rows.whole(row) for row in numbers]
        cuts = []
        for row in numbers:
            begun = torch.randint(0, len(rows.rationales[row]), (CUTS - 1,), generator=generator).tolist()
            length = len(rows.questions[row])
            cuts.append([length, *(length + tokens for tokens in begun), length + len(rows.rationales[row])])
        for means in mean_hidden_states(model, sequences, cuts):
            conditions.append(means[:-1].cpu())
            whole.append(means[-1].cpu())
            advance("")
    return Embeddings(torch.stack(conditions), torch.stack(whole))


def make_prior(embeddings: Embeddings, latent: int, seed: int) -> Prior:
    """An untrained prior that knows how large embeddings are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = Prior(embeddings.whole.shape[-1], latent)
    prior.mean.copy_(embeddings.whole.mean(0))
    prior.deviation.copy_(embeddings.whole.std(0).clamp(min=1e-6))
    return prior


def train_prior(
    prior: Prior,
    embeddings: Embeddings,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    advance: Advance = _silent,
) -> None:
    """Minimise squared error plus KL; see `prior`. A condition is drawn anew for a row each time it is seen."""

    def loss(generator: torch.Generator) -> tuple[torch.Tensor, str]:
        rows = torch.randint(len(embeddings.whole), (batch,), generator=generator)
        cuts = torch.randint(CUTS, (batch,), generator=generator)
        noise = torch.randn(batch, prior.latent, generator=generator)
        error, divergence = prior.losses(embeddings.conditions[rows, cuts], embeddings.whole[rows], noise)
        shown = f"error {error.mean():.4g}, KL {divergence.mean():.4g} nats"
        return (error + divergence).mean(), shown

    _train(prior, loss, steps, learning_rate, seed, checkpoint, advance)


@torch.no_grad()
def prior_losses(prior: Prior, embeddings: Embeddings, seed: int) -> tuple[float, float]:
    """Mean squared error and mean divergence over rows, each with the question alone as its condition."""
    noise = torch.randn(len(embeddings.whole), prior.latent, generator=torch.Generator().manual_seed(seed))
    error, divergence = prior.losses(embeddings.conditions[:, 0], embeddings.whole, noise)
    return float(error.mean()), float(divergence.mean())


def train_injection(
    steering: LayerSteering | LogitSteering,
    prior: Prior,
    rows: Rows,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    advance: Advance = _silent,
) -> None:
    """Maximise the likelihood of the rest of a rationale, given a latent of the whole; nothing else is trained."""
    frozen = [parameter for parameter in steering.model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    steering.model.eval()

    def loss(generator: torch.Generator) -> tuple[torch.Tensor, str]:
        numbers = torch.randint(len(rows), (batch,), generator=generator).tolist()
        value = rest_losses(steering, prior, rows, numbers, generator, "posterior").mean()
        return value, f"{value:.4f} nats a token"

    steering.injection.requires_grad_(True)
    try:
        _train(steering.injection, loss, steps, learning_rate, seed, checkpoint, advance)
    finally:
        steering.injection.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)


def rest_losses(
    steering: LayerSteering | LogitSteering,
    prior: Prior,
    rows: Rows,
    numbers: Sequence[int],
    generator: torch.Generator,
    source: str | None,
) -> torch.Tensor:
    """Negative log-likelihood per token of what comes after a random fork, of every row, `(B,)`.

    Args:
        steering: how latents act.
        prior: where they come from.
        rows: questions and rationales.
        numbers: of the rows.
        generator: of forks and noise.
        source: `"posterior"`, `"prior"`, or None for no latent.
    """
    device = steering.model.device
    sequences = [rows.whole(row) for row in numbers]
    starts = [len(rows.questions[row]) for row in numbers]
    forks = [
        start + int(torch.randint(0, max(1, len(ids) - start - 1), (1,), generator=generator))
        for start, ids in zip(starts, sequences, strict=True)
    ]
    noise = torch.randn(len(numbers), prior.latent, generator=generator).to(device)
    cuts = [[fork, len(ids)] for fork, ids in zip(forks, sequences, strict=True)]
    condition, whole = torch.stack(mean_hidden_states(steering.model, sequences, cuts)).unbind(1)
    with torch.no_grad():
        drawn = prior.given_both(condition, whole) if source == "posterior" else prior.given(condition)
        latents = drawn.draw(noise)

    width = max(map(len, sequences))
    ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in sequences], device=device)
    places = torch.arange(width, device=device)[None]
    mask = (places < torch.tensor([[len(each)] for each in sequences], device=device)).long()
    with steering.steered(latents, [None if source is None else fork for fork in forks]) as processors:
        logits = steering.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        for processor in processors:
            logits = processor.teacher_forced(logits)
        logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[:, :, 0]
    after = mask[:, 1:].bool() & (places[:, 1:] >= torch.tensor(forks, device=device)[:, None])
    return -(logprobs * after).sum(1) / after.sum(1)


def _train(
    module: nn.Module,
    loss: Callable[[torch.Generator], tuple[torch.Tensor, str]],
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    advance: Advance,
) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0)
    begin = _restore(checkpoint, module, optimizer)
    if begin > steps:
        raise ValueError(
            f"{checkpoint} was trained for {begin} steps, more than the {steps} that are asked for. Ask for at least "
            f"{begin}, or give another folder."
        )
    for _ in range(begin):
        advance("")
    for step in range(begin, steps):
        value, shown = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(checkpoint, module, optimizer, step + 1)
        advance(shown)


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        yield f"weight.{name}", parameter.detach()
        for kind in ("exp_avg", "exp_avg_sq"):
            yield f"{kind}.{name}", optimizer.state[parameter][kind]


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".partial")
    state = {name: tensor.cpu().contiguous() for name, tensor in _state(module, optimizer)}
    save_file(state, written, metadata={"step": str(step)})
    os.replace(written, path)  # whole, or not at all


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Steps done, 0 where there is no checkpoint."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, parameter in module.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{kind: file.get_tensor(f"{kind}.{name}").to(parameter.device) for kind in ("exp_avg", "exp_avg_sq")},
            }
    return step
