"""Tables, pictures and `docs/results.md` from the rows of `benchmarks.learning` alone; no model is loaded.

Differences between two methods are paired by seed: same weights at the start, same questions in the same order. Their
intervals are Student's, at 95%, over the seeds that both methods have done; p-values are corrected with Holm's method
over the family of claims of a task.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mpmath
import numpy as np

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"

# What each method is called where people read it.
METHOD_NAMES = {
    "grpo_8": "GRPO, G = 8",
    "grpo_12": "GRPO, G = 12",
    "confidence": "confidence tree, `per_trajectory`",
    "confidence_once": "confidence tree, `once`",
    "confidence_sampled": "confidence tree, `sampled`",
    "ib_no_local": "IB tree, `ib_coef` 0",
    "ibtpo": "IB-TPO as published",
    "ib_once": "IB tree, `ib_coef` 0, `once`",
    "random": "random tree, `per_trajectory`",
    "random_once": "random tree, `once`",
    "random_sampled": "random tree, `sampled`",
    "ibtpo_lookahead_3": "IB-TPO, lookahead 3",
    "ib_no_local_lookahead_3": "IB tree, `ib_coef` 0, lookahead 3",
    "ibtpo_2_3_1_5": "IB-TPO, shape (2, 3, 1, 5)",
    "ibtpo_4_3_1_4": "IB-TPO, shape (4, 3, 1, 4)",
    "grpo_8_top_entropy": "GRPO, G = 8, the 20% most uncertain tokens",
    "confidence_top_entropy": "confidence tree, the 20% most uncertain tokens",
    "grpo_8_rate_0.7": "GRPO, G = 8, 0.7 times the learning rate",
    "grpo_8_rate_1.4": "GRPO, G = 8, 1.4 times the learning rate",
}

# The family of claims of a task: what is asked, and the two methods whose difference answers it.
CLAIMS = [
    ("IB-TPO as published", "ibtpo", "grpo_8"),
    ("confidence tree with `once`", "confidence_once", "grpo_8"),
    ("confidence tree with `sampled`", "confidence_sampled", "grpo_8"),
    ("confidence tree with `per_trajectory`", "confidence", "grpo_8"),
    ("more completions a question", "grpo_12", "grpo_8"),
    ("the local advantage (`ib_coef`)", "ibtpo", "ib_no_local"),
    ("the choice of step by IB-Score", "ib_no_local", "confidence"),
    ("the weight `once`", "confidence_once", "confidence"),
    ("the weight `sampled`", "confidence_sampled", "confidence"),
]


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: int


@dataclass
class Results:
    """What a file of rows holds."""

    started: list[Run] = field(default_factory=list)  # every run that was, once
    complete: dict[Run, list[dict[str, Any]]] = field(default_factory=dict)  # rows in the order of checkpoints
    failed: dict[Run, str] = field(default_factory=dict)

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(run.task for run in self.started))

    def methods(self, task: str) -> list[str]:
        there = {run.method for run in self.started if run.task == task}
        return [name for name in METHOD_NAMES if name in there] + sorted(there - set(METHOD_NAMES))

    def measured(self, task: str, method: str, key: str) -> dict[int, float]:
        """A figure of each complete run, by seed; of its last row."""
        found = {
            run.seed: rows[-1][key] for run, rows in self.complete.items() if (run.task, run.method) == (task, method)
        }
        return dict(sorted(found.items()))


def load(path: Path) -> Results:
    results = Results()
    if not path.exists():
        return results
    for line in path.read_text().splitlines():
        row = json.loads(line)
        run = Run(row["task"], row["method"], row["seed"])
        if row.get("event") == "started":
            if run not in results.started:
                results.started.append(run)
            results.complete.pop(run, None)  # rows of a run that was cut off while it was written
        elif row.get("event") == "failed":
            results.failed[run] = row["error"]
        else:
            results.failed.pop(run, None)
            results.complete.setdefault(run, []).append(row)
    return results


# ----- statistics ----------------------------------------------------------------------------------------------------


def two_sided_p(t: float, degrees: int) -> float:
    """Probability under Student's distribution of a value at least as far from 0 as `t`."""
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Half width, in standard errors, of an interval at that level."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - level else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval; the interval and p are NaN for fewer than two values."""

    count: int
    mean: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        count = len(values)
        if count < 2:
            return cls(count, float(values[0]) if count else math.nan, math.nan, math.nan, math.nan)
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
        half = t_quantile(count - 1) * error
        p = two_sided_p(mean / error, count - 1) if error else float(mean == 0)
        return cls(count, mean, mean - half, mean + half, p)

    def text(self, sign: bool = False) -> str:
        """In points (percent)."""
        if not self.count:
            return "not run"
        form = "{:+.1f}" if sign else "{:.1f}"
        mean, low, high = (form.format(100 * value) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if self.count > 1 else f"{mean} (one seed)"


def difference(results: Results, task: str, method: str, base: str, key: str) -> Estimate:
    """Of two methods, over the seeds that both have done."""
    ours, theirs = results.measured(task, method, key), results.measured(task, base, key)
    return Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction; NaN stays, and does not count as a claim."""
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected


# ----- tables --------------------------------------------------------------------------------------------------------


def tables(results: Results) -> list[dict[str, Any]]:
    """A row for each method of each task."""
    rows = []
    for task in results.tasks():
        for method in results.methods(task):
            started = sum((run.task, run.method) == (task, method) for run in results.started)
            final = results.measured(task, method, "final")
            row = {"task": task, "method": method, "started": started, "done": len(final)}
            row["final"] = Estimate.of(list(final.values())).text()
            row["area"] = Estimate.of(list(results.measured(task, method, "area").values())).text()
            for key in ("final", "area"):
                row[f"{key} - grpo_8"] = difference(results, task, method, "grpo_8", key).text(sign=True)
            row["pairs"] = difference(results, task, method, "grpo_8", "final").count
            for key in ("generated_tokens", "trained_tokens", "cpu_seconds"):
                values = list(results.measured(task, method, key).values())
                row[key] = round(float(np.mean(values))) if values else "-"
            rows.append(row)
    return rows


def claims(results: Results, task: str) -> list[dict[str, Any]]:
    """The differences that learning_plan.md asks for, with Holm's correction over those of the task."""
    rows = []
    for question, method, base in CLAIMS:
        final, area = (difference(results, task, method, base, key) for key in ("final", "area"))
        rows.append({"question": question, "method": method, "base": base, "final": final, "area": area})
    for key in ("final", "area"):
        for row, corrected in zip(rows, holm([row[key].p for row in rows]), strict=True):
            row[f"p_{key}"] = corrected
    return rows


def verdict(estimate: Estimate, corrected: float) -> str:
    if estimate.count < 2:
        return "not known"
    if corrected < 0.05:
        return "better" if estimate.mean > 0 else "worse"
    return "undecided"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def method_table(results: Results, task: str) -> str:
    header = ["method", "runs started / done", "final accuracy", "area", "trained tokens", "CPU seconds"]
    rows = []
    for row in tables(results):
        if row["task"] == task:
            name = METHOD_NAMES.get(row["method"], row["method"])
            cost = [f"{row[key]:,}" if row["done"] else "-" for key in ("trained_tokens", "cpu_seconds")]
            rows.append([name, f"{row['started']} / {row['done']}", row["final"], row["area"], *cost])
    return markdown(header, rows)


def claim_table(results: Results, task: str) -> str:
    header = ["what it adds", "pairs", "final accuracy", "p (Holm)", "area", "p (Holm)", "so it is"]
    rows = []
    for row in claims(results, task):
        name = f"{row['question']}: {METHOD_NAMES[row['method']]} - {METHOD_NAMES[row['base']]}"
        p_values = ["-" if math.isnan(row[f"p_{key}"]) else f"{row[f'p_{key}']:.3f}" for key in ("final", "area")]
        final, area = (row[key].text(sign=True) for key in ("final", "area"))
        judged = verdict(row["area"], row["p_area"])
        rows.append([name, row["final"].count, final, p_values[0], area, p_values[1], judged])
    return markdown(header, rows)


def run_table(results: Results, task: str) -> str:
    """Final accuracy and area of each run, so that nothing hides in a mean."""
    methods = results.methods(task)
    seeds = sorted({run.seed for run in results.started if run.task == task})
    rows = []
    for method in methods:
        final, area = results.measured(task, method, "final"), results.measured(task, method, "area")
        cells = []
        for seed in seeds:
            run = Run(task, method, seed)
            if seed in final:
                cells.append(f"{100 * final[seed]:.1f} / {100 * area[seed]:.1f}")
            else:
                cells.append("failed" if run in results.failed else "cut off" if run in results.started else "")
        rows.append([METHOD_NAMES.get(method, method), *cells])
    return markdown(["method", *(f"seed {seed}" for seed in seeds)], rows)


# ----- pictures ------------------------------------------------------------------------------------------------------

COSTS = {"generated_tokens": "generated tokens", "trained_tokens": "trained tokens", "cpu_seconds": "CPU seconds"}
DYNAMICS = {"entropy": "entropy", "effective_rate": "effective rate", "covariance": "covariance"}


def _mean_curves(axis, results: Results, task: str, methods: Sequence[str], over: str, key: str) -> None:
    """Means over the complete runs of each method, and 95% intervals where there are several."""
    for number, method in enumerate(methods):
        runs = [rows for run, rows in results.complete.items() if (run.task, run.method) == (task, method)]
        runs = [[row for row in rows if row.get(key) is not None] for rows in runs]
        runs = [rows for rows in runs if rows]
        if not runs:
            continue
        at = np.linspace(max(rows[0][over] for rows in runs), min(rows[-1][over] for rows in runs), 60)
        curves = [np.interp(at, [row[over] for row in rows], [row[key] for row in rows]) for rows in runs]
        estimates = [Estimate.of(values) for values in np.transpose(curves)]
        color = f"C{number % 10}"
        axis.plot(
            at,
            [each.mean for each in estimates],
            color=color,
            label=f"{METHOD_NAMES.get(method, method)} ({len(runs)})",
        )
        if len(runs) > 2:
            axis.fill_between(
                at, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.1, lw=0
            )


def draw(results: Results, task: str, folder: Path) -> list[Path]:
    """Learning curves over three costs, training dynamics, and the paired differences."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    methods = [name for name in results.methods(task) if results.measured(task, name, "final")]
    paths = []

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axis, (over, label) in zip(figure.subplots(1, 3, sharey=True), COSTS.items(), strict=True):
        _mean_curves(axis, results, task, methods, over, "accuracy")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out accuracy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(f"Task '{task}': means over seeds (number of runs), bands are 95% intervals")
    paths.append(folder / f"learning_{task}.png")
    figure.savefig(paths[-1], dpi=110)

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 3), DYNAMICS.items(), strict=True):
        _mean_curves(axis, results, task, methods, "generated_tokens", key)
        axis.set_xlabel("generated tokens")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    paths.append(folder / f"dynamics_{task}.png")
    figure.savefig(paths[-1], dpi=110)

    rows = [row for row in claims(results, task) if row["final"].count > 1]
    if rows:
        figure = Figure(figsize=(10, 1 + 0.45 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for offset, key, color in ((-0.12, "final", "C0"), (0.12, "area", "C1")):
            for place, row in enumerate(rows):
                low, mean, high = (100 * value for value in (row[key].low, row[key].mean, row[key].high))
                axis.plot([low, high], [place + offset] * 2, color=color, lw=1.5)
                axis.plot(
                    mean,
                    place + offset,
                    "o",
                    color=color,
                    label={"final": "final accuracy", "area": "area"}[key] if not place else None,
                )
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(
            range(len(rows)), [f"{row['question'].replace('`', '')} ({row['final'].count} pairs)" for row in rows]
        )
        axis.invert_yaxis()
        axis.set_xlabel("paired difference in points, 95% interval")
        axis.legend(loc="best", fontsize="small")
        axis.grid(alpha=0.3, axis="x")
        paths.append(folder / f"differences_{task}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


# ----- the page ------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- from the rows: begin -->", "<!-- from the rows: end -->"


def sentence(results: Results, task: str, row: dict[str, Any]) -> str:
    """What is known of one claim, in words."""
    names = METHOD_NAMES[row["method"]], METHOD_NAMES[row["base"]]
    if row["area"].count < 2:
        return f"Not known, for want of runs: {names[0]} against {names[1]}."
    said = {
        "better": "is better than",
        "worse": "is worse than",
        "undecided": "cannot be told from",
    }[verdict(row["area"], row["p_area"])]
    return (
        f"{names[0][0].upper()}{names[0][1:]} {said} {names[1]}: {row['area'].text(sign=True)} points of area, "
        f"{row['final'].text(sign=True)} points of final accuracy ({row['area'].count} pairs)."
    )


def first_line(results: Results, task: str) -> str:
    """What is and is not known, of the methods that are compared with GRPO, G = 8."""
    judged: dict[str, list[str]] = {}
    for row in claims(results, task):
        if row["base"] == "grpo_8":
            words = f"{METHOD_NAMES[row['method']]} ({row['area'].text(sign=True)}, {row['area'].count} pairs)"
            judged.setdefault(verdict(row["area"], row["p_area"]), []).append(words)
    won = any("IB-TPO" in words for words in judged.get("better", []))
    opening = "learns more than" if won else "is not shown to learn more than"
    parts = [
        f"On the task `{task}`, IB-TPO {opening} GRPO with 8 completions from the same number of generated tokens."
    ]
    parts += [f"{kind[0].upper()}{kind[1:]}: {'; '.join(names)}." for kind, names in sorted(judged.items())]
    return " ".join(parts) + "\n"


def generated_part(results: Results) -> str:
    """Everything on the page that depends on rows."""
    if not results.complete:
        return "Not known: no run is done yet.\n"
    parts = [first_line(results, task) for task in results.tasks()[:1]]
    parts.append(
        "Figures are differences in points of accuracy with their 95% intervals; see below for what was measured.\n"
    )
    for task in results.tasks():
        title = f"## Task `{task}`\n"
        parts.append(title)
        parts += [f"- {sentence(results, task, row)}\n" for row in claims(results, task)]
        parts.append("")
        if any(row["final"].count > 1 for row in claims(results, task)):
            parts.append(f"![Paired differences](images/differences_{task}.png)\n")
        parts.append(claim_table(results, task))
        if any(run.task == task for run in results.complete):
            parts.append(f"![Learning curves](images/learning_{task}.png)\n")
        parts.append(method_table(results, task))
        parts.append("Final accuracy / area of every run, in percent:\n")
        parts.append(run_table(results, task))
        if any(run.task == task for run in results.complete):
            parts.append(f"![Training dynamics](images/dynamics_{task}.png)\n")
    return "\n".join(parts)


def write(results: Results, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Draw the pictures, and put tables and sentences between the two marks of the page."""
    for task in results.tasks():
        if any(run.task == task for run in results.complete):
            draw(results, task, images)
    text = page.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n\n{generated_part(results)}\n{END}{tail}")
