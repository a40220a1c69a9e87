"""Rewards in the wild: graders that get stuck, graders that have no opinion, and models as graders, in real runs."""

import asyncio
import contextlib
import math
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from test_rewards import GROUP, Gate, by_completion, leaf, make_scorer, wait_for_calls
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from trl.rewards import accuracy_reward

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import generation
from trl_ibtpo.training.rewards import RewardFunctionError
from trl_ibtpo.training.time_limit import TimeLimitExceeded, call_within

LONG = 60  # seconds; what is not interrupted ends after them, so that a test fails rather than hangs


# ----- the limit itself ----------------------------------------------------------------------------------------------


def compute():
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        pass


def hide_errors():
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(LONG)


STUCK = {
    "computes": compute,
    "sleeps": lambda: time.sleep(LONG),
    "waits for a lock": lambda: threading.Event().wait(LONG),
    # These two hold the interpreter, so that no other thread can run.
    "backtracks": lambda: re.match("(a+)+$", "a" * 31 + "b"),
    "multiplies": lambda: 9**9**9,
    "hides errors": hide_errors,
}


@pytest.mark.parametrize("function", STUCK.values(), ids=STUCK)
def test_a_stuck_call_is_interrupted_and_leaves_nothing_behind(function):
    threads = threading.enumerate()
    with pytest.raises(TimeLimitExceeded):
        call_within(0.1, function)
    assert set(threading.enumerate()) <= set(threads)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    os.kill(os.getpid(), signal.SIGVTALRM)  # one that comes late does nothing
    assert call_within(LONG, lambda: "the next call") == "the next call"


def test_a_call_in_time_returns_or_raises():
    assert call_within(LONG, lambda: 7) == 7
    with pytest.raises(KeyError, match="no such column"):
        call_within(LONG, lambda: {}["no such column"])


# ----- scoring with a limit ------------------------------------------------------------------------------------------


def stuck_on_tree_1(prompts, completions, log_extra, **kwargs):
    log_extra("begun", completions)
    if "question 1" in prompts:
        time.sleep(LONG)
    return [1.0] * len(completions)


def test_a_stuck_function_has_no_opinion_on_the_leaves_of_its_call(caplog):
    scorer = make_scorer(stuck_on_tree_1, by_completion, timeout=0.1)
    for tree in range(2):
        scorer.submit([leaf(tree, 0), leaf(tree, 1)])
    scored = scorer.collect(wait=True)
    assert scored[:2] == [(0, 0, 1.0), (0, 1, 1.0)]
    assert [success for _, _, success in scored[2:]] == pytest.approx([math.nan] * 2, nan_ok=True)
    np.testing.assert_array_equal(scorer.rewards[:, 0], [1, 1, np.nan, np.nan, np.nan, np.nan])
    assert scorer.rewards[[3, 4], 1].tolist() == [3 / 8, 4 / 8]  # the other function is heard
    assert scorer.timed_out.sum(axis=0).tolist() == [2, 0]
    assert scorer.extra_columns["begun"][3:5] == ["baa", "bbb"]  # logged before it got stuck
    scorer.warn_of_timeouts()
    assert [record.getMessage() for record in caplog.records] == [
        "The reward function 'stuck_on_tree_1' did not answer within `reward_timeout` (0.1 seconds) for 2 of 6 "
        "completions; prompts: 1, the first 'question 1'. They count as None."
    ]


def test_a_prompt_may_be_the_environments(caplog):
    inputs = [{"seed": row} for row in range(6)]  # its rows have none then
    scorer = make_scorer(lambda **kwargs: time.sleep(LONG), timeout=0.05, inputs=inputs, prompts=["go"] * 6)
    scorer.submit([leaf(0, 0)])
    scorer.collect(wait=True)
    scorer.warn_of_timeouts()
    assert "for 1 of 6 completions; prompts: 1, the first 'go'." in caplog.text


