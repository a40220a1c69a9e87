"""A tree as text for a terminal and as plain data."""

from collections.abc import Callable
from typing import Any

from rich.text import Text
from rich.tree import Tree

from ..growth import GrownTree
from ..scores import TreeScores
from .drawing import LEAF_MARKERS, leaf_kind
from .lines import one_line

STYLES = {"right": "green", "wrong": "red", "unscored": "dim"}


def render_tree(grown: GrownTree, decode: Callable[[list[int]], str], title: str) -> Tree:
    """A tree to print with rich: a line per step with its density and IB-Score, indented where trajectories part.

    `decode` may give any text: it is shown on one line and never read as markup or as terminal codes.
    """
    tree, scores = grown.tree, grown.scores
    kinds = {leaf: leaf_kind(success) for leaf, success in zip(tree.leaves, tree.success, strict=True)}
    counts = ", ".join(f"{list(kinds.values()).count(kind)} {kind}" for kind in LEAF_MARKERS)
    heading = f"{one_line(title)}\n{len(tree.leaves)} trajectories: {counts}; {tree.generated_tokens} tokens"
    view = Tree(Text(heading, style="bold"))
    pending = [(child, view) for child in reversed(tree.steps[0].children)]
    while pending:  # no recursion: a completion may have thousands of steps
        step, above = pending.pop()
        label = Text()
        while True:  # steps without a branch between them stay on one level
            label.append(_figures(scores, step), style="cyan")
            label.append(one_line(decode(tree.steps[step].token_ids)))
            children = tree.steps[step].children
            if len(children) != 1:
                break
            label.append("\n")
            step = children[0]
        if not children:
            label.append(f"  {kinds[step]}", style=STYLES[kinds[step]])
        below = above.add(label)
        pending += [(child, below) for child in reversed(children)]
    return view


def _figures(scores: TreeScores, step: int) -> str:
    """What is known of a step: a last one has no IB-Score."""
    figures = {"p": scores.density[step], "score": scores.ib_score[step]}
    words = [f"{name}={value:.2f}" for name, value in figures.items() if value == value]
    return f"[{' '.join(words)}] " if words else ""


def describe_tree(grown: GrownTree, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Steps in the order of their indices (0 is the question) and leaves in the order of their rollouts."""
    tree = grown.tree
    names = ("density", "confidence", "ib_score", "covariance")
    figures = {name: getattr(grown.scores, name).tolist() for name in names}
    steps = [
        {
            "parent": step.parent,
            "text": decode(step.token_ids),
            "token_ids": step.token_ids,
            "logprobs": step.logprobs,
            **{name: values[index] for name, values in figures.items()},
        }
        for index, step in enumerate(tree.steps)
    ]
    leaves = [
        {"step": step, "branched_after": after, "success": success}
        for step, after, success in zip(tree.leaves, tree.branch_steps, tree.success, strict=True)
    ]
    return {"steps": steps, "leaves": leaves, "generated_tokens": tree.generated_tokens}
