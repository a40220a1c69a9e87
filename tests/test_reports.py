"""What a run says beside its metrics: warnings, once each; the table of completions; the line and the bar."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
from transformers import PrinterCallback, ProgressCallback

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training.progress import TreePrinter, TreeProgress, in_words, show_trees
from trl_ibtpo.training.success import SuccessWatch


def messages(caplog, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def sometimes(completions, **kwargs) -> list[float | None]:
    return [None if index == 0 else 1.0 for index in range(len(completions))]


def test_silences_are_broken_once(config, model_path, caplog, monkeypatch):
    """Three steps in which no step ends, some completions have no reward, and success is always the same."""
    monkeypatch.setattr(SuccessWatch, "patience_with_one_value", 2)
    args = config(step_delimiter="\\n\\n", tree_levels=3)
    IBTPOTrainer(model_path, sometimes, args, tiny.questions()).train()
    (escape,) = messages(caplog, "a backslash and the letter n")
    (steps,) = messages(caplog, "Almost no completion has steps")
    (unrewarded,) = messages(caplog, "All reward functions returned None")
    (constant,) = messages(caplog, "Success did not differ")
    assert "'\\\\n\\\\n'" in escape and "in 0 of 6 completions" in steps and "The longest: " in steps
    assert "for 3 of 6 completions" in unrewarded and "What is" in unrewarded  # called for four, one and one
    assert "It comes from 'sometimes', and was 1 for 6 of 6 completions" in constant


def test_trees_that_success_knows_nothing_of_are_spoken_of_once(config, model_path, caplog):
    def math(completions, **kwargs):
        return [None] * len(completions)

    IBTPOTrainer(model_path, [math, tiny.even_length], config(max_steps=2), tiny.questions()).train()
    (said,) = messages(caplog, "has a known success")
    assert "though 'even_length' scored them: success comes from 'math'" in said


def test_the_bar_of_transformers_is_replaced_with_its_settings():
    class Own(ProgressCallback):
        pass

    own = Own()
    handler = SimpleNamespace(callbacks=[ProgressCallback(max_str_len=500), PrinterCallback(), own])
    show_trees(handler, lambda: 1)
    assert [type(each) for each in handler.callbacks] == [TreeProgress, TreePrinter, Own]
    assert handler.callbacks[0].max_str_len == 500 and handler.callbacks[2] is own


def test_success_that_steers_nothing_is_not_spoken_of(config, model_path, caplog, monkeypatch):
    monkeypatch.setattr(SuccessWatch, "patience_with_one_value", 1)
    args = config(branching="confidence", ib_coef=0.0, max_steps=1)
    IBTPOTrainer(model_path, lambda completions, **kwargs: [3.0] * len(completions), args, tiny.questions()).train()
    assert messages(caplog, "Success did not differ") == messages(caplog, "outside [0, 1]") == []


def shaped(completions, **kwargs) -> list[float]:
    return [4 * value - 1 for value in tiny.even_length(completions)]


@pytest.mark.parametrize(
    "fields, given, words",
    [
        ({"success_reward": ("shaped", ">", 0)}, {}, "success from 'shaped' > 0;"),
        ({}, {"success_func": lambda rewards: rewards["even_length"] == 1}, "success from `success_func`;"),
    ],
)
def test_a_threshold_or_a_function_says_what_is_right(config, model_path, capsys, fields, given, words):
    """For a shaped reward beside another one, whose values are no success by themselves."""
    args = config(max_steps=1, log_completions=True, **fields)
    trainer = IBTPOTrainer(model_path, [shaped, tiny.even_length], args, tiny.questions(), **given)
    trainer.train()
    printed, entry = capsys.readouterr().out, trainer.state.log_history[0]
    assert words in printed and "Step 1: " in printed and "'tree/depth'" in printed
    assert entry["tree/average_success"] == pytest.approx(entry["rewards/even_length/mean"])
    assert 0 < entry["tree/average_success"] < 1


def test_the_table_of_completions_shows_trees(config, model_path, tmp_path):
    args = config(
        log_completions=True,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_train_batch_size=24,
    )
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(), eval_dataset=tiny.questions(2))
    seen = []
    compute = trainer._set_step_advantages
    trainer._set_step_advantages = lambda output: (
        compute(output) or seen.append((trainer._grown, output["advantages"]))
    )
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00002.parquet")
    grown, advantages = seen[-1]
    trained = table[table["tree"].notna()]
    assert 12 < len(trained) < len(table) == 24  # TRL keeps as many rows as a generation batch has, the newest
    for _, cells in trained.iterrows():
        tree, leaf = grown[int(cells["tree"])].tree, int(cells["leaf"])
        row = int(cells["tree"]) * 12 + leaf
        path = tree.path(tree.leaves[leaf])
        assert cells["branched_after"] == len(tree.path(tree.branch_steps[leaf]))
        marks = [f"[{advantages[row, tree.ends()[step] - 1]:+.2f}] " for step in path]
        assert [cells["step_advantages"].count(mark) >= 1 for mark in marks] == [True] * len(path)
        assert cells["step_advantages"].startswith(marks[0])
    assert trained["branched_after"].max() > 0


def test_a_stop_of_the_users_own_is_no_cut(config, model_path):
    """And the success of the initial rollouts is theirs alone."""
    tokenizer = tiny.byte_level_tokenizer()
    stops = [tokenizer.eos_token_id, *tokenizer.encode("abcdefgh")]
    args = config(max_steps=1, generation_kwargs={"eos_token_id": stops}, eval_strategy="steps", eval_steps=1)
    trainer = IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions(), eval_dataset=tiny.questions(4))
    trees = []
    compute = trainer._set_step_advantages
    trainer._set_step_advantages = lambda output: trees.extend(trainer._grown) or compute(output)
    trainer.train()
    lengths = [tree.tree.ends()[leaf] for tree in trees for leaf in tree.tree.leaves]
    entry = next(entry for entry in trainer.state.log_history if "completions/clipped_ratio" in entry)
    assert entry["completions/clipped_ratio"] == pytest.approx(sum(length == 32 for length in lengths) / 12)
    assert entry["completions/clipped_ratio"] < 1  # without the recount, all that did not end with <eos>
    whole = [length for length in lengths if length < 32]
    assert entry["completions/mean_terminated_length"] == pytest.approx(sum(whole) / len(whole))
    evaluated = next(entry for entry in trainer.state.log_history if "eval_completions/clipped_ratio" in entry)
    assert evaluated["eval_completions/clipped_ratio"] < 1
    assert entry["tree/initial_success"] == pytest.approx(sum(trees[0].tree.success[:4]) / 4)
    assert trees[0].tree.rounds == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


# ----- the line and the bar ------------------------------------------------------------------------------------------

LOGS = {
    "tree/effective_rate": 9 / 16,
    "tree/depth": 5.13,
    "tree/branch_position": 0.449,
    "tree/average_success": 0.412,
    "tree/initial_success": 0.36,
}


def test_a_log_step_in_words():
    words = "9 of 16 trees teach; 5.1 steps; branched at 45%; success 0.41, initial rollouts 0.36"
    assert in_words(LOGS, 16) == words
    unknown = {name: None for name in ("tree/branch_position", "tree/average_success", "tree/initial_success")}
    assert in_words({**LOGS, **unknown}, 16) == "9 of 16 trees teach; 5.1 steps"  # TRL logs None for no value
    assert in_words({"eval_loss": 0.1}, 0) is None


@pytest.mark.parametrize("watched", [True, False])
def test_the_bar_and_the_line(config, model_path, monkeypatch, capsys, watched):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: watched)
    IBTPOTrainer(
        model_path,
        tiny.even_length,
        config(max_steps=2, disable_tqdm=False, logging_steps=2, per_device_train_batch_size=24),
        tiny.questions(),
    ).train()
    printed, bar = capsys.readouterr()
    (line,) = [line for line in printed.splitlines() if line.startswith("Step 2: ")]
    assert " of 4 trees teach; " in line and "initial rollouts 0." in line
    assert ("'tree/depth'" in printed) != watched  # a file keeps TRL's own line
    assert "% effective, " in bar and " tokens/s" in bar and "reward 0." in bar
    assert "'train_runtime'" in printed