def test_a_stuck_async_function_is_cancelled_and_the_others_go_on(event_loop):
    stuck, quick = Gate("stuck"), Gate("quick")
    scorer = make_scorer(quick, stuck, timeout=0.2, event_loop=event_loop)
    scorer.submit([leaf(0, 0), leaf(0, 1)])
    wait_for_calls(quick, 1)
    quick.open(event_loop, "aaa")
    assert scorer.collect(wait=True) == [(0, 0, 1.0), (0, 1, 1.0)]
    assert stuck.cancelled.acquire(timeout=10)
    assert scorer.timed_out.sum(axis=0).tolist() == [0, 2]
    np.testing.assert_array_equal(scorer.rewards[:2], [[1, np.nan]] * 2)


def test_a_timeout_of_the_functions_own_is_an_error(event_loop):
    async def connection_times_out(completions, **kwargs):
        raise TimeoutError("no answer from the judge")

    scorer = make_scorer(connection_times_out, timeout=LONG, event_loop=event_loop)
    scorer.submit([leaf(0, 0)])
    with pytest.raises(RewardFunctionError, match="raised TimeoutError: no answer from the judge"):
        scorer.collect(wait=True)


def test_an_async_function_that_blocks_the_event_loop_is_named(event_loop):
    ended = threading.Event()

    async def blocks(completions, **kwargs):
        ended.wait(LONG)
        return [1.0] * len(completions)

    scorer = make_scorer(blocks, timeout=0.1, event_loop=event_loop)
    scorer.patience = 0.2
    scorer.submit([leaf(0, 0)])
    try:
        with pytest.raises(RewardFunctionError, match=r"`reward_timeout` is 0\.1, but 'blocks' holds up the event lo"):
            scorer.collect(wait=True)
    finally:
        scorer.cancel()
        ended.set()


