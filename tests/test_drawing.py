"""Pictures are written, say what the tree says, and survive any text."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from test_scores import graft, rewarded

from trl_ibtpo.grown_tree import GrownTree, GrowthSettings
from trl_ibtpo.scores import score_tree
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.viewing.drawing import draw_learning_curve, draw_tree

PNG = b"\x89PNG"


def small_tree() -> RolloutTree:
    """Two rollouts from the question, then one round that branches the first step of the first rollout."""
    tree = RolloutTree([1, 2])
    graft(tree, 0, [3, 4, 5, 6], [-0.1] * 4, [2, 4])  # steps 1, 2
    graft(tree, 0, [7, 8, 9], [-0.1] * 3, [3])  # step 3
    graft(tree, 1, [5, 5, 5], [-0.1] * 3, [3], round=1)  # step 4
    return tree


def draw(success, path=None, tree=None, **kwargs):
    tree = rewarded(small_tree() if tree is None else tree, success)
    return draw_tree(GrownTree(tree, score_tree(tree, beta=5.0), GrowthSettings()), path, **kwargs)


def group(figure, gid):
    """The one scatter of that name."""
    (found,) = [artist for artist in figure.axes[0].collections if artist.get_gid() == gid]
    return found


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_pictures_are_written(tmp_path):
    draw([1.0, 0.0, 1.0], tmp_path / "new" / "tree.png", decode=str)
    logs = [{"step": step, "reward": step / 10, "tree/effective_rate": 0.5} for step in range(10)]
    draw_learning_curve(logs, tmp_path / "curve.png", held_out=(0.2, 0.8))
    assert (tmp_path / "new" / "tree.png").read_bytes().startswith(PNG)
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_leaves_are_marked_by_success():
    figure = draw([1.0, 0.0, math.nan])
    # Rows: leaf 0 on the first, its branch (leaf 2) below it, leaf 1 last.
    rows = {kind: group(figure, kind).get_offsets()[:, 1].tolist() for kind in ("right", "wrong", "unscored")}
    assert rows == {"right": [0], "wrong": [2], "unscored": [1]}


def test_steps_are_placed_by_tokens_and_coloured_by_density():
    figure = draw([1.0, 0.0, 0.0])
    steps = group(figure, "steps")
    assert steps.get_offsets()[:, 0].tolist() == [0, 2, 4, 3, 5]
    # Question: 1 of 3 leaves is right; step 1: 1 of 2.
    np.testing.assert_allclose(steps.get_array(), [1 / 3, 1 / 2, 1, 0, 0])
    assert (steps.norm.vmin, steps.norm.vmax) == (0, 1)


def test_branch_points_carry_their_rounds():
    for rounds, expected in (((2, 3), ["1, 2", "3"]), ((1, 2), ["1", "2"])):  # the latter with two branches a round
        tree = small_tree()
        graft(tree, 1, [6], [-0.1], [1], round=rounds[0])
        graft(tree, 4, [6], [-0.1], [1], round=rounds[1])
        assert texts(draw([1.0, 0.0, 1.0, 0.0, 1.0], tree=tree)) == expected


@pytest.mark.parametrize(
    "text", ["$\\frac{", "\x00\x1b[31m\r\n", "\U0001f600 数", "$$ \\undefined_{^", "", "x" * 10_000]
)
def test_hostile_text_is_only_text(tmp_path, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph warns
        figure = draw([1.0, 0.0, 1.0], tmp_path / "tree.png", title=text[:50], decode=lambda ids: text)
    assert not any(char < " " for written in texts(figure) for char in written)
    assert max(len(written) for written in texts(figure)) < 200
    assert "ab" in texts(draw([1.0, 0.0, 1.0], decode=lambda ids: "ab"))


def test_long_chains_do_not_recurse(tmp_path):
    tree = RolloutTree([1])
    graft(tree, 0, [1] * 3000, [-0.1] * 3000, list(range(1, 3001)))
    rows = group(draw([1.0], tree=tree), "steps").get_offsets()[:, 1]
    assert set(rows.tolist()) == {0}


def test_curve_leaves_out_what_was_not_logged():
    logs = [{"step": 1, "loss": 0.1}, {"step": 2, "reward": 0.5}, {"step": 3, "reward": math.nan}]
    figure = draw_learning_curve(logs, held_out=(0.25, 0.75))
    names = [line.get_label() for line in figure.axes[0].lines]
    assert names == ["reward", "held-out accuracy before: 25%", "held-out accuracy after: 75%"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [2]


def test_import_does_not_load_matplotlib():
    code = "import sys, trl_ibtpo.viewing.drawing; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
