"""What benchmarks share, and the measurement that needs no model."""

import ast
import json
from argparse import Namespace

import pytest
from test_style import ROOT

from benchmarks import common, growth

BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "def main" in path.read_text())


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_report_says_that_it_means_nothing(quick, tmp_path, capsys):
    args = Namespace(quick=quick, json=tmp_path / "folder" / "rows.json")
    common.report("Something", [{"mode": "tree", "ratio": 1 / 3}], args)
    title = capsys.readouterr().out.splitlines()[0]
    assert "Something" in title
    assert ("quick: these figures mean nothing" in title) == quick
    assert json.loads(args.json.read_text()) == [{"mode": "tree", "ratio": 1 / 3}]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_every_benchmark_reports_its_arguments(path):
    """So that none forgets the caution of a quick run."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    reports = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "common.report"]
    assert reports and all(report.endswith(", args)") for report in reports)


@pytest.mark.parametrize("lookahead, splitter", [(0, "fixed"), (3, "fixed"), (3, "text")])
def test_growth_is_measured_on_trees_that_are_always_the_same(lookahead, splitter):
    point = growth.BASE | {"questions": 2, "length": 200, "lookahead": lookahead, "splitter": splitter}
    once, again = growth.measure(point), growth.in_process(point, ROOT)
    assert once["digest"] == again["digest"]
    assert once["tokens"] == again["tokens"] > 2 * 4 * 100
    assert min(once["seconds"], again["seconds"]) > 0
    another = growth.measure(point | {"length": 300})
    assert another["digest"] != once["digest"]


def test_a_scripted_engine_gives_one_token_a_poll():
    from trl_ibtpo.engines.base import RolloutRequest

    engine = growth.ScriptedEngine(length=100)
    engine.submit([RolloutRequest((0, 0), [1] * growth.PROMPT_TOKENS, 30, seed=1)])
    assert [engine.poll() for _ in range(29)] == [[]] * 29
    assert engine.generated((0, 0)) == 29
    begun = engine.partial((0, 0), 10, 20)
    (rollout,) = engine.poll()
    assert (rollout.token_ids[10:20], rollout.logprobs[10:20]) == begun
    assert len(rollout.token_ids) == len(rollout.logprobs) == 30
    assert engine.generated((0, 0)) == 0