def test_a_model_is_not_limited():
    class SlowModel(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            time.sleep(0.3)
            return type("Output", (), {"logits": torch.full((len(input_ids), 1), 0.5)})

    tokenizer = tiny.byte_level_tokenizer()
    scorer = make_scorer(SlowModel(), reward_processing_classes=[tokenizer], timeout=0.1)
    scorer.submit([leaf(0, 0)])
    assert scorer.collect(wait=True) == [(0, 0, 0.5)]


def test_outside_the_main_thread_a_function_cannot_be_interrupted():
    errors = []

    def submit():
        try:
            make_scorer(by_completion, timeout=1.0).submit([leaf(0, 0)])
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join()
    assert "`reward_timeout` is 1.0, but the reward function 'by_completion' cannot be interrupted here" in errors[0]


def test_math_verify_and_its_own_time_limits():
    """TRL's reward sets alarms of its own in the main thread; an answer that is never evaluated counts as None."""
    answers = [r"\boxed{\frac{1}{3}}", r"\boxed{0.5}", r"\boxed{9^{9^{9^{9}}}}"]

    def decode(completion_ids, rows):
        return [[{"role": "assistant", "content": answers[row]}] for row in rows]

    inputs = [{"prompt": [{"role": "user", "content": "?"}], "solution": r"$\frac{1}{3}$"}] * GROUP
    accuracy_reward(decode([], [0]), [r"$\frac{1}{3}$"])  # imports outside the limit
    scorer = make_scorer(accuracy_reward, inputs=inputs, decode=decode, timeout=2.0)
    handler = signal.getsignal(signal.SIGALRM)
    for number in range(GROUP):
        scorer.submit([leaf(0, number)])
    np.testing.assert_array_equal(scorer.rewards[:, 0], [1, 0, np.nan])
    assert scorer.timed_out[:, 0].tolist() == [False, False, True]
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# ----- training ------------------------------------------------------------------------------------------------------


def train(model_path, rewards, args, data=None, **kwargs) -> IBTPOTrainer:
    trainer = IBTPOTrainer(model_path, rewards, args, tiny.questions() if data is None else data, **kwargs)
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == args.max_steps and all(math.isfinite(loss) for loss in losses)
    return trainer


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_when_a_grader_is_stuck(config, model_path, caplog, asynchronous):
    """Stuck for one call of the first step; counted and named there, and not in the second step."""
    calls = []

    def grade(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            time.sleep(LONG)
        return tiny.even_length(completions)

    async def grade_async(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            await asyncio.sleep(LONG)
        return tiny.even_length(completions)

    grader = grade_async if asynchronous else grade
    args = config(max_steps=2, per_device_train_batch_size=24, reward_timeout=0.5)
    trainer = train(model_path, [grader, tiny.has_letter], args)
    first, second = trainer.state.log_history[:2]
    name = grader.__name__
    assert first[f"rewards/{name}/timeouts"] == calls[1] > 0
    assert second[f"rewards/{name}/timeouts"] == first["rewards/has_letter/timeouts"] == 0
    warnings = [record.getMessage() for record in caplog.records if "did not answer" in record.getMessage()]
    assert len(warnings) == 1 and f"'{name}'" in warnings[0] and f"for {calls[1]} of 24 completions" in warnings[0]


def test_evaluation_is_limited_too(config, model_path):
    def stuck(completions, **kwargs):
        if not trainer.model.training:
            time.sleep(LONG)
        return tiny.even_length(completions)

    args = config(eval_strategy="steps", eval_steps=1, max_steps=1, num_generations_eval=2, reward_timeout=0.3)
    data = tiny.questions(4)
    trainer = IBTPOTrainer(model_path, [tiny.even_length, stuck], args, data, eval_dataset=data.select(range(1)))
    trainer.train()
    evaluation = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    assert evaluation["eval_rewards/stuck/timeouts"] == 2 and evaluation["eval_rewards/stuck/mean"] is None
    assert evaluation["eval_rewards/even_length/mean"] in (0, 0.5, 1)


@pytest.mark.parametrize("overrides", [{}, {"scale_rewards": "batch"}, {"branch_lookahead": 3}], ids=str)
def test_trees_without_any_reward_teach_nothing(config, model_path, overrides):
    """Every second prompt is unscorable: its trees grow, its advantages are 0, and nothing becomes NaN."""
    rewards, advantages = [], []

    def every_second_prompt(prompts, completions, **kwargs):
        values = tiny.even_length(completions)
        return [None if int(prompt[8]) % 2 else value for prompt, value in zip(prompts, values, strict=True)]

    args = config(per_device_train_batch_size=48, beta=0.0, **overrides)
    trainer = IBTPOTrainer(model_path, every_second_prompt, args, tiny.questions())
    score = trainer._generate_and_score_completions

    def record(inputs):
        output = score(inputs)
        rewards.extend(trainer._logs["rewards"]["every_second_prompt"])
        advantages.extend(output["advantages"])
        return output

    trainer._generate_and_score_completions = record
    trainer.train()
    unknown = [math.isnan(reward) for reward in rewards]
    assert 0 < sum(unknown) < len(unknown) == 3 * 48 and sum(unknown) % 12 == 0
    for reward, advantage in zip(rewards, advantages, strict=True):
        assert torch.isfinite(advantage).all()
        assert not math.isnan(reward) or not advantage.any()
    assert any(advantage.any() for advantage in advantages)


def test_no_reward_at_all(config, model_path):
    def no_opinion(completions, **kwargs):
        return [None] * len(completions)

    before = AutoModelForCausalLM.from_pretrained(model_path).parameters()
    trainer = train(model_path, no_opinion, config(beta=0.0))
    assert [entry["loss"] for entry in trainer.state.log_history[:3]] == [0.0] * 3
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert trainer.state.log_history[0]["tree/average_success"] is None


@pytest.fixture(scope="module")
def reward_model_path(tmp_path_factory) -> str:
    tokenizer = tiny.byte_level_tokenizer()
    path = str(tmp_path_factory.mktemp("rewards") / "judge")
    tiny.tiny_reward_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("as_module", [False, True], ids=["path", "module"])
@pytest.mark.parametrize("conversational", [False, True])
def test_training_with_a_reward_model(config, model_path, reward_model_path, as_module, conversational):
    """Its first logit on prompt and completion is the reward, beside a function and under a time limit."""
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    args = config(max_steps=1, reward_weights=[1.0, 0.5], reward_timeout=LONG)
    rewards = [tiny.even_length, judge if as_module else reward_model_path]
    trainer = train(model_path, rewards, args, tiny.questions(8, conversational))
    logged = trainer._logs
    tokenizer = tiny.byte_level_tokenizer()
    rows = zip(logged["prompt"], logged["completion"], logged["rewards"]["judge"], strict=True)
    for prompt, completion, reward in rows:
        text = tokenizer.apply_chat_template(prompt + completion, tokenize=False) if conversational else None
        ids = tokenizer.encode(text or prompt + completion, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            assert judge(input_ids=ids).logits[0, 0].item() == pytest.approx(reward, abs=1e-5)
    entry = trainer.state.log_history[0]
    assert entry["rewards/judge/mean"] == pytest.approx(np.mean(logged["rewards"]["judge"]), abs=1e-5)
    assert "rewards/even_length/timeouts" in entry and "rewards/judge/timeouts" not in entry


# ----- rewards of any range ------------------------------------------------------------------------------------------


def shaped(completions, **kwargs) -> list[float]:
    """-1, 0.25 or 1.5, by the length of the completion."""
    return [-1 + 1.25 * (len(tiny.text_of(completion)) % 3) for completion in completions]


def in_order(completions, **kwargs) -> list[float]:
    return [-1.0, 0.25, 1.5][: len(completions)]


@pytest.mark.parametrize(
    "success_range, success",
    [(None, [0.0, 0.5, 1.0]), ([-1.0, 1.5], [0.0, 0.5, 1.0]), ((-2, 2), [0.25, 0.5625, 0.875])],
)
def test_success_by_hand(config, model_path, success_range, success):
    """Three one-step completions; `rho` is success over the mean success, the paper's beta is 5."""
    args = config(tree_initial_rollouts=3, tree_levels=1, step_delimiter="#####", success_range=success_range)
    trainer = IBTPOTrainer(model_path, in_order, args, tiny.questions())
    (grown,) = trainer.grow_trees([tiny.questions()[0]])
    assert grown.tree.success == success
    assert grown.tree.rewards == [-1.0, 0.25, 1.5]
    eta1 = [value / np.mean(success) - 1.2 for value in success]
    np.testing.assert_allclose(grown.scores.eta1[grown.tree.leaves], eta1)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["reward"] == entry["rewards/in_order/mean"] == 0.25
        assert entry["tree/average_success"] == pytest.approx(np.mean(success))


def scaling_warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "outside [0, 1]" in record.getMessage()]


def test_training_with_a_shaped_reward(config, model_path, caplog):
    trainer = train(model_path, [tiny.has_letter, shaped], config(success_reward="shaped", branch_lookahead=3))
    entries = trainer.state.log_history[:3]
    assert any(entry["tree/effective_rate"] > 0 for entry in entries)
    assert all(math.isfinite(entry["ib/covariance"]) for entry in entries)
    assert all(0 <= entry["tree/average_success"] <= 1 for entry in entries)
    (message,) = scaling_warnings(caplog)  # of three generation batches
    assert "The reward function 'shaped' returned" in message and "`success_range=(-1.0, 1.5)`" in message


def test_trees_without_training_say_how_rewards_are_scaled(config, model_path, caplog):
    trainer = IBTPOTrainer(model_path, shaped, config(), tiny.questions())
    for _ in range(2):
        trainer.grow_trees([tiny.questions()[0]])
    (message,) = scaling_warnings(caplog)
    assert "The reward function 'shaped' returned" in message


def test_a_function_that_edits_prompts_edits_its_own(config, model_path):
    """In training every row has a message list of its own; so it is where trees are grown without training."""
    seen = []

    def continues(prompts, completions, **kwargs):
        for prompt, completion in zip(prompts, completions, strict=True):
            seen.append(len(prompt))
            prompt += completion
        return [0.5] * len(prompts)

    row = tiny.questions(conversational=True)[0]
    IBTPOTrainer(model_path, continues, config(), tiny.questions(conversational=True)).grow_trees([row])
    assert seen == [1] * 12 and len(row["prompt"]) == 1


@pytest.mark.parametrize("fields", [{"branching": name} for name in ("ib", "confidence", "random")], ids=str)
def test_a_range_that_maps_to_the_same_success_grows_the_same_trees(config, model_path, fields):
    def stretched(completions, **kwargs):
        return [2.5 * value - 1 for value in tiny.even_length(completions)]

    trees = {}
    for reward, success_range in ((tiny.even_length, None), (stretched, (-1.0, 1.5))):
        args = config(success_range=success_range, reproducible_rollouts=True, **fields)
        (grown,) = IBTPOTrainer(model_path, reward, args, tiny.questions()).grow_trees([tiny.questions()[0]])
        trees[reward.__name__] = [grown.tree.trajectory(leaf) for leaf in range(12)], grown.tree.success
    assert trees["even_length"] == trees["stretched"]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"branching": "ib", "ib_coef": 0.0}, True),
        ({"branching": "random"}, True),
        ({"branching": "random", "ib_coef": 0.0}, False),
        ({"branching": "confidence", "advantage": "grpo"}, False),
        ({"branching": "independent", "ib_coef": 0.0}, False),
        ({"success_range": (-1.0, 1.5)}, False),
        ({"success_reward": "even_length"}, False),
    ],
    ids=str,
)
def test_the_range_is_spoken_of_where_it_matters(config, model_path, caplog, fields, said):
    train(model_path, [shaped, tiny.even_length], config(max_steps=1, **fields))
    assert len(scaling_warnings(caplog)) == said


