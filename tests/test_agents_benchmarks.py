"""The task of the benchmarks of agents, and the table of their learning comparison."""

import random

import pytest

from benchmarks import agents_learning, agents_task


def test_the_tool_and_the_reward_agree_with_the_task():
    (chain,) = agents_task.chains(1, seed=3)
    value = chain[0]
    for (sign, number), result in zip(chain[1:], agents_task.results(chain), strict=True):
        assert agents_task.calculate(f"{value}{sign}{number}") == str(result)
        value = result
    (row,) = agents_task.rows(1, seed=3)
    assert row["prompt"][0]["content"] == agents_task.question(chain) and row["answer"] == str(value)
    turns = [[{"content": "1+2=3\n\n"}, {"content": said}] for said in (f"={value}", f"={value + 1}", f"{value}=")]
    assert agents_task.right_answer(turns, [str(value)] * 3) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        agents_task.calculate("12")


def test_solutions_are_what_the_model_samples_and_the_tool_answers():
    """No text is lost at the borders of turns; habits decide how often the tool is asked."""
    ready, rng, asked, steps = agents_task.tokenizer(), random.Random(0), {}, {}
    for chain in agents_task.chains(300, seed=4):
        parts = agents_task.solution(chain, rng)
        text = "".join(part for part, _ in parts)
        ids = [each for part, _ in parts for each in ready.encode(part, add_special_tokens=False)]
        assert ready.decode(ids) == text and len(ids) <= agents_task.MAX_LENGTH
        written = [part for part, mine in parts if mine][:-1]
        for (sign, _), part in zip(chain[1:], written, strict=True):
            asked[sign] = asked.get(sign, 0) + ("tool_call" in part)
            steps[sign] = steps.get(sign, 0) + 1
    for sign, habit in agents_task.HABIT.items():
        assert asked[sign] / steps[sign] == pytest.approx(habit, abs=0.1)


def test_the_table_pairs_seeds_and_counts_what_was_started():
    rows = [
        {"event": "started", "method": method, "seed": seed}
        for seed in (0, 1, 2)
        for method in agents_learning.METHODS
    ]
    for seed, flat, tree in ((0, 0.2, 0.3), (1, 0.4, 0.5), (2, 0.9, None)):
        for method, value in (("grpo_8", flat), ("confidence_once", tree)):
            if value is not None:
                rows.append({"method": method, "seed": seed, "area": value, "final": value + 0.1})
    flat, tree, *_ = agents_learning.table(rows)
    assert (flat["started"], flat["done"], tree["started"], tree["done"]) == (3, 3, 3, 2)
    assert tree["to GRPO, paired"] == "+10.0 [+10.0, +10.0]" and flat["to GRPO, paired"] == ""
