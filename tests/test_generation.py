"""Seeds of trees: each generation batch of an optimizer step has its own, and a resumed run those of a whole one."""

import pytest
import tiny
from datasets import Dataset

from trl_ibtpo import IBTPOTrainer

PROMPT = Dataset.from_list([{"prompt": "What is 3 + 4?", "letter": "a"}] * 64)
TWO_BATCHES_A_STEP = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "reproducible_rollouts": True}


class Recorder(IBTPOTrainer):
    """Keeps of every generation batch the optimizer step, the seeds of its trees, completions and branched steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def _plant(self, *args, **kwargs):
        growers = super()._plant(*args, **kwargs)
        self.seeds = [tuple(grower._seed) for grower in growers]
        return growers

    def _generate_single_turn(self, *args, **kwargs):
        result = super()._generate_single_turn(*args, **kwargs)
        branched = [grown.tree.branch_steps for grown in self._grown]
        self.batches.append((self.state.global_step, self.seeds, result[0], branched))
        return result


@pytest.mark.parametrize("branching", ["ib", "random"])
def test_generation_batches_of_one_optimizer_step_differ(config, model_path, branching):
    args = config(**TWO_BATCHES_A_STEP, branching=branching, max_steps=2)
    trainer = Recorder(model_path, tiny.even_length, args, PROMPT)
    trainer.train()
    assert [step for step, *_ in trainer.batches] == [0, 0, 1, 1]
    for first, second in (trainer.batches[:2], trainer.batches[2:]):
        assert first[2] != second[2] and first[3] != second[3]
    assert [seeds for _, seeds, *_ in trainer.batches] == [[(42, step, batch)] for step in (0, 1) for batch in (0, 1)]


def test_a_resumed_run_grows_the_trees_of_a_whole_one(config, model_path, tmp_path):
    fields = {**TWO_BATCHES_A_STEP, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = Recorder(model_path, tiny.even_length, config(**fields), PROMPT)
    whole.train()
    resumed = Recorder(model_path, tiny.even_length, config(**fields), PROMPT)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert len(resumed.batches) == 2 and resumed.batches == whole.batches[4:]
    # The same trainer, stopped after the first of two batches of a step.
    whole._last_batch = (2, 0)
    whole.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert whole.batches[6:] == resumed.batches


def test_one_batch_for_several_steps_is_seeded_as_ever(config, model_path):
    args = config(steps_per_generation=2, per_device_train_batch_size=12, max_steps=4)
    trainer = Recorder(model_path, tiny.even_length, args, PROMPT)
    trainer.train()
    assert [seeds for _, seeds, *_ in trainer.batches] == [[(42, step, 0), (42, step, 1)] for step in (0, 2)]
