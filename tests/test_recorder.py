"""Trees and logs that a training run leaves, of this package's trainer and of TRL's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from trl import GRPOConfig, GRPOTrainer

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.viewing.library import Library
from trl_ibtpo.viewing.recorder import TreeLog, TreeRecorder


def trainer(model_path, args, cls=IBTPOTrainer, reward_funcs=(tiny.even_length, tiny.has_letter)):
    return cls(model_path, list(reward_funcs), args, tiny.questions())


@pytest.fixture
def opened(config):
    """The library of a run's output folder."""
    return lambda args: Library([args.output_dir])


def test_trees_of_a_run(model_path, config, opened):
    args = config(log_trees=2, log_trees_count=2, per_device_train_batch_size=36, max_steps=4)
    run = trainer(model_path, args)
    kept = {}
    record = run._tree_log.record

    def watch(grown, advantages, prompts, rewards, batch=0):
        kept[run.state.global_step + 1] = grown, advantages, prompts, rewards.copy()
        record(grown, advantages, prompts, rewards, batch)

    run._tree_log.record = watch
    run.train()
    library = opened(args)
    assert library.problems == []
    # Of 3 trees of steps 1, 2 and 4 the first two.
    assert [entry["step"] for entry in library.entries] == [1, 1, 2, 2, 4, 4]
    for number, entry in enumerate(library.entries):
        grown, advantages, prompts, rewards = kept[entry["step"]]
        tree, found = grown[number % 2], advantages[number % 2]
        record = library.record(number)
        assert record["missing"] == [] and record["question"]["text"] == prompts[12 * (number % 2)]
        assert [node["parent"] for node in record["nodes"]] == tree.tree.parents().tolist()
        for leaf, written in enumerate(record["leaves"]):
            path = tree.tree.path(written["node"])
            text = run.processing_class.decode(tree.tree.trajectory(leaf)[0])
            assert "".join(record["nodes"][node]["text"] for node in path) == text
            expected = rewards[12 * (number % 2) + leaf]
            np.testing.assert_allclose(
                np.array(list(written["rewards"].values()), dtype=float), expected, equal_nan=True, rtol=1e-6
            )
            assert list(written["rewards"]) == ["even_length", "has_letter"]
            terms = [record["nodes"][node]["advantage_global"] for node in path]
            np.testing.assert_allclose(terms, found.global_terms[leaf][tree.tree.ends()[path] - 1], rtol=1e-6)
            terms = [record["nodes"][node]["advantage_local"] for node in path]
            np.testing.assert_allclose(terms, found.local_terms[leaf][tree.tree.ends()[path] - 1], rtol=1e-6)
            ended = tree.tree.steps[written["node"]].token_ids[-1] == run.processing_class.eos_token_id
            assert written["finish_reason"] == ("stop" if ended else "length")
        assert len(record["rounds"]) == 8 and record["method"]["advantage"] == "ibtpo"
    curves = {curve["name"]: [step for step, _ in curve["points"]] for curve in library.curves(0)}
    assert set(curves) >= {"Reward", "Success", "Effective rate", "Entropy", "Tokens a question"}
    assert curves["Reward"] == [1, 2, 3, 4]


def test_trees_that_several_steps_train_on_are_recorded(model_path, config, tmp_path):
    """They are grown in steps 1, 3 and 5; the wanted step 4 trains on those of step 3."""
    trainer(model_path, config(log_trees=4, num_iterations=2, max_steps=6)).train()
    found = sorted(path.name for path in (tmp_path / "out" / "trees").glob("step-*"))
    assert found == ["step-000001.jsonl", "step-000003.jsonl"]


def test_independent_groups_are_recorded_too(model_path, config, opened):
    args = config(log_trees=1, max_steps=1, branching="independent", tree_levels=3)
    trainer(model_path, args).train()
    record = opened(args).record(0)
    assert record["rounds"] == [] and all(leaf["branched_after"] == 0 for leaf in record["leaves"])
    assert len(record["leaves"]) == 6


def test_a_strategy_of_a_users_own_has_its_name(model_path, config):
    def longest_first(tree, scores, rng):
        return np.array(tree.ends(), dtype=float)

    run = IBTPOTrainer(model_path, tiny.even_length, config(log_trees=1), tiny.questions(), branching=longest_first)
    method = run._tree_log._method()
    assert (method["branching"], method["uses_rewards"], method["advantage"]) == ("longest_first", True, "ibtpo")
    method = trainer(model_path, config(branching="confidence"))._tree_log._method()
    assert "branching" not in method and method["uses_rewards"] is False


def test_off_writes_nothing(model_path, config, tmp_path):
    args = config(max_steps=1)
    run = trainer(model_path, args)
    run._tree_log._decode = None  # nothing is decoded
    run.train()
    assert not (tmp_path / "out" / "trees").exists()


def test_a_new_run_keeps_the_trees_of_the_one_before(model_path, config, tmp_path):
    run = trainer(model_path, config(log_trees=1, max_steps=1))
    run.train()
    resumed, fresh = replace(run.state, global_step=1), replace(run.state, global_step=0)
    run._tree_log.on_train_begin(run.args, resumed, None)
    names = sorted(path.name for path in (tmp_path / "out" / "trees").iterdir())
    assert names == ["metrics.jsonl", "step-000001.jsonl"]
    run._tree_log.on_train_begin(run.args, fresh, None)
    assert not (tmp_path / "out" / "trees").exists()
    assert sorted(path.name for path in (tmp_path / "out" / "trees-1").iterdir()) == names


