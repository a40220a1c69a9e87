"""What TRL's loss makes of the weights and terms that this package adds, on batches with known log-probabilities."""

import numpy as np
import pytest
import tiny
import torch

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.advantages import GradedTree, sibling

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


# ----- an advantage function of one's own ----------------------------------------------------------------------------


def test_a_function_given_to_the_trainer_makes_the_advantages(config, model_path):
    seen = []

    def depth(graded: GradedTree) -> np.ndarray:
        seen.append(graded)
        return np.arange(len(graded.tree)) / 10

    args = config(max_steps=1, ib_coef=0.0)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(), advantage=depth)
    compute, outputs = trainer._generate_and_score_completions, []
    trainer._generate_and_score_completions = lambda inputs: outputs.append(compute(inputs)) or outputs[-1]
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
    """Four trees in a generation batch: mean 0 and deviation 1 over their tokens, whatever their lengths."""
    args = config(max_steps=1, advantage="treepo", per_device_train_batch_size=48, mask_truncated_completions=True)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions())
    compute, outputs = trainer._generate_and_score_completions, []
    trainer._generate_and_score_completions = lambda inputs: outputs.append(compute(inputs)) or outputs[-1]
    trainer.train()
    mask = outputs[0]["completion_mask"] > 0
    trained = outputs[0]["advantages"][mask]
    assert 0 < mask.sum() < mask.numel() and mask.any(dim=1).sum() < 48  # some were truncated
    assert trained.mean().item() == pytest.approx(0, abs=1e-5)
    assert trained.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert not outputs[0]["advantages"][~mask].any()
