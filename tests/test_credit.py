"""What TRL's loss makes of the weights and terms that this package adds, on batches with known log-probabilities."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from trl import GRPOTrainer

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.advantages import GradedTree, sibling
from trl_ibtpo.prefix_sharing.attention import prepare_model
from trl_ibtpo.training.regularization import weighted_entropy

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


@pytest.fixture(scope="module")
def trainer(model_path, tmp_path_factory):
    from trl_ibtpo import IBTPOConfig

    args = IBTPOConfig(
        **{**tiny.FAST, "output_dir": str(tmp_path_factory.mktemp("out"))},
        beta=0.02,
        delta=1.5,
        entropy_coef=0.01,
        packed_forward=False,
    )
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    trainer.current_gradient_accumulation_steps = 2
    return trainer


@pytest.fixture
def batch(trainer):
    """Four completions of different lengths, a policy that has moved since it sampled them, and vLLM's mismatch."""
    generator = torch.Generator().manual_seed(0)
    rows, length = 4, 7
    prompt_ids = torch.randint(5, 200, (rows, 3), generator=generator)
    completion_ids = torch.randint(5, 200, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([7, 4, 5, 1])[:, None]).int()
    attention = torch.cat([torch.ones_like(prompt_ids), mask], dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([prompt_ids, completion_ids], dim=1), attention, length
        )[0]
    noise = torch.randn(3, rows, length, generator=generator)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": noise[0],
        "old_per_token_logps": logps + 0.5 * noise[1],  # most ratios are beyond the clip range
        "ref_per_token_logps": logps + 0.1 * noise[2],
        "importance_sampling_ratio": noise[2].exp().clamp(max=2),
        "num_items_in_batch": mask.sum(),
    }


def recorded(trainer) -> list[dict]:
    """Fills with what each generation batch holds."""
    compute, outputs = trainer._generate_and_score_completions, []
    trainer._generate_and_score_completions = lambda inputs: outputs.append(compute(inputs)) or outputs[-1]
    return outputs


def loss_of(trainer, batch, advantages) -> float:
    return trainer._compute_loss(trainer.model, {**batch, "advantages": advantages}).item()


@pytest.mark.parametrize("importance_sampling_level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_weight_multiplies_the_clipped_loss_of_its_token(
    trainer, batch, monkeypatch, loss_type, importance_sampling_level
):
    """Whatever the normaliser: weight 3 counts a token three times, and KL and entropy count it as before."""
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", importance_sampling_level)
    monkeypatch.setattr(trainer, "use_vllm", True)  # so that vLLM's importance sampling is part of the loss
    advantages, weights = batch["advantages"], torch.tensor([3.0, 0.25, 1.0, 2.0])[:, None].repeat(1, 7)
    weights[0, 3:] = 0.5  # as where a shared prefix ends
    without = loss_of(trainer, batch, torch.zeros_like(advantages))
    expected = without
    for weight in weights.unique():
        alone = torch.where(weights == weight, advantages, 0.0)
        expected += weight.item() * (loss_of(trainer, batch, alone) - without)
    assert loss_of(trainer, batch, weights * advantages) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - loss_of(trainer, batch, advantages)) > 1e-2


# ----- IBRO ----------------------------------------------------------------------------------------------------------


