"""Which completions are right, and the words for a run whose rewards or delimiters teach nothing; no model needed."""

import re
from functools import partial

import numpy as np
import pytest
from trl.rewards import accuracy_reward

from trl_ibtpo.training.step_check import describe_escapes, describe_missing_steps
from trl_ibtpo.training.success import Success, SuccessWatch, describe_unknown, parse_rule

NAMES = ["shaped_reward", "format_reward"]
REWARDS = np.array([[0.7, 1.0], [0.5, 0.0], [np.nan, 1.0], [-2.0, np.nan]], dtype=np.float32)


@pytest.mark.parametrize(
    "given, rule",
    [
        (None, None),
        ("shaped_reward", "shaped_reward"),
        (accuracy_reward, "accuracy_reward"),
        (partial(accuracy_reward, log_extra=None), "accuracy_reward"),
        (("shaped_reward", ">", 0.5), ("shaped_reward", ">", 0.5)),
        (["shaped_reward", "<=", "0.5"], ("shaped_reward", "<=", 0.5)),
        ("shaped_reward >= 0.5", ("shaped_reward", ">=", 0.5)),
        ("shaped_reward<-1", ("shaped_reward", "<", -1.0)),
    ],
)
def test_forms_of_success_reward(given, rule):
    assert parse_rule(given) == rule


