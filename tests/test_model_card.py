"""The section of the model card about trees: complete, and safe whatever the names and texts in it."""

import html
import math

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_scores import graft, rewarded
from trl import GRPOConfig

from trl_ibtpo import IBTPOConfig, IBTPOTrainer
from trl_ibtpo.grown_tree import GrownTree, GrowthSettings
from trl_ibtpo.scores import score_tree
from trl_ibtpo.training.model_card import as_text, complete_card, tree_to_show
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.viewing.drawing import draw_learning_curve

BARE_CARD = """\
---
library_name: transformers
tags: [trl, ibtpo]
---

This model is a fine-tuned version of [None](https://huggingface.co/None).

### Framework versions

- TRL
"""


def grown(tree: RolloutTree, success: list[float]) -> GrownTree:
    return GrownTree(rewarded(tree, success), score_tree(tree, beta=5.0), GrowthSettings())


def shown_tree() -> tuple[GrownTree, int]:
    tree = RolloutTree([1, 2])
    graft(tree, 0, [3, 4, 5], [-0.1] * 3, [2, 3])
    graft(tree, 1, [5, 5], [-0.1] * 2, [2], round=1)
    return grown(tree, [1.0, 0.0]), 7


def make_card(folder, shown=None, logs=(), success_reward="is_right", **settings) -> str:
    (folder / "README.md").write_text(BARE_CARD)
    args = IBTPOConfig(str(folder), use_cpu=True, bf16=False, **settings)
    names = {"success_reward": success_reward, "branching": args.branching, "advantage": args.advantage}
    complete_card(folder, args, logs, shown, **names, adapter=False)
    return (folder / "README.md").read_text()


def test_table_has_every_field_of_the_method(tmp_path):
    card = make_card(tmp_path)
    for name in set(IBTPOConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__):
        assert f"| `{name}` |" in card
    assert "| `tree_initial_rollouts` | B0 | 4 |" in card and "| `ib_coef` | lambda | 0.1 |" in card


def test_pictures_only_of_what_there_is(tmp_path):
    assert "![" not in make_card(tmp_path, logs=[{"step": 1, "loss": 0.5}])
    assert not (tmp_path / "figures").exists()
    card = make_card(tmp_path, shown_tree(), logs=[{"step": 1, "tree/effective_rate": 0.5}])
    assert card.count("![") == 2 and "training step 7" in card
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"training_curves.png", "tree.png"}


def test_a_window_without_a_value_has_no_point(tmp_path):
    """TRL logs None for it."""
    logs = [{"step": step, "tree/average_success": value} for step, value in ((1, None), (2, 0.5), (3, math.nan))]
    make_card(tmp_path, logs=logs)
    assert (tmp_path / "figures" / "training_curves.png").exists()
    figure = draw_learning_curve(logs)
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[2.0, 0.5]]
    other = tmp_path / "other"
    other.mkdir()
    assert "![" not in make_card(other, logs=logs[:1])


def test_a_curve_of_any_reward_is_in_the_picture():
    low, high = draw_learning_curve([{"step": 1, "reward": -3.0}, {"step": 2, "reward": 2.0}]).axes[0].get_ylim()
    assert low < -3 and 2 < high < 3
    rates = draw_learning_curve([{"step": 1, "reward": 0.25}]).axes[0].get_ylim()
    assert rates == pytest.approx((-0.03, 1.03))  # as ever


def test_a_second_card_replaces_the_first(tmp_path):
    first = make_card(tmp_path, shown_tree())
    assert make_card(tmp_path, shown_tree()) == first
    assert first.count("### Rollout trees") == 1


def test_no_tree_is_claimed_where_none_grew(tmp_path):
    assert "grew one tree of 12" in make_card(tmp_path)
    assert "12 independent completions: no tree" in make_card(tmp_path, branching="independent")
    assert "4 independent completions: no tree" in make_card(tmp_path, tree_levels=1)


