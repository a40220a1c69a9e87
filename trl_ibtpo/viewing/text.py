"""A tree as text for a terminal."""

from collections.abc import Callable

from rich.text import Text
from rich.tree import Tree

from ..grown_tree import GrownTree
from .drawing import LEAF_MARKERS, as_record, children_of, leaf_kind
from .lines import one_line
from .records import Record

STYLES = {"right": "green", "wrong": "red", "unscored": "dim"}


def render_tree(
    shown: GrownTree | Record, decode: Callable[[list[int]], str] | None = None, title: str | None = None
) -> Tree:
    """A tree to print with rich: a line per step with its density and IB-Score, indented where trajectories part.

    Args:
        shown: its texts may hold anything; they are shown on one line and never read as markup or as terminal codes.
        decode: token ids of a `GrownTree` to text.
        title: heading; default: the question of a record.
    """
    record = as_record(shown, decode)
    nodes, leaves = record["nodes"], record["leaves"]
    kinds = {leaf["node"]: leaf_kind(leaf["success"]) for leaf in leaves}
    found = [leaf_kind(leaf["success"]) for leaf in leaves]
    counts = ", ".join(f"{found.count(kind)} {kind}" for kind in LEAF_MARKERS)
    title = title if title is not None else record["question"]["text"]
    tokens = record["generated_tokens"]
    heading = f"{one_line(title)}\n{len(leaves)} trajectories: {counts}" + (f"; {tokens} tokens" if tokens else "")
    view = Tree(Text(heading, style="bold"))
    children_N = children_of([node["parent"] for node in nodes])
    pending = [(child, view) for child in reversed(children_N[0])]
    while pending:  # no recursion: a completion may have thousands of steps
        step, above = pending.pop()
        label = Text()
        while True:  # steps without a branch between them stay on one level
            label.append(_figures(nodes[step]), style="cyan")
            label.append(one_line(nodes[step]["text"]))
            if step in kinds:
                label.append(f"  {kinds[step]}", style=STYLES[kinds[step]])
            children = children_N[step]
            if len(children) != 1:
                break
            label.append("\n")
            step = children[0]
        below = above.add(label)
        pending += [(child, below) for child in reversed(children)]
    return view


def _figures(node: Record) -> str:
    """What is known of a step: a last one has no IB-Score."""
    figures = {"p": node.get("density"), "score": node.get("ib_score")}
    words = [f"{name}={value:.2f}" for name, value in figures.items() if value is not None]
    return f"[{' '.join(words)}] " if words else ""
