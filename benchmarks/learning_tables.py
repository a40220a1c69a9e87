"""What the rows of `benchmarks.learning` say, as tables; no model is loaded.

Differences between two methods are paired by seed: same weights at the start, same questions in the same order. Their
intervals are Student's, at 95%, over the seeds that both methods have done; p-values are corrected with Holm's method
over the family of claims of a task.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimates import Estimate, holm
from benchmarks.learning_methods import METHODS

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

# What each part of a method adds, in the order in which a tree is made: the part, with it, without it.
PARTS = [
    ("a tree, branched at random", "random", "grpo_8"),
    ("branching where the policy is least confident, in place of at random", "confidence", "random"),
    ("branching by IB-Score, again at a step too, in place of confidence", "ib_no_local", "confidence"),
    ("the local advantage", "ibtpo", "ib_no_local"),
    ("`once` on the confidence tree", "confidence_once", "confidence"),
    ("`sampled` on the confidence tree", "confidence_sampled", "confidence"),
    ("`once` on the IB tree", "ib_once", "ib_no_local"),
    ("`once` on the random tree", "random_once", "random"),
    ("more completions a question, without a tree", "grpo_12", "grpo_8"),
    ("an adaptive budget, without a tree", "grpo_adaptive", "grpo_8"),
    ("an adaptive budget on the confidence tree", "confidence_adaptive", "confidence"),
    ("training the most uncertain tokens alone, without a tree", "grpo_8_top_entropy", "grpo_8"),
]

# Methods that the claims are about; the others are controls and variants.
MAIN = [name for name in METHODS if any(name in claim[1:] for claim in CLAIMS)]
# What is logged while a method trains, beside what its model can do.
DYNAMICS = {"entropy": "entropy", "effective_rate": "effective rate", "covariance": "covariance"}


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: int


@dataclass
class Results:
    """What a file of rows holds."""

    started: Counter[Run] = field(default_factory=Counter)  # how often: again where it had failed or been cut off
    complete: dict[Run, list[dict[str, Any]]] = field(default_factory=dict)  # rows in the order of checkpoints
    failed: dict[Run, str] = field(default_factory=dict)

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(run.task for run in self.started))

    def methods(self, task: str) -> list[str]:
        there = {run.method for run in self.started if run.task == task}
        return [name for name in METHODS if name in there] + sorted(there - set(METHODS))

    def runs(self, task: str, method: str) -> list[list[dict[str, Any]]]:
        """The rows of each complete run."""
        return [rows for run, rows in self.complete.items() if (run.task, run.method) == (task, method)]

    def measured(self, task: str, method: str, key: str) -> dict[int, float]:
        """A figure of each complete run, by seed; of its last row."""
        return dict(sorted((rows[-1]["seed"], rows[-1][key]) for rows in self.runs(task, method)))


def load(path: Path) -> Results:
    results = Results()
    if not path.exists():
        return results
    for line in path.read_text().splitlines():
        row = json.loads(line)
        run = Run(row["task"], row["method"], row["seed"])
        if row.get("event") == "started":
            results.started[run] += 1
            results.complete.pop(run, None)  # rows of a run that was cut off while it was written
        elif row.get("event") == "failed":
            results.failed[run] = row["error"]
        else:
            results.failed.pop(run, None)
            results.complete.setdefault(run, []).append(row)
    return results


def others(results: Results, task: str) -> list[str]:
    """Methods that no claim is about."""
    return [name for name in results.methods(task) if name not in MAIN]


def difference(results: Results, task: str, method: str, base: str, key: str) -> Estimate:
    """Of two methods, over the seeds that both have done."""
    ours, theirs = results.measured(task, method, key), results.measured(task, base, key)
    return Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def tables(results: Results) -> list[dict[str, Any]]:
    """A row for each method of each task."""
    rows = []
    for task in results.tasks():
        for method in results.methods(task):
            started = sum(times for run, times in results.started.items() if (run.task, run.method) == (task, method))
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


def name_of(method: str) -> str:
    return METHODS[method].name if method in METHODS else method


def method_table(results: Results, task: str) -> str:
    """What each method reached, how far that is from GRPO with 8 completions, and what it cost."""
    header = ["method", "runs started / done", "final accuracy", "area", "area - GRPO 8", "pairs"]
    rows = []
    for row in tables(results):
        if row["task"] == task:
            cost = [f"{row[key]:,}" if row["done"] else "-" for key in ("trained_tokens", "cpu_seconds")]
            apart = ["-", "-"] if row["method"] == "grpo_8" else [row["area - grpo_8"], row["pairs"]]
            runs = f"{row['started']} / {row['done']}"
            rows.append([name_of(row["method"]), runs, row["final"], row["area"], *apart, *cost])
    return markdown([*header, "trained tokens", "CPU seconds"], rows)


def claim_table(results: Results, task: str) -> str:
    header = ["what it adds", "pairs", "final accuracy", "p (Holm)", "area", "p (Holm)", "so it is"]
    rows = []
    for row in claims(results, task):
        name = f"{row['question']}: {name_of(row['method'])} - {name_of(row['base'])}"
        p_values = ["-" if math.isnan(row[f"p_{key}"]) else f"{row[f'p_{key}']:.3f}" for key in ("final", "area")]
        final, area = (row[key].text(sign=True) for key in ("final", "area"))
        judged = verdict(row["area"], row["p_area"])
        rows.append([name, row["final"].count, final, p_values[0], area, p_values[1], judged])
    return markdown(header, rows)


def task_table(results: Results) -> str:
    """Area of each claim on each task that has pairs, with its verdict; empty where there is one task alone."""
    judged = {task: claims(results, task) for task in results.tasks()}
    judged = {task: rows for task, rows in judged.items() if any(row["area"].count > 1 for row in rows)}
    if len(judged) < 2:
        return ""
    table = []
    for number, (question, method, base) in enumerate(CLAIMS):
        cells = []
        for rows in judged.values():
            area, p = rows[number]["area"], rows[number]["p_area"]
            pairs = f"{area.text(sign=True)}, {area.count} pairs: " if area.count > 1 else ""
            cells.append(pairs + verdict(area, p))
        table.append([f"{question}: {name_of(method)} - {name_of(base)}", *cells])
    return markdown(["what it adds, points of area", *(f"`{task}`" for task in judged)], table)


def part_table(results: Results, task: str) -> str:
    """What each part adds to the area by its paired runs; judged by its own interval, without correction."""
    rows = []
    for part, method, base in PARTS:
        area = difference(results, task, method, base, "area")
        if area.count < 2:
            judged = "not known"
        elif area.low > 0:
            judged = "it helps"
        else:
            judged = "it hurts" if area.high < 0 else "not told from nothing"
        rows.append([part, area.count, area.text(sign=True) if area.count else "-", judged])
    return markdown(["part", "pairs", "area, points", "so"], rows)


def dynamics(results: Results, task: str) -> list[dict[str, Any]]:
    """Of each method, the mean over its runs of what was logged up to the first and up to the last checkpoint."""
    rows = []
    for method in results.methods(task):
        row: dict[str, Any] = {"method": method}
        for key in DYNAMICS:
            logged = [[each[key] for each in run if each.get(key) is not None] for run in results.runs(task, method)]
            logged = [values for values in logged if values]
            row[key] = (
                tuple(float(np.mean([values[place] for values in logged])) for place in (0, -1)) if logged else ()
            )
        rows.append(row)
    return rows


def dynamics_table(results: Results, task: str) -> str:
    rows = [
        [name_of(row["method"]), *(" to ".join(f"{value:.3f}" for value in row[key]) or "-" for key in DYNAMICS)]
        for row in dynamics(results, task)
        if any(row[key] for key in DYNAMICS)
    ]
    return markdown(["method", *DYNAMICS.values()], rows)


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
                cells.append("failed" if run in results.failed else "not done" if run in results.started else "")
        rows.append([name_of(method), *cells])
    return markdown(["method", *(f"seed {seed}" for seed in seeds)], rows)