def test_a_folder_that_cannot_be_written_does_not_end_a_run(model_path, config, tmp_path, caplog):
    args = config(log_trees=1, max_steps=2)
    run = trainer(model_path, args)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "trees").write_text("a file where the folder should be")
    run.train()
    assert run.state.global_step == 2
    said = [record.getMessage() for record in caplog.records]
    for words in ("Trees are not recorded in", "Logs are not recorded in"):
        (message,) = [each for each in said if each.startswith(words)]
        assert str(tmp_path) in message


def test_files_are_whole_or_not_there(model_path, config, tmp_path, monkeypatch):
    log = trainer(model_path, config(log_trees=1))._tree_log
    (tmp_path / "out" / "trees").mkdir(parents=True)

    parts = []

    def fail(part, name):
        parts.append((part.read_text(), name.name))
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    log.write([{"nodes": []}], 3)
    assert parts == [('{"nodes":[]}\n', "step-000003.jsonl")]
    assert list((tmp_path / "out" / "trees").iterdir()) == []


def test_a_tracker_that_fails_does_not_end_a_run(model_path, config, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise ConnectionError("the tracker is away")

    monkeypatch.setattr("trl_ibtpo.viewing.recorder.show_in_trackers", fail)
    run = trainer(model_path, config(log_trees=1, max_steps=1))
    run.train()
    assert (tmp_path / "out" / "trees" / "step-000001.jsonl").exists()
    said = [record.getMessage() for record in caplog.records]
    assert any("Trees are not shown in the trackers of `report_to`: ConnectionError: the tr" in each for each in said)


def test_every_generation_batch_of_a_step_is_recorded(model_path, config, opened):
    args = config(log_trees=1, log_trees_count=1, max_steps=2, gradient_accumulation_steps=2, steps_per_generation=1)
    trainer(model_path, args).train()
    library = opened(args)
    assert [entry["step"] for entry in library.entries] == [1, 1, 2, 2] and library.problems == []
    questions = [library.record(number)["question"]["text"] for number in range(4)]
    assert len(set(questions)) == 4


def flat(model_path, tmp_path, conversational=False, every=2, **fields):
    """A trainer of TRL's that records its groups of four."""
    names = ("max_completion_length", "report_to", "use_cpu", "bf16", "disable_tqdm", "save_strategy", "logging_steps")
    args = GRPOConfig(
        str(tmp_path / "flat"),
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=12,
        gradient_checkpointing=False,
        **{name: tiny.FAST[name] for name in names},
        **fields,
    )
    rows = tiny.questions(64, conversational)
    run = GRPOTrainer(model_path, [tiny.even_length, tiny.has_letter], args, rows, rows.select(range(4)))
    run.add_callback(TreeRecorder(run, every=every, count=2))
    return run


def test_rows_of_an_evaluation_are_not_recorded(model_path, tmp_path, opened):
    """The second step trains on what the first generated; TRL's logs hold the evaluation's rows by then."""
    fields = {"steps_per_generation": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}
    run = flat(model_path, tmp_path, every=1, gradient_accumulation_steps=1, **fields)
    run.train()
    assert [entry["step"] for entry in opened(run.args).entries] == [1, 1]


@pytest.mark.parametrize("conversational", [False, True])
def test_groups_of_trl(model_path, tmp_path, conversational):
    run = flat(model_path, tmp_path, conversational)
    run.train()
    library = Library([run.args.output_dir])
    assert [(entry["step"], entry["leaves"]) for entry in library.entries] == [(1, 4), (1, 4), (2, 4), (2, 4)]
    assert library.problems == []
    for number in (2, 3):
        record = library.record(number)
        shown = slice(4 * (number - 2), 4 * (number - 1))
        completions = list(run._logs["completion"])[shown]
        assert [node["text"] for node in record["nodes"][1:]] == [tiny.text_of(each) for each in completions]
        assert [leaf["rewards"]["even_length"] for leaf in record["leaves"]] == list(
            run._logs["rewards"]["even_length"]
        )[shown]
        assert record["question"]["text"].startswith("What is ")
        assert {"nodes.ib_score", "nodes.confidence"} <= set(record["missing"])
    assert {curve["name"] for curve in library.curves(0)} >= {"Reward", "Effective rate", "Tokens a question"}


def test_a_trainer_without_completions_is_refused(model_path, config):
    class Other:
        args = config()
        processing_class = tiny.byte_level_tokenizer()

    with pytest.raises(TypeError, match="Other keeps no completions to record"):
        TreeRecorder(Other())
    assert TreeLog(Other(), every=0).wants(1) is False


def test_logs_are_json_whatever_was_logged(model_path, config, tmp_path):
    log = trainer(model_path, config(log_trees=1))._tree_log
    logs = {"a": 1, "b": float("nan"), "c": None, "d": "text", "e": 2.5}
    log.on_log(log.trainer.args, log.trainer.state, None, logs)
    (line,) = (tmp_path / "out" / "trees" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, "a": 1, "e": 2.5}
