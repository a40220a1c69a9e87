"""How much IB-TPO depends on its settings: accuracy on a small task, with one setting changed at a time.

    python -m benchmarks.sensitivity [--seeds 0 1] [--hours 0.5]     # the runs that are still missing
    python -m benchmarks.sensitivity --report                        # the section of docs/results.md from the rows
    python -m benchmarks.sensitivity --quick [--json FILE]

Runs are those of `benchmarks.learning`, with its task `chain7`, its budget and its learning rate; their rows are
appended to `benchmarks/results/sensitivity.jsonl`. The temperature is that of sampling in training; accuracy is
always that at temperature 1. `sibling_kappa` is a setting of
`advantage="sibling"`, so its values are compared with that advantage.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common, learning
from benchmarks.estimates import Estimate
from benchmarks.learning_methods import PAPER, SETTINGS, Method, Setting
from benchmarks.learning_tables import Results, Run, difference, load, markdown
from benchmarks.tasks import TASKS

RESULTS = learning.RESULTS.with_name("sensitivity.jsonl")
TASK = "chain7"
PUBLISHED = "published"  # the run that stands for the value of every setting in IB-TPO as published
# The values of each setting; the one that is published first, or the default where the paper has no such setting.
VALUES: dict[str, list] = {
    "ib_beta": [5.0, 1.0, 20.0],
    "ib_coef": [0.1, 0.0, 0.5],
    "step_noise": [0.0, 0.1],
    "temperature": [1.0, 0.7],
    "shape": [PAPER, (2, 11, 1, 1), (4, 5, 2, 1), (4, 5, 1, 2), (2, 6, 1, 2)],
    "sibling_kappa": [16.0, 0.0, 4.0, math.inf],
}


def method_of(setting: str, value: Any) -> str:
    """The name of the runs that have that value."""
    published = setting != "sibling_kappa" and value == VALUES[setting][0]
    return PUBLISHED if published else f"{setting}={value}"


def variants() -> dict[str, Method]:
    """All runs of a seed, in their order: the published one, then the values of each setting in turn."""
    methods = {PUBLISHED: Method("IB-TPO as published", labels={"setting": PUBLISHED, "value": PUBLISHED})}
    for setting, values in VALUES.items():
        for value in values:
            name = method_of(setting, value)
            # JSON has no infinite numbers and no tuples.
            labels = {"setting": setting, "value": value if setting != "shape" and value < math.inf else str(value)}
            if setting == "shape":
                method = Method(name, shape=value, labels=labels)
            elif setting == "sibling_kappa":
                method = Method(name, {"advantage": "sibling", "sibling_kappa": value}, labels=labels)
            else:
                method = Method(name, {setting: value}, labels=labels)
            methods.setdefault(name, method)
    return methods


def rows(results: Results, task: str) -> list[dict[str, Any]]:
    """A row for each value of each setting and each seed that is done; the published run is a row of every setting."""
    found = []
    for setting, values in VALUES.items():
        for value in values:
            for seed, final in results.measured(task, method_of(setting, value), "final").items():
                found.append({"task": task, "setting": setting, "value": str(value), "seed": seed, "final": final})
    return found


def table(results: Results, task: str) -> str:
    """Of each value: final accuracy and area, and how far they are from the first value's, over common seeds."""
    lines = []
    for setting, values in VALUES.items():
        first = method_of(setting, values[0])
        for value in values:
            name = method_of(setting, value)
            final, area = (
                Estimate.of(list(results.measured(task, name, key).values())).text() for key in ("final", "area")
            )
            apart, count = ["-", "-"], len(results.measured(task, name, "final"))
            if name != first:
                apart = [difference(results, task, name, first, key).text(sign=True) for key in ("final", "area")]
            label = f"`{setting}`" if setting != "shape" else "shape $(B_0, L, K, B)$"
            lines.append([label, value if value != math.inf else "infinite", count, final, area, *apart])
    header = ["setting", "value", "runs", "final accuracy", "area", "final - first value", "area - first value"]
    return markdown(header, lines)


def section(results: Results) -> str:
    """The section of the page, from the rows alone."""
    if not results.complete:
        return "Not measured yet.\n"
    pairs = max(
        difference(results, TASK, method_of(setting, value), method_of(setting, values[0]), "final").count
        for setting, values in VALUES.items()
        for value in values[1:]
    )
    known = "Nothing is known yet, since no difference has two pairs of runs. " if pairs < 2 else ""
    return (
        f"{known}{len(results.complete)} runs of `{TASK}` are done, of {len(results.started)} started. The first "
        "value of each setting is that of IB-TPO as published, or the default; the other rows have their paired "
        "difference to it. The temperature is that of training, and accuracy is always that at temperature 1.\n\n"
        + table(results, TASK)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write the section of the page")
    parser.add_argument("--hours", type=float, default=1e9, help="start no run after that time")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    args = parser.parse_args(arguments)
    methods, tasks = variants(), dict(TASKS)
    if args.quick:
        args.results, args.seeds = Path(tempfile.mkdtemp()) / "sensitivity.jsonl", [0]
        tasks = {TASK: replace(learning.QUICK, name=TASK)}
        methods = {name: methods[name] for name in (PUBLISHED, "ib_beta=20.0", "temperature=0.7")}
    if not args.report:
        settings = {TASK: Setting(budget=6_000, learning_rate=1e-3, checkpoints=2) if args.quick else SETTINGS[TASK]}
        runs = [Run(TASK, method, seed) for seed in args.seeds for method in methods]
        learning.work(runs, settings, args, tasks, methods)
    results = load(args.results)
    if args.report:
        from benchmarks.learning_report import PAGE, put

        PAGE.write_text(put(PAGE.read_text(), "sensitivity", section(results)))
    common.report(f"Final accuracy on '{TASK}' by setting", rows(results, TASK) or [{"rows": "none"}], args)


if __name__ == "__main__":
    main()
