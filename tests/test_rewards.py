"""Scoring leaves while trees grow: what reward functions get, what comes back, and what goes wrong readably."""

import asyncio
import inspect
import math
import sys
import threading

import numpy as np
import pytest
import tiny
import torch

from trl_ibtpo.training.rewards import RewardFunctionError, RewardScorer
from trl_ibtpo.training.success import Success, describe_scaling
from trl_ibtpo.tree import RolloutTree

GROUP = 3
INPUTS = [
    {"prompt": f"question {tree}", "answer": f"answer {tree}", "level": tree}
    for tree in range(2)
    for _ in range(GROUP)
]


def decode(completion_ids: list[list[int]], rows: list[int]) -> list[str]:
    return ["".join(chr(96 + token_id) for token_id in ids) for ids in completion_ids]


def make_scorer(*reward_funcs, success_reward=None, success_range=None, success_func=None, **changes) -> RewardScorer:
    names = changes.get("reward_names", [getattr(func, "__name__", "reward_model") for func in reward_funcs])
    arguments = {
        "inputs": INPUTS,
        "leaves_per_tree": GROUP,
        "reward_funcs": reward_funcs,
        "reward_names": names,
        "reward_processing_classes": [None] * len(reward_funcs),
        "success": Success(names, success_reward, success_range, success_func),
        "decode": decode,
        "shared_arguments": {"trainer_state": "the state"},
        "event_loop": None,
        "chat_template_kwargs": {},
        "device": torch.device("cpu"),
    }
    return RewardScorer(**{**arguments, **changes})


def leaf(tree: int, number: int) -> tuple[int, int, list[int]]:
    """A leaf whose completion says which one it is: (1, 2) is "bcc"."""
    return tree, number, [tree + 1] + [number + 1] * 2


def value_of(tree: int, number: int) -> float:
    return (tree * GROUP + number) / 8


def by_completion(completions, **kwargs) -> list[float]:
    """A different reward for each leaf, read from its completion."""
    return [value_of(ord(completion[0]) - 97, ord(completion[1]) - 97) for completion in completions]


# Both trees, in an order and in batches as an engine may finish them.
BATCHES = [[leaf(1, 2), leaf(0, 1)], [leaf(1, 0)], [leaf(0, 2), leaf(0, 0), leaf(1, 1)]]


def score_all(scorer: RewardScorer, wait: bool = False) -> list[tuple[int, int, float]]:
    scored = []
    for batch in BATCHES:
        scorer.submit(batch)
        scored += scorer.collect(wait=wait)
    return scored


# ----- what functions get and what comes back ------------------------------------------------------------------------


def test_rewards_and_successes_find_their_leaves():
    def second(completions, **kwargs):
        return [10 * value for value in by_completion(completions)]

    scorer = make_scorer(by_completion, second)
    scored = score_all(scorer)
    assert [(tree, number) for tree, number, _ in scored] == [leaf[:2] for batch in BATCHES for leaf in batch]
    assert scored == [(tree, number, value_of(tree, number)) for tree, number, _ in scored]
    assert scorer.rewards.dtype == np.float32
    assert scorer.rewards.tolist() == [[row / 8, 10 * row / 8] for row in range(6)]
    assert scorer.completions == ["aaa", "abb", "acc", "baa", "bbb", "bcc"]
    assert scorer.collect(wait=False) == []


def test_functions_get_what_trl_gives_them_for_the_leaves_of_the_call():
    calls = []

    def reward(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric):
        calls.append((prompts, completions, completion_ids, answer, level))
        assert trainer_state == "the state" and callable(log_extra) and callable(log_metric)
        return [0.5] * len(prompts)

    score_all(make_scorer(reward))
    assert calls == [
        (
            [f"question {tree}" for tree, _, _ in batch],
            decode([ids for _, _, ids in batch], []),
            [ids for _, _, ids in batch],
            [f"answer {tree}" for tree, _, _ in batch],
            [tree for tree, _, _ in batch],
        )
        for batch in BATCHES
    ]


