"""Pictures of a tree and of a training run.

Pure functions of a `GrownTree` or its record, or of the trainer's `log_history`.
matplotlib is imported when a picture is drawn, and only its object interface is used: no window, no global state.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..grown_tree import GrownTree
from .lines import one_line
from .records import Record, record_tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAF_MARKERS = {"right": ("P", "#2166ac"), "wrong": ("X", "#b2182b"), "unscored": ("d", "#777777")}
CURVES = {"reward": "#555555", "tree/average_success": "#2166ac", "tree/effective_rate": "#d95f02"}
_COLOURS = ("#555555", "#2166ac", "#d95f02", "#1b7837", "#762a83", "#b2182b")


def draw_tree(
    shown: GrownTree | Record,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> "Figure":
    """Draw a tree from left to right: one row per leaf, a step where its last token stands.

    Args:
        shown: the density `p(s)` colours the steps; below a success of 0.5 a leaf is marked wrong.
        path: where to save the picture.
        title: heading; default: the question of a record.
        decode: token ids of a `GrownTree` to text, to write the steps where there is room. The text may hold anything.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with_text = decode is not None or isinstance(shown, dict)
    record = as_record(shown, decode)
    nodes, leaves = record["nodes"], record["leaves"]
    parents = [node["parent"] for node in nodes]
    rows = rows_of(parents)
    ends = [node["end"] for node in nodes]
    width = max(*ends, 1)
    figure = Figure(figsize=(13, 1.6 + 0.5 * len(leaves)), layout="constrained")
    axes = figure.add_subplot()
    for index, node in enumerate(nodes[1:], start=1):
        start, end, row = ends[node["parent"]], node["end"], rows[index]
        if rows[node["parent"]] != row:
            axes.plot([start, start], [rows[node["parent"]], row], color="#b0b0b0", linewidth=1.2, zorder=1)
        axes.plot([start, end], [row, row], color="#b0b0b0", linewidth=1.2, zorder=1)
        if with_text:
            # About 150 characters of this size fit across the picture; the gap is for the nodes at both ends.
            text = _shorten(node["text"], int(150 * node["tokens"] / width) - 2)
            axes.text((start + end) / 2, row - 0.16, text, fontsize=8, ha="center", va="bottom", **_PLAIN)
    colour_map = colormaps["RdYlBu"].with_extremes(bad="#c8c8c8")  # grey: no scored leaf under the step
    density = np.array([node.get("density") for node in nodes], dtype=float)
    points = axes.scatter(
        ends, rows, c=density, cmap=colour_map, vmin=0, vmax=1, plotnonfinite=True, edgecolors="#606060"
    )
    points.set(sizes=[75], linewidths=0.6, zorder=3)
    points.set_gid("steps")
    axes.scatter([0], [rows[0]], marker="s", s=150, facecolors="none", edgecolors="black", zorder=4)

    for step, rounds in _rounds(leaves).items():
        axes.scatter(
            [ends[step]], [rows[step]], s=135, facecolors="none", edgecolors="black", linewidths=1.3, zorder=4
        )
        label = ", ".join(map(str, rounds))
        axes.text(ends[step] + 0.006 * width, rows[step] + 0.17, label, fontsize=8, fontweight="bold", va="top")

    kinds = [leaf_kind(leaf["success"]) for leaf in leaves]
    for kind, (marker, colour) in LEAF_MARKERS.items():
        lasts = [leaf["node"] for leaf, other in zip(leaves, kinds, strict=True) if other == kind]
        x = [ends[last] + 0.018 * width for last in lasts]
        markers = axes.scatter(x, [rows[last] for last in lasts], marker=marker, color=colour, s=80, zorder=3)
        markers.set_gid(kind)

    axes.set(xlim=(-0.02 * width, 1.04 * width), ylim=(len(leaves) - 0.4, -0.8), yticks=[])
    axes.set_xlabel("tokens of the completion")
    title = title if title is not None else record["question"]["text"] or "Rollout tree"
    axes.set_title(_in_font(one_line(title, 150)), loc="left", fontsize=11, **_PLAIN)
    axes.spines[["left", "right", "top"]].set_visible(False)
    figure.colorbar(points, ax=axes, label="reward density p(s)", pad=0.01, aspect=30)
    point = {"linestyle": "none", "markeredgecolor": "black", "markerfacecolor": "none"}
    handles = [Line2D([], [], marker="s", markersize=10, label="question", **point)]
    handles += [Line2D([], [], marker="o", markersize=10, label="branched here, in round 1, 2, ...", **point)]
    for kind, (marker, colour) in LEAF_MARKERS.items():
        label = f"{kind} ({kinds.count(kind)})"
        handles.append(Line2D([], [], marker=marker, color=colour, markersize=8, linestyle="none", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return _save(figure, path)


def draw_learning_curve(
    log_history: Sequence[dict],
    path: str | Path | None = None,
    keys: Sequence[str] = tuple(CURVES),
    *,
    held_out: tuple[float, float] | None = None,
    title: str = "IB-TPO",
) -> "Figure":
    """Draw logged rates against the training step: every log as a light point, its moving mean as a line.

    Args:
        log_history: `trainer.state.log_history`.
        path: where to save the picture.
        keys: metrics to draw; one that was never logged is left out.
        held_out: held-out accuracy before and after training.
        title: heading.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, key in enumerate(keys):
        # TRL logs None where a window had no value.
        logs = [(log["step"], log[key]) for log in log_history if log.get(key) is not None and np.isfinite(log[key])]
        if not logs:
            continue
        steps, values = np.array(logs, dtype=float).T
        colour = CURVES.get(key, _COLOURS[number % len(_COLOURS)])
        axes.scatter(steps, values, color=colour, alpha=0.25, s=14, linewidths=0)
        # Reward and success coincide where the reward is 0 or 1: dashes let the other line show.
        style = "--" if key == "reward" else "-"
        axes.plot(steps, _moving_mean(values), style, color=colour, linewidth=2, label=key, zorder=3 - number % 2)
    if held_out is not None:
        for name, value, style in zip(("before", "after"), held_out, (":", "-."), strict=True):
            axes.axhline(value, color="#1b7837", linestyle=style, label=f"held-out accuracy {name}: {value:.0%}")
    low, high = min(0, axes.dataLim.y0), max(1, axes.dataLim.y1)  # rates always alike; a reward may need more room
    axes.set(xlabel="training step", ylim=(low - 0.03 * (high - low), high + 0.03 * (high - low)))
    axes.set_title(_in_font(one_line(title)), loc="left", **_PLAIN)
    axes.grid(alpha=0.25)
    axes.spines[["right", "top"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _save(figure, path)


def as_record(shown: GrownTree | Record, decode: Callable[[list[int]], str] | None = None) -> Record:
    """A record as it is, a `GrownTree` as a record."""
    return shown if isinstance(shown, dict) else record_tree(shown, decode or (lambda ids: ""))


def leaf_kind(success: float | None) -> str:
    """`right`, `wrong` or `unscored`: a key of `LEAF_MARKERS`."""
    if success is None or np.isnan(success):
        return "unscored"
    return "right" if success >= 0.5 else "wrong"


# Completions are untrusted text: "$...$" in them is not a formula.
_PLAIN = {"parse_math": False, "usetex": False}


def children_of(parents: Sequence[int]) -> list[list[int]]:
    """Children of every step, `(N,)`, in order; the root's parent is -1."""
    children: list[list[int]] = [[] for _ in parents]
    for step, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(step)
    return children


def rows_of(parents: Sequence[int]) -> np.ndarray:
    """Row of every step, `(N,)`: a first child stays on its parent's row, later ones go below its whole subtree."""
    rows, children_N = np.zeros(len(parents), dtype=int), children_of(parents)
    used, pending = 0, [(0, 0)]
    while pending:  # no recursion: a completion may have thousands of steps
        step, row = pending.pop()
        rows[step] = row = row if row >= 0 else used
        children = children_N[step]
        if not children:
            used = max(used, row + 1)
        pending += [(child, -1) for child in reversed(children[1:])]
        pending += [(child, row) for child in children[:1]]
    return rows


def _rounds(leaves: Sequence[Record]) -> dict[int, list[int]]:
    """Rounds in which each step was branched, counted from 1."""
    rounds: dict[int, list[int]] = {}
    for leaf in leaves:
        after, current = leaf["branched_after"], leaf["round"]
        if after is not None and current > 0 and current not in rounds.setdefault(after, []):
            rounds[after].append(current)
    return rounds


def _in_font(text: str) -> str:
    """A square for every character that the font cannot show."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(None))
    return "".join(char if font.get_char_index(ord(char)) else "\u25a1" for char in text)


def _shorten(text: str, length: int) -> str:
    """At most `length` characters of `text`; nothing where that would say nothing."""
    text = _in_font(one_line(text[: 4 * max(length, 0) + 64], max(length, 6)))
    return text if len(text) <= length else ""


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the run, narrower at its ends."""
    half = len(values) // 20 + 1
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _save(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
