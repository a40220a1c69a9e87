"""Strategies in training: a function of one's own, and one that learns, whose knowledge is saved with checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import checkpoints

SMALL = {"tree_initial_rollouts": 2, "tree_levels": 3, "reproducible_rollouts": True}


class Learner:
    """Branches at random, and counts what it has seen."""

    uses_rewards = False

    def __init__(self):
        self.seen = 0

    def __call__(self, tree, scores, rng):
        return rng.random(len(tree))

    def evidence(self, tree, scores):
        return [float(success) for success in tree.success]

    def learn(self, evidence):
        self.seen += len(evidence)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_function_given_to_the_trainer_chooses_the_steps(model_path, config):
    asked = []

    def last_step(tree, scores, rng):
        asked.append(len(tree))
        return np.arange(len(tree))

    trainer = IBTPOTrainer(
        model_path, tiny.even_length, config(max_steps=2, **SMALL), tiny.questions(), branching=last_step
    )
    grown = trainer.grow_trees(list(tiny.questions())[:2])
    assert len(asked) == 2 * 2
    for each in grown:
        assert each.settings.branching == "last_step"
        # The last step that has a child is the parent of the last leaf that was there.
        ends = [each.tree.steps[leaf].parent for leaf in each.tree.leaves[:2]]
        assert each.tree.branch_steps[2] == max(ends)
    trainer.train()
    assert len(asked) == 4 + 2 * 2
    assert "branching 'last_step'" in trainer._describe()


@pytest.mark.parametrize(
    ("branching", "fields", "error", "message"),
    [
        ("confidence", {}, TypeError, "`branching` of the trainer is 'confidence'; give a function"),
        (Learner, {}, TypeError, "give a function"),
        (Learner(), {"branching": "independent"}, ValueError, "'Learner', but `branching` of the configuration is"),
        (
            lambda tree, scores, rng: scores.density,
            {"branching": "random", "shared_token_weight": "sampled"},
            ValueError,
            "the function '<lambda>' does not say that it leaves them alone",
        ),
    ],
)
def test_what_cannot_be_a_strategy_is_refused(model_path, config, branching, fields, error, message):
    with pytest.raises(error, match=message):
        IBTPOTrainer(model_path, tiny.even_length, config(**fields), tiny.questions(), branching=branching)


def test_a_function_must_not_go_by_the_name_of_a_strategy(model_path, config):
    def random(tree, scores, rng):
        return rng.random(len(tree))

    with pytest.raises(ValueError, match="function named 'random', as a strategy of the package is"):
        IBTPOTrainer(model_path, tiny.even_length, config(), tiny.questions(), branching=random)


def test_what_a_strategy_has_learned_is_saved_and_read_again(model_path, config):
    def run(steps, learner, **arguments):
        args = config(max_steps=steps, save_strategy="steps", save_steps=1, **SMALL)
        trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(), branching=learner)
        trainer.train(**arguments)
        return trainer.args.output_dir

    output_dir = run(2, learner := Learner())
    assert learner.seen == 2 * 4  # trajectories of two steps, a tree each
    state = Path(output_dir, "checkpoint-2", checkpoints.STRATEGY).read_text()
    assert json.loads(state) == {"seen": 8}
    run(3, learner := Learner(), resume_from_checkpoint=True)
    assert learner.seen == 3 * 4