def test_where_nobody_waits_synchronous_functions_are_called_once_at_the_end(event_loop):
    calls, awaited = [], []

    def reward(completions, answer, **kwargs):
        calls.append((list(completions), answer))
        return by_completion(completions)

    async def slow(completions, **kwargs):
        awaited.append(list(completions))
        return [0.0] * len(completions)

    scorer = make_scorer(reward, slow, postpone=True, event_loop=event_loop)
    assert score_all(scorer) == [] and calls == []
    scored = []
    while len(scored) < 6:
        scored += scorer.collect(wait=True)
    # In the order of the rows, as TRL calls it; asynchronous ones began when the leaves were there.
    assert calls == [(["aaa", "abb", "acc", "baa", "bbb", "bcc"], ["answer 0"] * 3 + ["answer 1"] * 3)]
    assert sorted(map(len, awaited)) == [1, 2, 3]
    assert sorted(scored) == [(tree, number, value_of(tree, number)) for tree in (0, 1) for number in range(3)]


def test_postponed_functions_with_a_time_limit_are_called_as_leaves_finished():
    """A call that is stuck takes its own leaves with it, not the whole batch."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return by_completion(completions)

    scorer = make_scorer(reward, postpone=True, timeout=60.0)
    assert score_all(scorer) == []
    assert len(scorer.collect(wait=True)) == 6 and calls == [2, 1, 3]


def test_decode_gets_the_rows_of_its_completions():
    rows = []

    def decode_rows(completion_ids, its_rows):
        rows.append(its_rows)
        return decode(completion_ids, its_rows)

    score_all(make_scorer(by_completion, decode=decode_rows))
    assert rows == [[5, 1], [3], [2, 0, 4]]


def test_every_leaf_is_scored_once_by_every_function(event_loop):
    seen = {"first": [], "second": []}

    def first(completions, **kwargs):
        seen["first"] += completions
        return [1.0] * len(completions)

    async def second(completions, **kwargs):
        seen["second"] += completions
        return [1.0] * len(completions)

    scorer = make_scorer(first, second, event_loop=event_loop)
    assert len(score_all(scorer, wait=True)) == 6
    for completions in seen.values():
        assert sorted(completions) == ["aaa", "abb", "acc", "baa", "bbb", "bcc"]


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.array, torch.tensor, lambda values: (value for value in values)],
    ids=["list", "tuple", "array", "tensor", "generator"],
)
def test_any_sequence_of_numbers_will_do(convert):
    scorer = make_scorer(lambda completions, **kwargs: convert(by_completion(completions)), reward_names=["reward"])
    score_all(scorer)
    assert scorer.rewards[:, 0].tolist() == [row / 8 for row in range(6)]


def test_none_is_an_unknown_reward():
    def only_the_first_tree(completions, **kwargs):
        return [None if completion.startswith("b") else 1 for completion in completions]

    scorer = make_scorer(only_the_first_tree, by_completion)
    scored = {(tree, number): success for tree, number, success in score_all(scorer)}
    assert [scored[0, number] for number in range(3)] == [1.0] * 3
    assert all(math.isnan(scored[1, number]) for number in range(3))
    np.testing.assert_array_equal(scorer.rewards[:, 0], [1, 1, 1, np.nan, np.nan, np.nan])
    assert scorer.rewards[:, 1].tolist() == [row / 8 for row in range(6)]


def test_rounding_beyond_the_unit_interval_is_none():
    def length(completions, **kwargs):
        return [-7.0] * len(completions)

    def nearly(completions, **kwargs):
        return [1 + 5e-7 if completion.startswith("a") else -5e-7 for completion in completions]

    scorer = make_scorer(length, nearly, success_reward="nearly")
    trees = grafted(score_all(scorer), None)
    assert {success for tree in trees for success in tree.success} == {0.0, 1.0}
    assert scorer.rewards[:, 0].tolist() == [-7.0] * 6  # only success is clipped


def grafted(scored, success_range) -> list[RolloutTree]:
    """Two trees of three leaves each, with the rewards that were collected."""
    trees = [RolloutTree([9], success_range) for _ in range(2)]
    for tree in trees:
        for _ in range(3):
            tree.extend(tree.open(0), [7], [-1.0], [1])
    for tree, number, reward in scored:
        trees[tree].add_reward(number, reward)
    return trees


SHAPED = [-1.0, 0.25, 1.5]  # of the leaves 0, 1 and 2 of each tree


def shaped(completions, **kwargs) -> list[float]:
    return [SHAPED[ord(completion[1]) - 97] for completion in completions]


async def shaped_later(completions, **kwargs) -> list[float]:
    return shaped(completions)


@pytest.mark.parametrize("func", [shaped, shaped_later])
@pytest.mark.parametrize(
    "success_range, expected",
    [
        (None, [0.0, 0.5, 1.0]),  # their own range
        ((-1.0, 1.5), [0.0, 0.5, 1.0]),
        ((-1, 4), [0.0, 0.25, 0.5]),
        ((0.0, 0.5), [0.0, 0.5, 1.0]),  # clipped at both ends
        ((2.0, 3.0), [0.0, 0.0, 0.0]),
    ],
)
def test_any_range_of_rewards(func, success_range, expected, event_loop):
    """By hand: (reward - low) / (high - low)."""
    scorer = make_scorer(func, event_loop=event_loop)
    scored = []
    for batch in BATCHES:
        scorer.submit(batch)
    while len(scored) < 6:
        scored += scorer.collect(wait=True)
    assert sorted(scored) == [(tree, number, SHAPED[number]) for tree in range(2) for number in range(3)]
    for tree in grafted(scored, success_range):
        assert tree.success == expected
        assert tree.rewards == SHAPED  # not what was made of them
    assert scorer.rewards[:, 0].tolist() == SHAPED * 2  # advantages take the reward itself


def test_an_unknown_reward_stays_unknown_in_a_range():
    scorer = make_scorer(lambda completions, **kwargs: [None, -3.0], reward_names=["reward"])
    scorer.submit([leaf(0, 0), leaf(0, 1)])
    tree, _ = grafted(scorer.collect(wait=True), (-4, 0))
    assert math.isnan(tree.rewards[0]) and math.isnan(tree.success[0])
    assert (tree.rewards[1], tree.success[1]) == (-3.0, 0.25)


@pytest.mark.parametrize(
    "values, words",
    [
        ([0.2, math.nan, 1.5, -1.0], ["'shaped' returned 1.5, outside [0, 1]", "`success_range=(-1.0, 1.5)`"]),
        ([-0.3, 0.7], ["returned -0.3, ", "`success_range=(-0.3, 0.7)`"]),
        ([3.5, 3.5], ["returned 3.5, ", "`success_range=(0.0, 3.5)`"]),  # a range needs two numbers
        ([-2.0], ["returned -2.0, ", "`success_range=(-2.0, 1.0)`"]),
        ([12.34125, 12.34375], ["returned 12.34, ", "`success_range=(12.341, 12.344)`"]),  # a range is not empty
    ],
)
def test_what_is_said_of_other_ranges(values, words):
    message = describe_scaling("the reward function 'shaped'", np.float32(values).astype(float))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("values", [[0.0, 1.0, math.nan], [1 + 1e-6, -1e-6], [math.nan], []])
def test_nothing_is_said_of_rewards_in_the_unit_interval(values):
    assert describe_scaling("shaped", np.float32(values).astype(float)) is None


# ----- logging -------------------------------------------------------------------------------------------------------


def test_extra_columns_are_in_the_order_of_the_rows():
    def reward(completions, completion_ids, log_extra, **kwargs):
        log_extra("text", completions)
        if len(completions) == 2:  # a column that some calls leave out
            log_extra("pair", [f"{completion}!" for completion in completions])
        return [0.0] * len(completions)

    scorer = make_scorer(reward)
    score_all(scorer)
    assert scorer.extra_columns == {
        "text": ["aaa", "abb", "acc", "baa", "bbb", "bcc"],
        "pair": [None, "abb!", None, None, None, "bcc!"],
    }


def test_metrics_come_with_their_number_of_leaves():
    def reward(completions, log_metric, **kwargs):
        log_metric("share_of_a", sum(completion.startswith("a") for completion in completions) / len(completions))
        return [0.0] * len(completions)

    scorer = make_scorer(reward)
    score_all(scorer)
    assert scorer.metrics == {"share_of_a": [(1 / 2, 2), (0.0, 1), (2 / 3, 3)]}
    # The mean over leaves is that of one call with all six: 3 of them start with "a".
    assert sum(value * leaves for value, leaves in scorer.metrics["share_of_a"]) / 6 == pytest.approx(0.5)


# ----- asynchronous functions ----------------------------------------------------------------------------------------


class Gate:
    """An asynchronous reward function that answers when told to."""

    def __init__(self, name: str = "gated", value: float = 1.0):
        self.__name__ = name
        self.opened: dict[str, asyncio.Event] = {}
        self.running = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self.value = value

    async def __call__(self, completions, **kwargs):
        event = self.opened[completions[0]] = asyncio.Event()
        self.running.release()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return [self.value] * len(completions)

    def open(self, loop, completion: str) -> None:
        loop.call_soon_threadsafe(self.opened[completion].set)


def wait_for_calls(gate: Gate, count: int) -> None:
    for _ in range(count):
        assert gate.running.acquire(timeout=10)


def test_async_calls_run_side_by_side_and_do_not_hold_up(event_loop):
    gate = Gate()
    scorer = make_scorer(gate, event_loop=event_loop)
    assert score_all(scorer) == []
    wait_for_calls(gate, 3)  # all three calls are under way, none has answered
    assert scorer.collect(wait=False) == []
    threading.Timer(0.05, gate.open, (event_loop, "baa")).start()
    assert scorer.collect(wait=True) == [(1, 0, 1.0)]  # waits for one, not for all
    assert scorer.collect(wait=False) == []
    gate.open(event_loop, "bcc")
    gate.open(event_loop, "acc")
    scored = []
    while len(scored) < 5:
        scored += scorer.collect(wait=True)
    assert sorted(scored) == [(0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.0), (1, 1, 1.0), (1, 2, 1.0)]
    assert scorer.collect(wait=True) == []  # nothing is pending: no deadlock


def test_a_leaf_is_known_when_all_its_functions_have_answered(event_loop):
    slow, fast = Gate("slow", 0.25), Gate("fast", 0.75)

    def sync(completions, **kwargs):
        return [0.5] * len(completions)

    scorer = make_scorer(sync, slow, fast, event_loop=event_loop)
    scorer.submit([leaf(0, 0)])
    assert scorer.rewards[0, 0] == 0.5  # the synchronous one ran at once
    wait_for_calls(slow, 1)
    wait_for_calls(fast, 1)
    fast.open(event_loop, "aaa")
    while math.isnan(scorer.rewards[0, 2]):
        assert scorer.collect(wait=False) == []
    threading.Timer(0.05, slow.open, (event_loop, "aaa")).start()
    assert scorer.collect(wait=True) == [(0, 0, 0.5)]
    assert scorer.rewards[0].tolist() == [0.5, 0.25, 0.75]


def test_async_functions_run_while_synchronous_ones_compute(event_loop):
    gate = Gate()

    def sync(completions, **kwargs):
        wait_for_calls(gate, 1)  # the asynchronous function has started although this one is not done
        return [0.5] * len(completions)

    scorer = make_scorer(sync, gate, event_loop=event_loop)
    scorer.submit([leaf(0, 0)])
    gate.open(event_loop, "aaa")
    assert scorer.collect(wait=True) == [(0, 0, 0.5)]


def test_waiting_for_many_calls_that_finish_by_halves(event_loop):
    """Waiting must not nest: one of the two functions of all calls answers, one call after the other."""
    calls = 150
    slow = Gate("slow")

    async def quick(completions, completion_ids, **kwargs):
        await asyncio.sleep(0.002 * completion_ids[0][0])
        if completion_ids[0][0] == calls:
            for event in slow.opened.values():
                event.set()
        return [0.0]

    scorer = make_scorer(slow, quick, inputs=INPUTS[:1] * calls, leaves_per_tree=calls, event_loop=event_loop)
    for number in range(calls):
        scorer.submit([(0, number, [number + 1])])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        scored = []
        while len(scored) < calls:
            scored += scorer.collect(wait=True)
    finally:
        sys.setrecursionlimit(limit)
    assert sorted(number for _, number, _ in scored) == list(range(calls))


def test_cancel_drops_what_is_pending(event_loop):
    gate = Gate()
    scorer = make_scorer(gate, event_loop=event_loop)
    scorer.submit([leaf(0, 0)])
    scorer.submit([leaf(0, 1)])
    wait_for_calls(gate, 2)
    scorer.cancel()
    assert gate.cancelled.acquire(timeout=10) and gate.cancelled.acquire(timeout=10)
    assert scorer.collect(wait=True) == []
    scorer.cancel()  # also when there is nothing left


# ----- reward models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model():
    tokenizer = tiny.byte_level_tokenizer()
    return tiny.tiny_reward_model(tokenizer, num_labels=2), tokenizer


def first_logit(model, tokenizer, text: str) -> float:
    token_ids = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=token_ids).logits[0, 0].item()


@pytest.mark.parametrize("conversational", [False, True])
def test_reward_model_scores_prompt_and_completion(reward_model, conversational):
    model, tokenizer = reward_model
    inputs, completions, texts = [], ["7", "", "the answer is 7.\n\nDone"], []
    for text in completions:
        prompt = "What is 3 + 4?"
        inputs.append({"prompt": [{"role": "user", "content": prompt}] if conversational else prompt})
        texts.append(f"<user>{prompt}<eos><assistant>{text}<eos>" if conversational else prompt + text)

    def decode(completion_ids, rows):
        found = [completions[row] for row in rows]
        return [[{"role": "assistant", "content": text}] for text in found] if conversational else found

    scorer = make_scorer(
        by_completion_length,
        model,
        inputs=inputs,
        reward_processing_classes=[None, tokenizer],
        decode=decode,
    )
    scorer.submit([leaf(0, 2), leaf(0, 0)])
    scorer.submit([leaf(0, 1)])
    expected = [first_logit(model, tokenizer, text) for text in texts]
    assert len(set(np.round(expected, 4))) == 3
    np.testing.assert_allclose(scorer.rewards[:, 1], expected, atol=1e-5)


def by_completion_length(completions, **kwargs) -> list[float]:
    return [min(1.0, len(tiny.text_of(completion)) / 100) for completion in completions]


# ----- what goes wrong -----------------------------------------------------------------------------------------------


def raises(completions, **kwargs):
    raise KeyError("no such column")


async def raises_later(completions, **kwargs):
    raise KeyError("no such column")


@pytest.mark.parametrize("func", [raises, raises_later])
def test_a_function_that_raises(func, event_loop):
    scorer = make_scorer(by_completion, func, event_loop=event_loop)
    with pytest.raises(RewardFunctionError) as caught:
        scorer.submit([leaf(1, 0), leaf(0, 0)])
        scorer.collect(wait=True)
    message = str(caught.value)
    assert f"The reward function '{func.__name__}' raised KeyError: 'no such column'" in message
    assert "while scoring 2 completions, the first for the prompt 'question 1'" in message
    assert "Original traceback:" in message and f"in {func.__name__}" in message and "test_rewards.py" in message
    assert isinstance(caught.value.__cause__, KeyError)
    scorer.cancel()


def test_an_async_function_that_raises_does_not_hide_behind_pending_ones(event_loop):
    gate = Gate()
    scorer = make_scorer(gate, raises_later, event_loop=event_loop)
    scorer.submit([leaf(0, 0)])
    with pytest.raises(RewardFunctionError, match="'raises_later' raised KeyError"):
        scorer.collect(wait=True)
    scorer.cancel()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards, but 2 were expected: one per completion"),
        ([1.0] * 3, "returned 3 rewards, but 2 were expected"),
        ([], "returned 0 rewards, but 2 were expected"),
        (0.5, "returned 0.5; it must return a list with one number or None per completion"),
        (None, "returned None; it must return a list"),
        ([0.5, [1.0]], r"returned \[0.5, \[1.0\]\]; it must return a list"),
        ([0.5, "right"], r"returned \[0.5, 'right'\]; it must return a list"),
        ("10", "returned '10'; it must return a list"),
        ({"aaa": 1.0, "abb": 0.0}, "it must return a list"),
        (np.ones((2, 2)), "it must return a list"),
        (torch.ones(2, 2), "it must return a list"),
        ([0.5, "0.5"], r"returned \[0.5, '0.5'\]; it must return a list"),
        ([0.5, 10**400], "it must return a list"),  # no float holds it
        ([0.5, 1e39], r"returned 1e\+39; a reward must be a finite number"),  # more than TRL's float32 holds
    ],
)
def test_a_function_that_returns_something_else(returned, message):
    def reward(completions, **kwargs):
        return returned

    with pytest.raises(RewardFunctionError, match=f"(?s)The reward function 'reward' .*{message}"):
        make_scorer(reward).submit([leaf(0, 0), leaf(0, 1)])


def test_extra_column_of_the_wrong_length():
    def reward(completions, log_extra, **kwargs):
        log_extra("text", ["one"])
        return [0.5] * len(completions)

    with pytest.raises(RewardFunctionError, match=r"log_extra\('text'\) got 1 values for 2 completions"):
        make_scorer(reward).submit([leaf(0, 0), leaf(0, 1)])