@pytest.mark.parametrize(
    "given, message",
    [
        (0.5, r"`success_reward` is 0.5; it must be the name of a reward function, 'accuracy_reward', or a threshold"),
        (("shaped_reward", "=", 1), r"is \('shaped_reward', '=', 1\); it must be .* \('shaped_reward', '>', 0.5\)"),
        (("shaped_reward", ">", "high"), r"is \('shaped_reward', '>', 'high'\); it must be"),
        (("shaped_reward", 0.5), r"is \('shaped_reward', 0.5\); it must be"),
        (lambda rewards: True, r"a function without a name, .* give the function to the trainer as `success_func`"),
    ],
)
def test_wrong_forms(given, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(given)


@pytest.mark.parametrize(
    "arguments, success, words",
    [
        ((), [0.7, 0.5, np.nan, -2.0], "'shaped_reward'"),
        (("format_reward",), [1, 0, 1, np.nan], "'format_reward'"),
        ((("shaped_reward", ">", 0.5),), [1, 0, np.nan, 0], "'shaped_reward' > 0.5"),
        ((("shaped_reward", ">=", 0.5),), [1, 1, np.nan, 0], "'shaped_reward' >= 0.5"),
        ((None, (-2.0, 0.5)), [1, 1, np.nan, 0], "'shaped_reward' between -2.0 and 0.5 (`success_range`)"),
        ((None, None, lambda rewards: rewards["format_reward"]), [1, 0, 1, np.nan], "`success_func`"),
    ],
)
def test_success_by_hand(arguments, success, words):
    found = Success(NAMES, *arguments)
    np.testing.assert_allclose(found(REWARDS), success, rtol=1e-6)
    assert str(found) == words


def test_a_function_of_all_rewards():
    def right(rewards):
        return (
            rewards["shaped_reward"] is not None and rewards["shaped_reward"] > 0.4 and rewards["format_reward"] == 1
        )

    found = Success(NAMES, func=right)
    assert found(REWARDS).tolist() == [1, 0, 0, 0]
    assert str(found) == "`success_func` 'right'"


def test_a_function_is_not_asked_about_what_has_no_reward():
    found = Success(["one", "two"], func=lambda rewards: rewards["one"] > 0.5)
    assert found([[1, np.nan], [np.nan, np.nan]]).tolist() == pytest.approx([1, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    "func, message",
    [
        (
            lambda rewards: rewards["accuracy"],
            r"`success_func` raised KeyError: 'accuracy' for the rewards {'shaped_r",
        ),
        (lambda rewards: "yes", r"`success_func` returned 'yes' for the rewards .* True or False, or None where"),
    ],
)
def test_a_function_that_does_not_work(func, message):
    with pytest.raises(ValueError, match=message):
        Success(NAMES, func=func)(REWARDS)


def test_two_functions_of_one_name():
    with pytest.raises(ValueError, match=r"is 'judge', which is the name of several reward functions. Available: "):
        Success(["judge", "judge"], "judge")


# ----- success that tells nothing apart ------------------------------------------------------------------------------


def batches(*trees: list[float]) -> np.ndarray:
    """Rewards of trees of three completions; a second function gives 0 to all."""
    return np.array([[value, 0.0] for tree in trees for value in tree])


def test_constant_success_is_noticed_once():
    watch, success = SuccessWatch(), Success(["format_reward", "length_reward"])
    said = [watch.add(success, batches([1, 1, 1], [1, 1, 1]), [3, 3]) for _ in range(8)]
    assert [message is not None for message in said] == [False] * 3 + [True] + [False] * 4
    assert "within any of the first 8 trees" in said[3] and "It comes from 'format_reward'" in said[3]
    assert "was 1 for 24 of 24 completions" in said[3] and "weight 0 in `reward_weights`" in said[3]
    assert "'length_reward' 0 to 0" in said[3]


def test_trees_that_all_agree_within_are_noticed_later():
    watch, success = SuccessWatch(), Success(["accuracy", "other"])
    said = [watch.add(success, batches([1, 1, np.nan], [0, 0, 0]), [3, 3]) for _ in range(16)]
    assert [message is not None for message in said] == [False] * 15 + [True]
    assert "was 0 for 48, 1 for 32 of 80 completions" in said[-1]


def test_one_difference_ends_the_watch():
    watch, success = SuccessWatch(), Success(["accuracy", "other"])
    assert watch.add(success, batches([0, 0, 0], [0, 1, 0]), [3, 3]) is None
    assert all(watch.add(success, batches([0, 0, 0]), [3]) is None for _ in range(50))


def test_trees_without_a_known_success_are_noticed():
    """One function scores one kind of row and returns None for the others, as TRL allows."""
    success = Success(["math", "code"])
    math, code = [[1.0, np.nan], [0.0, np.nan]], [[np.nan, 1.0], [np.nan, 0.0]]
    assert describe_unknown(success, np.array(math + [[np.nan, np.nan]] * 2), [2, 2]) is None  # the second is unscored
    said = describe_unknown(success, np.array(math + code), [2, 2])
    assert "No completion of 1 of 2 trees has a known success, though 'code' scored them" in said
    (func,) = re.findall(r"`success_func=(.*)`", said)
    success = Success(["math", "code"], func=eval(func))
    assert success(np.array(math + code)).tolist() == [1, 0, 1, 0]
    assert describe_unknown(success, np.array(math + code), [2, 2]) is None


@pytest.mark.parametrize("returned", [0.7, 0.9, 0.3, 0.1, 1 / 3])
def test_thresholds_see_what_functions_returned(returned):
    """TRL keeps rewards in float32, in which 0.7 is less than 0.7 and 0.3 more than 0.3."""
    rewards = np.array([[returned]], dtype=np.float32)
    limit = float(f"{returned:.7g}") if returned == 1 / 3 else returned
    for comparison, right in ((">=", 1.0), ("<=", 1.0), (">", 0.0), ("<", 0.0)):
        assert returned == 1 / 3 or Success(["shaped"], ("shaped", comparison, limit))(rewards) == right
    assert Success(["shaped"], func=lambda given: given["shaped"])(rewards) == pytest.approx(returned, abs=1e-7)
    assert Success(["shaped"], bounds=(-0.1, 0.9))(np.array([[0.9]], dtype=np.float32)) == 1.0


# ----- delimiters ----------------------------------------------------------------------------------------------------


def test_what_is_said_where_no_step_ends():
    texts = ["First 3.\nThen 4. So 7."] * 23 + ["Seven"]
    message = describe_missing_steps(texts, 1, ["\n\n"])
    assert "`step_delimiter` ('\\n\\n') stands between two steps in 1 of 24 completions" in message
    assert "a single line feed ('\\n') stands in 96%" in message and "a blank line" not in message
    assert "The longest: 'First 3.\\nThen 4. So 7.'." in message
    assert describe_missing_steps(texts, 2, ["\n\n"]) is None
    assert "None of the usual delimiters" in describe_missing_steps(["a"], 0, ["\n\n"])


def test_a_backslash_in_a_delimiter():
    assert "`step_delimiter` is '\\\\n\\\\n': a backslash and the letter n" in describe_escapes(["\\n\\n"])
    assert describe_escapes(["\n\n", "</think>"]) is None