def test_the_card_claims_no_more_than_was_done(tmp_path):
    assert "grew one tree of 12 trajectories, and every step got its own advantage." in make_card(tmp_path)
    assert "grew one tree of 12 trajectories on average, and every" in make_card(tmp_path, adaptive_budget=1)
    for advantage in ("grpo", "treepo", "tree_grpo"):  # one value for a trajectory
        assert "grew one tree of 12 trajectories." in make_card(tmp_path, advantage=advantage)


def test_weights_from_a_folder_have_no_link(tmp_path):
    card = make_card(tmp_path)
    assert "fine-tuned version of local weights" in card and "huggingface.co/None" not in card


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a | b |\n\n# heading",
        "`code` *bold* _emphasis_ ![x](http://example.com/x.png)",
        "www.example.com http://example.com {{ 7 * 7 }} {% raw %} &amp; \\",
        "---\ntags: [evil]\n---",
        "数学 \U0001f600 it's \x1b[31m",
    ],
)
def test_hostile_text_is_only_text(tmp_path, text):
    """A cell of the table shows the text as Python writes it, and nothing of it becomes markup."""
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(
        f"| field | value |\n|---|---|\n| x | {as_text(text)} |\n"
    )
    cell = rendered.split("<td>")[2].split("</td>")[0]
    assert "<" not in cell and html.unescape(cell) == repr(text)[1:-1]
    card = ModelCard(make_card(tmp_path, success_reward=text, step_delimiter=text))
    assert card.data.tags == ["ibtpo", "trl"]
    assert "49" not in card.text and f"| `success_reward` |  | {as_text(text)} |" in card.text


def test_plain_names_stay_readable():
    assert [as_text(value) for value in ("geometric_mean", "ib", 0.1, True, None, 12)] == [
        "geometric_mean", "ib", "0.1", "True", "None", "12",
    ]  # fmt: skip


def flat_tree(success: list[float]) -> GrownTree:
    tree = RolloutTree([1])
    for _ in success:
        graft(tree, 0, [2], [-0.1], [1])
    return grown(tree, success)


def test_the_tree_with_most_to_see_is_shown():
    trees = [flat_tree(success) for success in ([math.nan] * 2, [1.0, 1.0], [1.0, 0.0], [0.0, 1.0])]
    shown = tree_to_show(trees)
    assert shown is trees[2]
    assert np.nanmean(shown.scores.density) == 0.5


def test_trainer_keeps_one_tree(config, model_path):
    trainer = IBTPOTrainer(model_path, tiny.even_length, config(max_steps=2), tiny.questions())
    assert trainer._shown_tree is None
    trainer.train()
    shown, step = trainer._shown_tree
    assert isinstance(shown, GrownTree) and step == 2
    assert len(shown.tree.leaves) == len(shown.tree.success) == 12


def no_opinion_at_first(completions, trainer_state, **kwargs) -> list[float | None]:
    return [None if trainer_state.global_step == 0 else 1.0] * len(completions)


def test_a_window_without_a_known_reward_is_saved(config, model_path, tmp_path):
    args = config(max_steps=2, save_strategy="steps", save_steps=1)
    trainer = IBTPOTrainer(model_path, no_opinion_at_first, args, tiny.questions())
    trainer.train()
    assert [entry["tree/average_success"] for entry in trainer.state.log_history[:2]] == [None, 1.0]
    for step in (1, 2):
        assert (tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors").exists()
    assert (tmp_path / "out" / "figures" / "training_curves.png").exists()


def test_a_card_that_cannot_be_written_stops_no_checkpoint(config, model_path, tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no font")

    monkeypatch.setattr("trl_ibtpo.training.model_card.draw_tree", fails)
    args = config(max_steps=1, save_strategy="steps", save_steps=1)
    IBTPOTrainer(model_path, tiny.even_length, args, tiny.questions()).train()
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()
    assert (tmp_path / "out" / "README.md").exists()  # TRL's
    (message,) = {record.getMessage() for record in caplog.records if "model card" in record.getMessage()}
    assert "has no section about trees: writing it raised RuntimeError: no font" in message