def test_gradient_of_the_weighted_entropy():
    """With respect to logit k of a token: `A p_k (log p_k + H)`, over the number of tokens."""
    logits = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    advantages, mask = torch.tensor([[0.5, -1.0, 2.0], [3.0, -2.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    logps = logits.log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    (-weighted_entropy(entropies, advantages, mask, shift=0.25)).backward()
    expected = ((advantages + 0.25) * mask)[..., None] * logps.exp() * (logps + entropies[..., None]) / 5
    torch.testing.assert_close(logits.grad, expected.detach())
    assert not logits.grad[1, 2].any()  # a masked token
    by_row = weighted_entropy(entropies, torch.tensor([0.5, -1.0]), mask, 0.0)
    spread = weighted_entropy(entropies, torch.tensor([[0.5] * 3, [-1.0] * 3]), mask, 0.0)
    assert by_row == spread


def gradients(trainer, batch, monkeypatch, **settings) -> tuple[float, torch.Tensor]:
    """Loss and gradient with these settings; those of the trainer or of its arguments."""
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(trainer if hasattr(trainer, name) else trainer.args, name, value)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        trainer.model.zero_grad()
    return loss.item(), gradient


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_one_are_trls_entropy_bonus(trainer, batch, monkeypatch, loss_type, packed):
    """Of the same coefficient, with the same mask, for every loss type and both forwards; the accumulation is 2."""
    if packed:
        prepare_model(trainer._base_model(trainer.model))
    batch = {**batch, "unweighted_advantages": torch.ones_like(batch["advantages"])}
    common = {"loss_type": loss_type, "_packed_forward": packed, "top_entropy_quantile": 0.5}
    off = {"entropy_coef": 0.0, "_entropy_bonus_enabled": False}
    theirs = gradients(trainer, batch, monkeypatch, **common, entropy_coef=30.0)
    ours = gradients(trainer, batch, monkeypatch, **common, **off, ib_regularization_coef=30.0)
    shifted = {**batch, "unweighted_advantages": torch.zeros_like(batch["advantages"])}
    by_shift = gradients(
        trainer, shifted, monkeypatch, **common, **off, ib_regularization_coef=15.0, ib_regularization_shift=2.0
    )
    without = gradients(trainer, batch, monkeypatch, **common, **off)
    for found in (ours, by_shift):
        assert found[0] == pytest.approx(theirs[0], abs=1e-5)
        torch.testing.assert_close(found[1], theirs[1], atol=1e-5, rtol=1e-4)
    assert (ours[1] - without[1]).norm() > 0.1 * ours[1].norm()
    assert trainer._entropies is None  # nothing holds the graph


def test_coefficient_zero_is_the_same_loss_to_the_last_bit(trainer, batch, monkeypatch):
    theirs = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    assert torch.equal(trainer._compute_loss(trainer.model, batch), theirs)


def test_one_step_moves_entropy_to_where_the_advantage_is(trainer, batch, monkeypatch):
    """A small step along the term alone: entropy rises in the rows of positive advantage and falls in the others."""
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].repeat(1, 7)
    batch = {**batch, "unweighted_advantages": advantages}
    parameters = list(trainer.model.parameters())
    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    without = gradients(trainer, batch, monkeypatch)[1]
    step = gradients(trainer, batch, monkeypatch, ib_regularization_coef=1.0)[1] - without

    def entropies() -> torch.Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 7, compute_entropy=True)
        return (found[1] * batch["completion_mask"]).sum(1)

    before = entropies()
    torch.nn.utils.vector_to_parameters(start - 1e-2 * step / step.norm(), parameters)
    change = entropies() - before
    torch.nn.utils.vector_to_parameters(start, parameters)
    assert (change[:2].sum() > 0) and (change[2:].sum() < 0), change


def test_regularization_in_training(config, model_path):
    """It is what the unweighted advantages make of it, in every micro-batch; weights of shared tokens do not count."""
    seen = []

    def spy(entropies, advantages, mask, shift):
        seen.append((advantages, mask))
        return weighted_entropy(entropies, advantages, mask, shift)

    args = config(
        max_steps=1,
        ib_coef=0.0,
        ib_regularization_coef=0.005,
        shared_token_weight="once",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=6,
    )
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    outputs = recorded(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_ibtpo.training.regularization.weighted_entropy", spy)
        trainer.train()
    used = torch.cat([advantages for advantages, _ in seen])
    plain, weighted = outputs[0]["unweighted_advantages"], outputs[0]["advantages"]
    assert len(seen) == 2 and torch.equal(used.flatten().sort()[0], plain.flatten().sort()[0])
    shares = (plain / weighted)[weighted != 0]  # the number of trajectories that share a token
    torch.testing.assert_close(shares, shares.round())
    assert shares.max() > 1
    assert "ib/regularization" in trainer.state.log_history[0]


# ----- an advantage function of one's own ----------------------------------------------------------------------------


def test_a_function_given_to_the_trainer_makes_the_advantages(config, model_path):
    seen = []

    def depth(graded: GradedTree) -> np.ndarray:
        seen.append(graded)
        return np.arange(len(graded.tree)) / 10

    args = config(max_steps=1, ib_coef=0.0)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(), advantage=depth)
    outputs = recorded(trainer)
    trainer.train()
    (graded,) = seen
    assert graded.choices and graded.settings == args.credit_settings
    row = outputs[0]["advantages"][0]
    ends = graded.tree.ends()
    first, second = graded.tree.path(graded.tree.leaves[0])[:2]
    assert row[: ends[first]].unique().tolist() == pytest.approx([first / 10])
    assert row[ends[first] : ends[second]].unique().tolist() == pytest.approx([second / 10])
    assert "advantage 'depth'" in trainer._describe()


@pytest.mark.parametrize(
    ("advantage", "error", "message"),
    [
        (
            "grpo",
            TypeError,
            r"`advantage` of the trainer is 'grpo'; give a function .* IBTPOConfig\(advantage='grpo'\)",
        ),
        (GradedTree, TypeError, "give a function of a GradedTree"),
        (lambda graded: sibling(graded), ValueError, "function named 'sibling', as an advantage of the package is"),
    ],
)
def test_what_cannot_be_an_advantage_is_refused(config, model_path, advantage, error, message):
    if error is ValueError:
        advantage.__name__ = "sibling"
    with pytest.raises(error, match=message):
        IBTPOTrainer(model_path, tiny.even_length, config(), tiny.questions(), advantage=advantage)


def test_whitening_is_over_the_trained_tokens_of_the_batch(config, model_path):
    """Four trees in a generation batch: mean 0 and deviation 1 over their tokens, whatever their lengths.

    What could not be scored is not trained, and has no part in it.
    """

    def now_and_then(completion_ids, **kwargs):
        return [None if len(ids) % 3 == 0 else float(len(ids) % 2) for ids in completion_ids]

    args = config(max_steps=1, advantage="treepo", per_device_train_batch_size=48, mask_truncated_completions=True)
    trainer = IBTPOTrainer(model_path, now_and_then, args, tiny.questions())
    outputs = recorded(trainer)
    trainer.train()
    mask = outputs[0]["completion_mask"] > 0
    unscored = (mask.sum(dim=1) > 0) & (mask.sum(dim=1) % 3 == 0)
    assert unscored.any() and not outputs[0]["advantages"][unscored].any()
    mask &= ~unscored[:, None]
    trained = outputs[0]["advantages"][mask]
    assert 0 < mask.sum() < mask.numel() and mask.any(dim=1).sum() < 48  # some were truncated
    assert trained.mean().item() == pytest.approx(0, abs=1e-5)
    assert trained.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert not outputs[0]["advantages"][~mask].any()


def test_plain_grpo_has_the_diagnostics_of_trees(config, model_path):
    """So that what happens to covariance and effective rate under GRPO can be watched."""
    args = config(max_steps=2, branching="independent", advantage="grpo", num_generations=12)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["ib/score"] < 0 and np.isfinite(entry["ib/covariance"]) and 0 < entry["ib/confidence"] < 1
        assert entry["tree/effective_rate"] == 1 and entry["tree/generated_tokens"] == entry["tree/trajectory_tokens"]
        assert entry["tree/selected_minus_fresh"] is None  # nothing is chosen


def test_the_fields_of_spo_and_ibro_train(config, model_path):
    """As docs/methods.md gives them."""
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    for method in ("SPO-tree", "IBRO"):
        (fields,) = re.findall(rf"^\| {method} \| `(\{{.*\}})` \|$", page, flags=re.MULTILINE)
        trainer = IBTPOTrainer(
            model_path, tiny.even_length, config(max_steps=1, **json.loads(fields)), tiny.questions()
        )
        trainer.train()
        assert np.isfinite(trainer.state.log_history[0]["loss"])
