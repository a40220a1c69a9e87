"""The prior of latents and its training, as the command does it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from test_latents import TOKENIZER, hooks_of, make, models  # noqa: F401
from torch.distributions import Normal, kl_divergence
from transformers import LlamaConfig, Qwen3Config

from trl_ibtpo.cli.main import main
from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.latents import training
from trl_ibtpo.latents.prior import Gaussian, Prior, load_prior, mean_hidden_states
from trl_ibtpo.latents.source import LatentSource
from trl_ibtpo.latents.strength import Strength


def test_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    first, second = (Gaussian(torch.randn(5, 2 * 7, generator=generator)) for _ in range(2))

    def normal(gaussian):
        return Normal(gaussian.mean, gaussian.log_variance.exp().sqrt())

    expected = kl_divergence(normal(first), normal(second)).sum(-1)
    assert torch.allclose(first.divergence(second), expected, atol=1e-4)
    assert not torch.allclose(second.divergence(first), expected, atol=0.1)  # the order of the arguments matters
    draws = first.draw(torch.randn(20000, 5, 7, generator=generator))
    assert torch.allclose(draws.mean(0), first.mean, atol=0.1)
    assert torch.allclose(draws.var(0), first.log_variance.exp(), rtol=0.1)


def test_losses_are_squared_error_and_divergence_of_posterior_from_prior():
    torch.manual_seed(0)
    prior, condition, whole, noise = Prior(6, 4), torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 4)
    prior.mean.fill_(0.5)
    prior.deviation.fill_(2.0)
    error, divergence = prior.losses(condition, whole, noise)
    scaled = [(each - 0.5) / 2.0 for each in (condition, whole)]
    posterior, given = Gaussian(prior.posterior(torch.cat(scaled, -1))), Gaussian(prior.prior(scaled[0]))
    decoded = prior.decoder(torch.cat([scaled[0], posterior.mean + noise * (posterior.log_variance / 2).exp()], -1))
    assert torch.allclose(error, ((decoded - scaled[1]) ** 2).sum(-1), atol=1e-5)
    assert torch.allclose(divergence, posterior.divergence(given))
    sizes = [[tuple(layer.weight.shape) for layer in part if hasattr(layer, "weight")] for part in prior.children()]
    assert sizes == [
        [(256, 6), (256, 256), (8, 256)],
        [(256, 12), (256, 256), (8, 256)],
        [(256, 10), (256, 256), (6, 256)],
    ]


def test_mean_hidden_states_do_not_see_padding(models):  # noqa: F811
    model = models["qwen3"]
    sequences = [[150, 151, 152, 153, 154], [200, 201]]
    found = mean_hidden_states(model, sequences, [[2, 5], [1]])
    for ids, cuts, means in zip(sequences, [[2, 5], [1]], found, strict=True):
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(means, torch.stack([states[:cut].mean(0) for cut in cuts]), atol=1e-5)


COUNT = {"four": "4", "five": "5", "six": "6", "seven": "7"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model whose questions have several answers, and a folder that the command wrote."""
    folder = tmp_path_factory.mktemp("latents")
    model = make(Qwen3Config)
    model.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    rows = [
        {"q": f"What is {word}?", "r": ["one, ", "two, "][turn % 2] * 3 + COUNT[word]}
        for turn in range(12)
        for word in COUNT
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(folder, "out")) == 0
    return folder, model


