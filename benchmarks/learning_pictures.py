"""Pictures of the rows of `benchmarks.learning`: learning curves, training dynamics, paired differences."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from benchmarks.estimates import Estimate
from benchmarks.learning_methods import STEPS
from benchmarks.learning_tables import DYNAMICS, MAIN, Results, claims, difference, name_of, others

COSTS = {"generated_tokens": "generated tokens", "trained_tokens": "trained tokens", "cpu_seconds": "CPU seconds"}
DPI = 110
# Where TRL's trainer logs no covariance, the same training in this package does.
DRAWN = [*MAIN, "independent_8"]
BY_STEPS = ["confidence_sampled", "confidence_once", "ibtpo"]


def plain(text: str) -> str:
    """Pictures know no Markdown."""
    return text.replace("`", "")


def mean_curve(runs: Sequence[list[dict]], over: str, key: str) -> tuple[np.ndarray, list[Estimate]] | None:
    """Mean and interval over runs, at 60 costs that all of them reached, on straight lines between their rows."""
    measured = [[row for row in rows if row.get(key) is not None] for rows in runs]
    measured = [rows for rows in measured if rows]
    if not measured:
        return None
    at = np.linspace(max(rows[0][over] for rows in measured), min(rows[-1][over] for rows in measured), 60)
    curves = [np.interp(at, [row[over] for row in rows], [row[key] for row in rows]) for rows in measured]
    return at, [Estimate.of(values) for values in np.transpose(curves)]


def _panels(results: Results, task: str, panels: Sequence[tuple[str, str]], path: Path, title: str) -> Figure:
    """A panel for each pair of what is drawn and over which cost, with one legend of all methods below."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    lines, same = {}, len({key for key, _ in panels}) == 1
    for axis, (key, over) in zip(figure.subplots(1, len(panels), sharey=same), panels, strict=True):
        for method in MAIN if same else DRAWN:
            runs = results.runs(task, method)
            found = mean_curve(runs, over, key)
            if found is None:
                continue
            at, estimates = found
            color, label = f"C{DRAWN.index(method)}", f"{plain(name_of(method))} ({len(runs)})"
            (lines[label],) = axis.plot(at, [each.mean for each in estimates], color=color)
            if len(runs) > 2:
                low, high = ([getattr(each, end) for each in estimates] for end in ("low", "high"))
                axis.fill_between(at, low, high, color=color, alpha=0.1, lw=0)
        axis.set_xlabel(COSTS[over])
        if not same or axis is figure.axes[0]:
            axis.set_ylabel(DYNAMICS.get(key, "held-out accuracy"))
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(f"{title} of task '{task}': means over seeds (number of runs), bands are 95% intervals")
    figure.savefig(path, dpi=DPI)
    return figure


def _differences(names: Sequence[str], estimates: Sequence[dict[str, Estimate]], path: Path, title: str) -> Figure:
    """Paired differences with their intervals, in points: final accuracy and area of each row."""
    figure = Figure(figsize=(10, 1.5 + 0.45 * len(names)), layout="constrained")
    axis = figure.subplots()
    for offset, key, label, color in ((-0.12, "final", "final accuracy", "C0"), (0.12, "area", "area", "C1")):
        places = np.arange(len(names)) + offset
        low, mean, high = ([100 * getattr(row[key], name) for row in estimates] for name in ("low", "mean", "high"))
        axis.hlines(places, low, high, color=color, lw=1.5)
        axis.plot(mean, places, "o", color=color, label=label)
    axis.axvline(0, color="black", lw=0.8)
    labels = [f"{plain(name)} ({row['area'].count} pairs)" for name, row in zip(names, estimates, strict=True)]
    axis.set_yticks(range(len(names)), labels)
    axis.set_ylim(len(names) - 0.5, -0.5)  # the first at the top
    axis.set_title(title)
    axis.set_xlabel("paired difference in points, 95% interval")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=DPI)
    return figure


def tasks_by_steps(results: Results) -> list[str]:
    """Tasks on which trees were compared with GRPO, by the steps of their solutions; none where there is one alone."""
    tasks = [task for task in STEPS if difference(results, task, BY_STEPS[0], MAIN[0], "area").count > 1]
    return tasks if len(tasks) > 1 else []


def draw_by_steps(results: Results, folder: Path) -> Figure:
    """What trees add to GRPO on each of `tasks_by_steps`."""
    tasks = tasks_by_steps(results)
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for number, method in enumerate(BY_STEPS):
        found = {place: difference(results, task, method, MAIN[0], "area") for place, task in enumerate(tasks)}
        found = {place + 0.15 * (number - 1): each for place, each in found.items() if each.count > 1}
        low, mean, high = ([100 * getattr(each, name) for each in found.values()] for name in ("low", "mean", "high"))
        axis.vlines(list(found), low, high, color=f"C{number}", lw=1.5)
        axis.plot(list(found), mean, "o", color=f"C{number}", label=plain(name_of(method)))
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(tasks)), [f"'{task}'\n{STEPS[task]} steps" for task in tasks])
    axis.set_ylabel("points of area, 95% interval")
    axis.set_title(f"What trees add to {plain(name_of(MAIN[0]))}, by the steps of a solution")
    axis.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=len(BY_STEPS), fontsize="small")
    figure.savefig(folder / "gain_by_steps.png", dpi=DPI)
    return figure


def draw(results: Results, task: str, folder: Path) -> dict[str, Figure]:
    """Draw all pictures of a task for which there are rows, as PNG files in a folder; by the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for kind, title, panels in (
        ("learning", "Learning curves", [("accuracy", over) for over in COSTS]),
        ("dynamics", "Training dynamics", [(key, "generated_tokens") for key in DYNAMICS]),
    ):
        path = folder / f"{kind}_{task}.png"
        figures[path.stem] = _panels(results, task, panels, path, title)
    asked = [row for row in claims(results, task) if row["area"].count > 1]
    if asked:
        path = folder / f"differences_{task}.png"
        figures[path.stem] = _differences(
            [row["question"] for row in asked], asked, path, f"The claims on task '{task}'"
        )
    rest = {
        name_of(name): {key: difference(results, task, name, MAIN[0], key) for key in ("final", "area")}
        for name in others(results, task)
    }
    rest = {name: row for name, row in rest.items() if row["area"].count > 1}
    if rest:
        path = folder / f"others_{task}.png"
        title = f"Other methods on task '{task}', minus {plain(name_of(MAIN[0]))}"
        figures[path.stem] = _differences(list(rest), list(rest.values()), path, title)
    return figures
