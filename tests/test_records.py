"""Trees as plain data: what a record holds, what comes back, and what readers say of lines that are no records."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_growth import ANY, SETTINGS, grow
from test_scores import graft, rewarded

from trl_ibtpo.advantages import GradedTree, token_advantages
from trl_ibtpo.grown_tree import Choice, GrownTree, GrowthSettings
from trl_ibtpo.scores import score_tree
from trl_ibtpo.training.completions_table import mark_steps
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.viewing.drawing import draw_tree
from trl_ibtpo.viewing.library import Library
from trl_ibtpo.viewing.reading import RecordError, parse_record, summary
from trl_ibtpo.viewing.records import FORMAT, dump_record, record_group, record_tree
from trl_ibtpo.viewing.text import render_tree

#   question ── 1 ── 2        leaf 0, right
#            │    └─ 4        leaf 2, wrong, of round 1
#            └─ 3             leaf 1, wrong
WORDS = {3: "a", 4: " b", 5: "c", 6: "d\n\n", 7: "e", 8: "f", 9: "."}


def decode(token_ids: list[int]) -> str:
    return "".join(WORDS[token_id] for token_id in token_ids)


def small() -> tuple[GrownTree, np.ndarray]:
    tree = RolloutTree([1, 2])
    graft(tree, 0, [3, 4, 5, 6], [-0.1, -0.1, -0.3, -0.3], [2, 4])
    graft(tree, 0, [7, 8, 9], [-0.5] * 3, [3])
    graft(tree, 1, [5, 5, 5], [-0.2] * 3, [3], round=1)
    rewarded(tree, [1.0, 0.0, 0.0])
    choice = Choice(1, [1], [1, 2], [-0.9, -1.5], [], 2)
    growth = GrowthSettings(max_completion_length=4)
    return GrownTree(tree, score_tree(tree, beta=5.0), growth, [choice]), np.array([1.0, -0.5, -0.5])


def small_record(**kwargs) -> dict:
    grown, advantage_L = small()
    found = token_advantages(GradedTree(grown.tree, grown.scores, advantage_L))
    rewards = {"right": [1.0, 0.0, 0.0], "form": [0.5, math.nan, 0.25]}
    given = {"question": "1 + 1?", "step": 12, "rewards": rewards, "advantages": found, "end_ids": [9]}
    return record_tree(grown, decode, **given, **kwargs)


def test_what_a_record_holds():
    record = small_record(method={"advantage": "ibtpo"})
    assert (record["format"], record["step"]) == (FORMAT, 12)
    assert record["question"] == {"text": "1 + 1?", "messages": None}
    assert record["method"] == {"branching": "ib", "advantage": "ibtpo"} and record["settings"]["ib_beta"] == 5.0
    root, first, second, *_ = record["nodes"]
    assert root["role"] == "question" and root["density"] == pytest.approx(1 / 3, abs=1e-5)
    assert (first["parent"], first["text"], first["tokens"], first["end"]) == (0, "a b", 2, 2)
    assert (second["parent"], second["text"], second["end"]) == (1, "cd\n\n", 4)
    assert first["density"] == 0.5 and first["mean_logprob"] == -0.1
    assert first["confidence"] == pytest.approx(math.exp(-0.1), abs=1e-5)
    # By hand: children with rho 2 and 0, confidences exp(-0.3) and exp(-0.2).
    score = 6 / 2 * ((2 - 1.2) * math.exp(-0.3) + (0 - 1.2) * math.exp(-0.2))
    assert first["ib_score"] == pytest.approx(score, abs=1e-4)
    assert first["advantage_global"] == 0.25 and second["advantage_global"] == 1.0  # means of 1 and -1/2, and of 1
    assert first["advantage_local"] == pytest.approx(0.1 * (1.5 - 1.2) * math.exp(-0.1), abs=1e-5)
    assert first["logprobs"] == [-0.1, -0.1] and first["token_ends"] == [1, 3]
    assert [node["round"] for node in record["nodes"]] == [0, 0, 0, 0, 1]
    one, _, three = record["leaves"]
    assert one["rewards"] == {"right": 1.0, "form": 0.5} and record["leaves"][1]["rewards"]["form"] is None
    assert (three["node"], three["branched_after"], three["round"], three["success"]) == (4, 1, 1, 0.0)
    # Two are as long as the budget of 4 tokens or more and do not end with an end token.
    assert [leaf["finish_reason"] for leaf in record["leaves"]] == ["length", "stop", "length"]
    assert record["rounds"][0]["candidates"] == [1, 2] and record["rounds"][0]["priorities"] == [-0.9, -1.5]
    assert (record["generated_tokens"], record["trajectory_tokens"]) == (10, 12)


def test_a_step_that_ends_with_a_tool_result_shows_what_its_sampled_tokens_get():
    tree = RolloutTree([1, 2])
    graft(tree, 0, [3, 4, 8, 8, 5], [-0.1, -0.1, None, None, -0.3], [4, 5])
    graft(tree, 0, [7, 8, 9], [-0.5] * 3, [3])
    rewarded(tree, [1.0, 0.0])
    grown = GrownTree(tree, score_tree(tree, beta=5.0), GrowthSettings(), [])
    found = token_advantages(GradedTree(tree, grown.scores, np.array([0.75, -0.75])))
    record = record_tree(grown, decode, question="?", rewards={"right": [1.0, 0.0]}, advantages=found)
    assert (record["nodes"][1]["advantage_global"], record["nodes"][1]["tokens"]) == (0.75, 4)
    assert record["leaves"][0]["advantage"] == pytest.approx(found.values[0][[0, 1, 4]].mean(), abs=1e-8)
    assert mark_steps(grown, 0, found.values[0], decode).startswith(f"[{found.values[0][0]:+.2f}]")
    assert found.values[0][0] > 0.5 and found.values[0][3] == 0


@settings(max_examples=15, **ANY)
@given(SETTINGS, st.integers(0, 1000), st.text(max_size=8), st.text(alphabet=st.characters(), max_size=8))
def test_round_trip(growth, seed, question, word):
    """Whatever the tree, its rewards and its texts: what was written comes back, and nothing is missing."""
    growers, _ = grow(growth, seed=seed)
    for grower in growers:
        grown = grower.grown()
        advantage_L = np.array(grown.tree.success) - 0.5
        found = token_advantages(GradedTree(grown.tree, grown.scores, advantage_L))
        rewards = {"right": grown.tree.rewards}
        record = record_tree(grown, lambda ids: word * len(ids), question=question, rewards=rewards, advantages=found)
        line = dump_record(record)
        assert "\n" not in line and line.isascii()
        read = parse_record(line)
        assert read["notes"] == [] and set(read["missing"]) <= {"leaves.finish_reason"}
        assert {key: read[key] for key in record if key not in ("nodes", "leaves")} == {
            key: json.loads(line)[key] for key in record if key not in ("nodes", "leaves")
        }
        for kind in ("nodes", "leaves"):
            for before, after in zip(record[kind], read[kind], strict=True):
                assert {name: after[name] for name in before} == before
        assert summary(read)["leaves"] == growth.leaves
        assert parse_record(dump_record(read)) == {**read, "missing": parse_record(dump_record(read))["missing"]}


@pytest.mark.parametrize("text", ["\ud800 lone", "</script>", "\u2028\u202e\x00\x1b[31m", "数学 😀", "x" * 10_000])
def test_any_text_comes_back(text):
    record = record_group([text], question=text, rewards={"right": [1.0]})
    read = parse_record(dump_record(record))
    assert read["nodes"][1]["text"] == read["question"]["text"] == text


def test_a_flat_group_is_a_tree_of_depth_one():
    completions = [
        [{"role": "assistant", "content": "I ask."}, {"role": "tool", "content": "7"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "7"}], "tool_calls": [{"name": "add"}]}],
    ]
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "3 + 4?"}]
    rewards = {"right": [1.0, 0.0], "form": [None, 2.0]}
    record = parse_record(dump_record(record_group(completions, question=prompt, rewards=rewards, advantages=[1, -1])))
    assert record["question"]["text"] == "3 + 4?" and len(record["question"]["messages"]) == 2
    assert [node["parent"] for node in record["nodes"]] == [-1, 0, 0]
    assert [part["role"] for part in record["nodes"][1]["parts"]] == ["assistant", "tool"]
    assert record["nodes"][2]["text"] == '7[{"name": "add"}]'
    assert [leaf["success"] for leaf in record["leaves"]] == [1.0, 0.0]
    assert record["leaves"][0]["rewards"] == {"right": 1.0, "form": None}
    assert record["nodes"][0]["density"] == 0.5 and record["leaves"][1]["advantage"] == -1
    assert "nodes.ib_score" in record["missing"] and "nodes.density" not in record["missing"]
    unscored = record_group(["a", "b", "c"], question="q", rewards={"right": [None, 1.0, 0.0]})
    assert [node["density"] for node in unscored["nodes"]] == [0.5, None, 1.0, 0.0]
    unknown = record_group(["a", "b"], question="q", rewards={"score": [3.0, -1.0]})  # says nothing of right or wrong
    assert [leaf["success"] for leaf in unknown["leaves"]] == [None, None]
    assert unknown["nodes"][0]["density"] is None


GOOD = dump_record(small_record())


@pytest.mark.parametrize(
    "line, message",
    [
        (GOOD[: len(GOOD) // 2], "not JSON; was it cut off"),
        ("\x00\x01", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "its `format` is 'None', not 'trl_ibtpo.tree/1'"),
        ('{"format": "other.tree/1"}', "its `format` is 'other.tree/1'"),
        ('{"format": "trl_ibtpo.tree/1"}', "no list of `nodes`"),
        ('{"format": "trl_ibtpo.tree/1", "nodes": [{}, {"parent": 1}]}', "the parent of node 1 is 1"),
        ('{"format": "trl_ibtpo.tree/1", "nodes": [{}]}', "no list of `leaves`"),
        ('{"format": "trl_ibtpo.tree/1", "nodes": [{}], "leaves": [{"node": 3}]}', "the node of leaf 0 is 3"),
    ],
)
def test_what_is_no_record_is_said_in_one_line_and_the_others_open(line, message, tmp_path):
    with pytest.raises(RecordError, match=r"^[^\n]+$") as error:
        parse_record(line)
    assert message in str(error.value)
    (tmp_path / "step-000001.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    library = Library([tmp_path])
    assert len(library.entries) == 2 and library.record(1)["step"] == 12
    (problem,) = library.problems
    assert problem.startswith("step-000001.jsonl, line 2, is left out: ") and message in problem


def test_a_record_of_others_is_read_as_far_as_it_goes():
    line = json.dumps(
        {
            "format": "trl_ibtpo.tree/7",
            "question": "plain text",
            "colour": "blue",
            "nodes": [
                {"parent": None},
                {"parent": 0, "text": 5, "tokens": "many", "density": float("inf"), "mood": 1},
            ],
            "leaves": [{"node": 1, "success": True, "rewards": {"a": "high"}}],
        }
    )
    record = parse_record(line)
    assert record["notes"] == ["This tree was written as 'trl_ibtpo.tree/7' and is read as 'trl_ibtpo.tree/1'."]
    assert record["question"]["text"] == "plain text"
    assert record["colour"] == "blue" and record["nodes"][1]["mood"] == 1
    node = record["nodes"][1]
    assert (node["text"], node["tokens"], node["density"], node["ib_score"]) == ("", 0, None, None)
    assert record["leaves"][0] == {
        **{"node": 1, "success": None, "rewards": {"a": None}, "round": 0},
        **{"advantage": None, "branched_after": None, "finish_reason": None},
    }
    assert {"settings", "rounds", "nodes.ib_score", "leaves.advantage"} <= set(record["missing"])
    assert "nodes.density" not in record["missing"]
    draw_tree(record)
    render_tree(record)
    summary(record)
    record["mood"] = [math.nan, {"a": math.inf}]
    assert json.loads(dump_record(record))["mood"] == [None, {"a": None}]


def test_figures_too_large_for_a_spread_are_left_out():
    record = parse_record(GOOD)
    record["nodes"][1]["ib_score"], record["nodes"][2]["ib_score"] = 1e200, -1e200
    found = summary(record)
    assert found["score_spread"] is None and found["advantage_spread"] is not None


def test_a_trajectory_that_ends_where_another_goes_on_has_its_outcome_in_the_text():
    record = record_group(["a", " b"], question="q", rewards={"right": [1.0, 0.0]})
    record["nodes"][2]["parent"] = 1
    console = Console(width=80, file=io.StringIO())
    console.print(render_tree(record))
    lines = console.file.getvalue().splitlines()
    assert lines[-2].endswith("a  right") and lines[-1].endswith("b  wrong")


def test_a_library_lists_without_holding(tmp_path):
    folder = tmp_path / "run" / "trees"
    folder.mkdir(parents=True)
    (folder / "step-000002.jsonl").write_text(GOOD + "\n")
    (folder / ".step-000003.jsonl.part").write_text("half")
    logs = [{"step": 1, "reward": 0.5, "tree/effective_rate": 0.25}, {"step": 1, "reward": 0.75}, {"step": 2}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, logs)) + '\n{"step": 3, "rew')
    library = Library([tmp_path / "run"])
    assert library.names == ["run"]
    assert [(entry["step"], entry["success"], entry["effective"]) for entry in library.entries] == [
        (12, pytest.approx(1 / 3), True)
    ]
    curves = {curve["name"]: curve["points"] for curve in library.curves(0)}
    assert curves == {"Reward": [[1, 0.75]], "Effective rate": [[1, 0.25]]}
    # What comes is appended; what is written anew makes a new list.
    (folder / "step-000004.jsonl").write_text(GOOD + "\n")
    library.refresh()
    assert (len(library.entries), library.version) == (2, 0)
    (folder / "step-000002.jsonl").write_text(GOOD.replace('"step":12', '"step":2') + "\n" + GOOD + "\n")
    library.refresh()
    assert ([entry["step"] for entry in library.entries], library.version) == ([2, 12, 12], 1)


def test_logs_of_a_plain_run_are_found_in_its_checkpoints(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    history = [{"step": 5, "reward": 1.5, "frac_reward_zero_std": 0.25, "completions/mean_length": 40}]
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "step-000001.jsonl").write_text(GOOD)
    curves = {curve["name"]: (curve["metric"], curve["points"]) for curve in Library([tmp_path]).curves(0)}
    assert curves["Effective rate"] == ("1 - frac_reward_zero_std", [[5, 0.75]])
    assert curves["Tokens a question"] == ("completions/mean_length", [[5, 40]])