def command(folder, name, *changes: str) -> list[str]:
    options = "--question_column q --rationale_column r --injection psa --batch_size 8 --learning_rate 0.01 --seed 3"
    return [
        *("latents", "train", "--model", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl")),
        *(
            "--output_dir",
            str(folder / name),
            *options.split(),
            "--steps",
            "80",
            "--injection_steps",
            "50",
            *changes,
        ),
    ]


def test_a_trained_folder_is_what_its_settings_say(trained):
    folder, model = trained
    settings = json.loads((folder / "out" / "latents.json").read_text())
    assert settings["format"] == "trl_ibtpo.latents/1" and settings["injection"] == "psa" and settings["rows"] == 48
    assert sorted(path.suffix for path in (folder / "out").rglob("*") if path.is_file()) == [
        *[".json"] * 2,
        *[".safetensors"] * 5,
    ]
    source = LatentSource(Strength(), folder=folder / "out")
    steering = source.attach(model, "psa")
    found = load_file(folder / "out" / "psa.safetensors")
    assert torch.equal(steering.acting.injection.key, found["key"])
    random = LatentSource(Strength(), seed=3).attach(model, "psa").acting.injection
    assert (random.key - found["key"]).abs().max() > 0.01  # it was trained


def test_training_lowers_what_it_minimises(trained, capsys):
    """Held-out rows: the prior's errors fall; a latent of the whole rationale tells its rest."""
    folder, _ = trained
    assert main(command(folder, "out")) == 0  # all is done already: only the figures are computed again
    table = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 3:
            table[cells[0]] = cells[1:]
    before, after = map(float, table["squared error"])
    assert after < 0.7 * before
    nats = {name: float(cells[1]) for name, cells in table.items() if name.startswith("nats a token")}
    assert nats["nats a token, of the whole"] < nats["nats a token, no latent"] - 0.2


def test_an_interrupted_training_ends_as_an_uninterrupted_one(trained, monkeypatch):
    folder, _ = trained
    short = ("--steps", "9", "--injection_steps", "5")
    assert main(command(folder, "whole", *short)) == 0
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    interrupted = set()

    def save_once(path, *arguments, save=training._save):
        save(path, *arguments)
        if path not in interrupted:
            interrupted.add(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_once)
    for count in (1, 2):  # while the prior is trained, then while the projections are
        assert main(command(folder, "again", *short)) == 130
        assert len(interrupted) == count
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"`latent_prior` names .*again.*has finished"):
        LatentSource(Strength(), folder=folder / "again")
    assert main(command(folder, "again", *short)) == 0
    for name in ("prior.safetensors", "psa.safetensors"):
        first, second = load_file(folder / "whole" / name), load_file(folder / "again" / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_what_the_command_refuses(trained, capsys):
    folder, _ = trained
    refused = [
        (command(folder, "out", "--seed", "4"), r"holds a run with --seed 3, not 4"),
        (command(folder, "x", "--question_column", "question"), r"has no column 'question'; it has: q, r"),
        (command(folder, "x", "--max_length", "3"), r"has 0 rows of at most 3 tokens"),
        (command(folder, "out", "--steps", "40"), r"was trained for 80 steps, more than the 40 that are asked for"),
        (command(folder, "x", "--steps", "0"), r"--steps is 0; give 1 or more"),
        (["latents"], r"give `train` as the first word"),
    ]
    for arguments, message in refused:
        assert main(arguments) in (1, 2)
        assert message in capsys.readouterr().err
    rows = folder / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("one, ", "two, ", 1))
    assert main(command(folder, "out")) == 2
    rows.write_text(before)
    assert "holds a run on other rows than --dataset_name" in capsys.readouterr().err
    weights = folder / "model" / "model.safetensors"
    written = weights.stat()
    os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    assert main(command(folder, "out")) == 2
    os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert "holds a run with other weights than --model" in capsys.readouterr().err
    other = make(LlamaConfig, hidden_size=64)
    with pytest.raises(ValueError, match=r"hidden states have 32 entries; this one's have 64"):
        LatentSource(Strength(), folder=folder / "out").attach(other, "psa")


def test_latents_of_a_trained_prior_depend_on_the_prefix_before_the_fork(trained):
    folder, model = trained
    before = hooks_of(model)
    steering = LatentSource(Strength(), folder=folder / "out").attach(model, "psa")
    noise = LatentSource(Strength(), folder=folder / "out").noise([1, 2])
    prefixes = [[150, 151, 152, 9], [150, 151, 152, 7], [150, 151, 160, 9]]
    requests = [RolloutRequest(row, ids, 4, 0, latent=noise, fork=3) for row, ids in enumerate(prefixes)]
    latents = steering.latents([*requests, RolloutRequest("plain", [5], 4, 0)])
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])
    assert torch.equal(latents[3], torch.zeros(128))
    (embedding,) = mean_hidden_states(model, [[150, 151, 152]], [[3]])
    given = load_prior(folder / "out").given(embedding)
    assert torch.allclose(
        latents[0], given.mean[0] + torch.tensor(noise) * (given.log_variance[0] / 2).exp(), atol=1e-4
    )
    assert hooks_of(model) == before
