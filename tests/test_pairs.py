"""Every branching with every advantage, three optimizer steps each, and each branching with TRL's own forward.

A run switches its fields every three steps and starts each pair from the same weights, so that a pair costs its steps
and not a trainer.
"""

import itertools

import pytest
import tiny
import torch
from transformers import TrainerCallback

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.advantages import ADVANTAGES
from trl_ibtpo.branching import STRATEGIES, make_strategy, rounds_of

STEPS = 3


class Switch(TrainerCallback):
    """Sets branching and advantage of a running trainer, pair after pair; keeps what each has made of the weights.

    Where every initial rollout has rounds of its own, a tree of as many leaves has fewer levels.
    """

    def __init__(self, pairs, levels: int, levels_of_rollouts: int):
        self.pairs, self.number, self.weights = pairs, 0, []
        self.levels, self.levels_of_rollouts = levels, levels_of_rollouts

    def start(self, trainer):
        self.trainer = trainer
        self.initial = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
        self._switch()

    def _switch(self):
        trainer, args = self.trainer, self.trainer.args
        args.branching, args.advantage = self.pairs[self.number]
        args.tree_levels = self.levels_of_rollouts if rounds_of(args.branching) == "rollout" else self.levels
        assert args.growth_settings.leaves == trainer.num_generations
        trainer._strategy, trainer._branching = make_strategy(args.branching), args.branching
        trainer._advantage, trainer._advantage_name = ADVANTAGES[args.advantage], args.advantage
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(self.initial[name])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % STEPS == 0:
            now = {name: each.detach().clone() for name, each in self.trainer.model.named_parameters()}
            self.weights.append(now)
            self.number += 1
            if self.number < len(self.pairs):
                self._switch()


def train(model_path, config, pairs, **fields) -> Switch:
    args = config(
        tree_initial_rollouts=2,
        tree_levels=3,
        per_device_train_batch_size=4,
        max_completion_length=12,
        max_steps=STEPS * len(pairs),
        optim="sgd",  # no state that would go from pair to pair
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=0.0,
        reproducible_rollouts=True,
        logging_steps=STEPS,
        **fields,
    )
    switch = Switch(pairs, levels=3, levels_of_rollouts=2)  # four leaves: 2 + 2 rounds of one, or 2 (1 + 1 of one)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(256), callbacks=[switch])
    switch.start(trainer)
    trainer.train()
    switch.logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return switch


@pytest.fixture(scope="module")
def plain_config(tmp_path_factory):
    from trl_ibtpo import IBTPOConfig

    def build(**overrides):
        return IBTPOConfig(**{"output_dir": str(tmp_path_factory.mktemp("out")), **tiny.FAST, **overrides})

    return build


PAIRS = list(itertools.product(STRATEGIES, ADVANTAGES))


def test_every_branching_trains_with_every_advantage(model_path, plain_config):
    run = train(model_path, plain_config, PAIRS)
    assert len(run.weights) == len(run.logs) == len(PAIRS) == len(STRATEGIES) * len(ADVANTAGES)
    shares = dict.fromkeys(STRATEGIES, False)
    for pair, weights, log in zip(PAIRS, run.weights, run.logs, strict=True):
        assert all(torch.isfinite(each).all() for each in weights.values()), pair
        assert any(not torch.equal(each, run.initial[name]) for name, each in weights.items()), pair
        shares[pair[0]] |= log["tree/generated_tokens"] < log["tree/trajectory_tokens"]
    # A tree without a step to branch starts again at the question, so not every pair shares in its three batches.
    assert shares == {branching: branching != "independent" for branching in STRATEGIES}


def test_the_packed_forward_of_every_branching_is_trls(model_path, plain_config):
    pairs = [(branching, "ibtpo") for branching in STRATEGIES]
    packed = train(model_path, plain_config, pairs, packed_forward=True)
    plain = train(model_path, plain_config, pairs, packed_forward=False)
    for (branching, _), ours, theirs in zip(pairs, packed.weights, plain.weights, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=f"{branching}: {name}")