def test_the_start_line_names_the_range(config, model_path, capsys):
    args = config(max_steps=1, success_range=(-1.0, 1.5))
    train(model_path, shaped, args)
    assert "success from 'shaped' between -1.0 and 1.5 (`success_range`);" in capsys.readouterr().out


def test_training_with_a_reward_model_alone(config, model_path, reward_model_path, caplog):
    """Its logits may be anything; trees branch and learn by them all the same."""
    trainer = train(model_path, reward_model_path, config())
    entries = trainer.state.log_history[:3]
    assert all(entry["tree/effective_rate"] == 1.0 for entry in entries)  # no two logits are the same
    assert all(math.isfinite(entry["ib/covariance"]) for entry in entries)
    logits = trainer._logs["rewards"]["judge"]
    assert min(logits) < 0 and len(scaling_warnings(caplog)) == 1


# ----- what reward functions may do, and what datasets may hold ------------------------------------------------------


def shout(completions, **kwargs) -> list[float]:
    for completion in completions:
        completion[0]["content"] = completion[0]["content"].upper() + "!"
    return [1.0] * len(completions)


def sees_the_shout(completions, **kwargs) -> list[float]:
    return [float(completion[0]["content"].endswith("!")) for completion in completions]


@pytest.mark.parametrize("fields", [{}, {"reward_timeout": LONG}], ids=str)
def test_reward_functions_may_edit_completions(config, model_path, fields):
    """As in TRL: the next function sees the edit, and so does the table; what is trained on is what was sampled."""
    data = tiny.questions(8, conversational=True)
    args = config(max_steps=1, eval_strategy="steps", eval_steps=1, num_generations_eval=2, **fields)
    trainer = train(model_path, [shout, sees_the_shout], args, data, eval_dataset=data.select(range(1)))
    training, evaluation = trainer.state.log_history[:2]
    assert training["rewards/sees_the_shout/mean"] == evaluation["eval_rewards/sees_the_shout/mean"] == 1.0
    assert all(tiny.text_of(completion).endswith("!") for completion in trainer._logs["completion"])


def test_other_columns_do_not_make_a_text_a_conversation(config, model_path, monkeypatch):
    """TRL's function looks at any one of a row's columns, by the hash of their names."""
    asked, is_conversational = [], generation.is_conversational
    monkeypatch.setattr(generation, "is_conversational", lambda row: asked.append([*row]) or is_conversational(row))
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    data = Dataset.from_list([{"prompt": "What is 3 + 4?", "messages": messages, "chosen": messages}] * 8)
    trainer = train(model_path, tiny.even_length, config(max_steps=1), data)
    assert asked and all(columns == ["prompt"] for columns in asked)
    assert all(isinstance(completion, str) for completion in trainer._logs["completion"])


def test_training_with_math_verify_under_a_limit(config, model_path):
    data = tiny.questions(8, conversational=True).add_column("solution", ["$7$"] * 8)
    entry = train(model_path, accuracy_reward, config(max_steps=1, reward_timeout=LONG), data).state.log_history[0]
    assert entry["rewards/accuracy_reward/mean"] is not None and entry["rewards/accuracy_reward/timeouts"] == 0
