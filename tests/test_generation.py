"""Seeds of trees: each generation batch of an optimizer step has its own, and a resumed run those of a whole one."""

import sys
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training.generation_checks import TESTED_VLLM, check_vllm
from trl_ibtpo.training.policy_engine import PolicyEngine, _awake

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


def lengths(trainer) -> list[list[int]]:
    """Tokens of the steps of each trajectory."""
    (grown,) = trainer.grow_trees([tiny.questions()[0]])
    tree = grown.tree
    return [[len(tree.steps[step].token_ids) for step in tree.path(leaf)] for leaf in tree.leaves]


def test_limits_of_steps_hold_in_trees(config, model_path):
    def found(**fields):
        return lengths(IBTPOTrainer(model_path, tiny.even_length, config(**fields), tiny.questions()))

    fixed = found(step_min_tokens=4, step_max_tokens=4)
    assert all(set(steps[:-1]) == {4} and 1 <= steps[-1] <= 4 for steps in fixed)
    longest = found(step_max_tokens=5, step_delimiter="no such text")
    assert max(max(steps) for steps in longest) == 5 and max(map(len, longest)) > 1
    shortest = found(step_min_tokens=6, step_delimiter=[*"abcdefghijklmnop"])
    assert min(min(steps[:-1]) for steps in shortest if len(steps) > 1) >= 6
    moved = found(step_min_tokens=4, step_max_tokens=4, step_noise=1.0)
    assert {length for steps in moved for length in steps[:-1]} <= {5, 6, 7, 8} and max(map(max, moved)) > 4


class Sleeper:
    """What a colocated vLLM is told, in order."""

    def __init__(self, enable_sleep_mode: bool):
        self.said, self.llm = [], self
        self.enable_sleep_mode, self._llm_weights_sleeping = enable_sleep_mode, False

    def wake_up(self, tags):
        self.said.append(("wake up", *tags))

    def sleep(self, level):
        self.said.append(("sleep", level))

    def sync_weights(self):
        self.said.append("weights")
        self._llm_weights_sleeping = False


@pytest.mark.parametrize("fails", [False, True])
def test_vllm_sleeps_once_after_all_rollouts(fails):
    generation = Sleeper(enable_sleep_mode=True)
    try:
        with _awake(generation):
            generation.said.append("rollouts")
            if fails:
                raise RuntimeError("a reward function")
    except RuntimeError:
        assert fails
    assert generation.said == [("wake up", "kv_cache"), "rollouts", ("sleep", 2)]
    assert generation._llm_weights_sleeping
    with _awake(generation := Sleeper(enable_sleep_mode=False)):
        pass
    assert generation.said == [] and not generation._llm_weights_sleeping


def test_weights_are_pushed_once_a_step_and_after_every_sleep():
    trainer = SimpleNamespace(
        vllm_mode="colocate",
        vllm_generation=Sleeper(enable_sleep_mode=True),
        state=SimpleNamespace(global_step=3),
        _last_loaded_step=2,
        accelerator=SimpleNamespace(is_main_process=True),
        args=SimpleNamespace(report_to=[]),
    )
    pushed = []
    for asleep, step in ((False, 3), (False, 3), (True, 3), (False, 3), (False, 4)):
        trainer.vllm_generation._llm_weights_sleeping, trainer.state.global_step = asleep, step
        trainer.vllm_generation.said.clear()
        PolicyEngine._sync_vllm(trainer)
        pushed.append(trainer.vllm_generation.said == ["weights"])
    assert pushed == [True, False, True, False, True]


def test_vllm_that_is_missing_or_untested_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"`use_vllm=True` needs vLLM, .* pip install '\.\[vllm\]'"):
        check_vllm()
    for version, warns in ((f"{TESTED_VLLM[0]}.1", False), (f"{TESTED_VLLM[1]}.9", False), ("0.1.0", True)):
        caplog.clear()
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        check_vllm()
        assert [f"vLLM {version} was not tested" in record.getMessage() for record in caplog.records] == [True] * warns
