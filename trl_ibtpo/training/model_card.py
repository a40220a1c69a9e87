"""What the model card says beyond TRL's: how the trees were shaped, how training went, and what one tree looks like.

TRL writes the card; `complete_card` reads it back, adds a section and saves it. The pictures lie beside it, so they
are pushed with it. Prompts and completions stay out of both: a dataset may be private where the model is not.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from trl import GRPOConfig

from ..advantages import BY_VALUE
from ..grown_tree import GrownTree
from ..viewing.drawing import draw_learning_curve, draw_tree

FIGURES = "figures"
RATES = ("tree/average_success", "tree/effective_rate")  # those of the training curves

SYMBOLS = {
    "tree_initial_rollouts": "B0",
    "tree_levels": "L",
    "tree_nodes_per_level": "K",
    "tree_branches_per_node": "B",
    "num_generations": "G",
    "ib_beta": "beta",
    "ib_coef": "lambda",
    "step_confidence": "pi(s)",
}
# Fields of GRPOConfig that belong to the method; those that IBTPOConfig adds are all listed.
SHARED_FIELDS = ("num_generations", "temperature", "top_p", "top_k", "max_completion_length", "beta", "loss_type")

TEMPLATE = """\
---
{{ card_data }}
---

{{ head }}
### Rollout trees

{% if branches -%}
Each question grew one tree of {{ leaves }} trajectories{{ average }}{{ kept }}{{ stepwise }}.
{%- else -%}
Each question had {{ leaves }} independent completions{{ average }}: no tree was grown.
{%- endif %}

| field | paper | value |
|---|---|---|
{% for name, symbol, value in rows -%}
| `{{ name }}` | {{ symbol }} | {{ value }} |
{% endfor %}
{%- if curve %}
Mean success of the trajectories and share of trees whose trajectories differ in success, over training:

![Training curves]({{ curve }})
{% endif %}
{%- if tree %}
A tree grown at training step {{ step }}, one row per trajectory; the colour is the mean success below a step:

![Rollout tree]({{ tree }})
{% endif %}
{{ tail }}
"""


def tree_to_show(grown: Sequence[GrownTree]) -> GrownTree:
    """Of the trees of a generation batch, the one with most to see: nearest to as many right as wrong answers."""

    def one_sidedness(each: GrownTree) -> float:
        known = [success for success in each.tree.success if not np.isnan(success)]
        return abs(np.mean(known) - 0.5) if known else 1.0

    return min(grown, key=one_sidedness)


def complete_card(
    folder: str | Path,
    args: GRPOConfig,
    log_history: Sequence[dict[str, Any]],
    shown: tuple[GrownTree, int] | None,
    *,
    success_reward: str,
    branching: str,
    advantage: str,
    adapter: bool,
) -> None:
    """Add the section about trees, and its pictures, to the card that TRL has written.

    Args:
        folder: where `README.md` is, the folder that is pushed.
        args: the IBTPOConfig.
        log_history: `trainer.state.log_history`; without any rate of `RATES` there is no picture of them.
        shown: the tree to draw and the training step it was grown for; none before the first generation.
        success_reward: name of the reward function that says whether an answer is right.
        branching, advantage: names of the strategy and of the advantage, which may be a user's own functions.
        adapter: whether the folder holds an adapter of `peft` rather than a model.
    """
    folder = Path(folder)
    card = ModelCard.load(folder / "README.md")
    card.data.tags = sorted(card.data.tags)  # TRL's order changes from run to run
    if adapter:
        card.data.library_name = "peft"
    # TRL names the base model by its place on the Hub; weights from a folder have none.
    text = card.text.replace("[None](https://huggingface.co/None)", "local weights")
    head, heading, tail = text.partition("### Framework versions")

    curve = tree = None
    if any(log.get(key) is not None for log in log_history for key in RATES):  # TRL logs None for no value
        curve = f"{FIGURES}/training_curves.png"
        draw_learning_curve(log_history, folder / curve, RATES, title="Training")
    if shown is not None:
        tree = f"{FIGURES}/tree.png"
        draw_tree(shown[0], folder / tree, title=f"Rollout tree at training step {shown[1]}")
    ModelCard.from_template(
        card.data,
        template_str=TEMPLATE,
        head=head.lstrip(),
        branches=args.branches,
        tail=heading + tail,
        leaves=args.growth_settings.leaves,
        average=" on average" if args.adaptive_budget is not None else "",
        # A user's own function may give one value for a trajectory.
        stepwise=", and every step got its own advantage" if advantage in BY_VALUE else "",
        kept="" if args.path_filter is None else f", of which {args.num_generations} were trained on",
        rows=_rows(args, success_reward=success_reward, branching=branching, advantage=advantage),
        curve=curve,
        tree=tree,
        step=shown[1] if shown is not None else None,
    ).save(folder / "README.md")


def _rows(args: GRPOConfig, **said: str) -> list[tuple[str, str, str]]:
    """Name, the paper's symbol and value of every field that belongs to the method."""
    inherited = {field.name for field in fields(GRPOConfig)}
    names = [field.name for field in fields(args) if field.name not in inherited]
    values = {name: getattr(args, name) for name in (*names, *SHARED_FIELDS)}
    values |= said
    return [(name, SYMBOLS.get(name, ""), as_text(value)) for name, value in values.items()]


def as_text(value: Any) -> str:
    """`value` for a Markdown table: every character of a text that could be markup is written by its number."""
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    text = repr(value)[1:-1] if isinstance(value, str) else repr(value)
    return re.sub(r"[^\w ]|\b_|_\b", lambda match: f"&#{ord(match[0])};", text)
