"""Whether a method learns better: held-out accuracy against generated tokens, trained tokens and seconds.

    python -m benchmarks.learning [--hours 2] [--workers 2]     # the runs of learning_plan.md that are still missing
    python -m benchmarks.learning --report                      # tables, pictures and docs/results.md from the rows
    python -m benchmarks.learning --task chain7 --methods grpo_8 ibtpo --seeds 0 1 [--results FILE]
    python -m benchmarks.learning --quick [--json FILE]

Each run is a line that says that it was started and, when it is done, a line for each of its checkpoints, appended to
`benchmarks/results/learning.jsonl`. What was interrupted is run again from its beginning; what is done is not. Runs
use one thread each; `seconds` is the wall clock and depends on what else the machine does, `cpu_seconds` does not.
"""

import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two runs would wait for one another

from benchmarks import common, learning_tables
from benchmarks.facts import FactTask
from benchmarks.learning_methods import FIRST, I2B_LPO, METHODS, NOISE, SETTINGS, Method, Setting
from benchmarks.learning_tables import Run
from benchmarks.tasks import TASKS, Chain

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
CACHE = Path("outputs/warm_starts")
QUICK = Chain("quick", steps=3, modulus=7, warm_steps=(40,), warm_rows=32, hidden=32)


def planned() -> list[Run]:
    """The runs of learning_plan.md in their order, of which every prefix says something."""
    weights = ["grpo_8", "confidence", "confidence_once", "confidence_sampled"]
    choice = ["ib_no_local", "ibtpo", "grpo_12"]
    stages = [
        ("chain7", weights, range(4)),
        ("chain7", choice, range(4)),
        ("chain7", weights + choice, range(4, 8)),
        ("chain10", weights, range(2)),
        ("chain7", ["ib_once", "random", "random_once"], range(4)),
        ("chain7", weights + choice, range(8, 16)),
        ("chain7", FIRST, range(6)),
        ("chain10", weights + choice, range(6)),
        ("chain8", weights + choice, range(6)),
        ("chain12", weights + choice, range(16)),
        ("chain7", [name for name in METHODS if name not in I2B_LPO + NOISE], range(2)),
        ("sums", weights + choice, range(6)),
        ("chain7", [name for name in METHODS if name not in I2B_LPO + NOISE], range(6)),
        ("chain7", I2B_LPO, range(8)),
        ("chain7", NOISE, range(4)),
        ("chain3", ["grpo_8", "confidence_sampled", "confidence_once", "ibtpo", "confidence"], range(6)),
    ]
    runs = [Run(task, method, seed) for task, methods, seeds in stages for seed in seeds for method in methods]
    return list(dict.fromkeys(runs))


def execute(task: FactTask, method: Method, seed: int, setting: dict[str, Any], log: Path) -> list[dict[str, Any]]:
    """A run in a process of its own, which loads the libraries once for all its runs."""
    from benchmarks import learning_run

    return learning_run.run(task, method, seed, learning_run.Setting(**setting), CACHE, log)


def append(results: Path, lines: list[dict[str, Any]]) -> None:
    with results.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def commit() -> str:
    """Of the code that runs, marked where it has changes."""
    folder = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    code = [".", "../trl_ibtpo", ":!results"]  # rows of earlier runs are no code
    changed = subprocess.run(["git", "diff", "HEAD", "--quiet", "--", *code], cwd=folder)
    return head.stdout.strip() + ("" if changed.returncode == 0 else "+")


def work(
    runs: list[Run], settings: dict[str, Any], args, tasks: dict[str, FactTask], methods: dict[str, Method] = METHODS
) -> None:
    """Do the runs that are missing in `args.results`, `args.workers` at a time."""

    def named(run: Run) -> dict[str, Any]:
        return {**asdict(run), **methods[run.method].labels}

    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = learning_tables.load(args.results).complete
    left: Iterator[Run] = iter([run for run in runs if run not in done])
    code, begun, log = commit(), time.monotonic(), CACHE.parent / "learning.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    in_flight = {}
    with (
        ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(runs), initial=sum(run in done for run in runs), unit="run", smoothing=0.1) as progress,
    ):
        while True:
            while len(in_flight) < args.workers and time.monotonic() - begun < 3600 * args.hours:
                run = next(left, None)
                if run is None:
                    break
                tasks[run.task].warm_start(CACHE)  # made here where it is missing, so that workers only read it
                started = {
                    **named(run),
                    "event": "started",
                    "commit": code,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                }
                append(args.results, [{**started, **asdict(settings[run.task])}])
                job = tasks[run.task], methods[run.method], run.seed, asdict(settings[run.task])
                in_flight[pool.submit(execute, *job, log)] = run
            if not in_flight:
                return
            for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                run = in_flight.pop(future)
                try:
                    append(args.results, [{**named(run), **row} for row in future.result()])
                except BrokenProcessPool:
                    raise
                except Exception as error:  # one run that fails says something; the others go on
                    failed = {"event": "failed", "error": f"{type(error).__name__}: {error}"}
                    append(args.results, [{**named(run), **failed}])
                    progress.write(f"{run.method}, seed {run.seed}, failed: {failed['error']}")
                progress.update()
                progress.set_postfix_str(f"{run.method} {run.seed}")


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--report", action="store_true", help="print tables, draw pictures and write the page")
    arguments.add_argument("--hours", type=float, default=1e9, help="start no run after that time")
    arguments.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments.add_argument("--task", choices=list(TASKS), default="chain7", help="with --methods")
    arguments.add_argument("--methods", nargs="+", help="these runs in place of the planned ones")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0], help="with --methods")
    arguments.add_argument("--learning-rate", type=float, help="in place of the task's")
    arguments.add_argument("--updates", type=int, help="optimizer steps of a generation batch, in place of the task's")
    arguments.add_argument("--questions", type=int, help="of a generation batch, in place of the task's")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    args = arguments.parse_args()
    tasks, runs = dict(TASKS), planned()
    if args.quick:
        args.results = Path(tempfile.mkdtemp()) / "learning.jsonl"
        tasks = {"quick": QUICK}
        runs = [Run("quick", method, seed) for seed in (0, 1) for method in ("grpo_8", "confidence_once")]
    elif args.methods:
        runs = [Run(args.task, method, seed) for seed in args.seeds for method in args.methods]
    if not args.report:
        settings = {"quick": Setting(budget=6_000, learning_rate=1e-3, checkpoints=3), **SETTINGS}
        changed = {name: getattr(args, name) for name in ("learning_rate", "updates", "questions")}
        changed = {name: value for name, value in changed.items() if value is not None}
        work(runs, {name: replace(setting, **changed) for name, setting in settings.items()}, args, tasks)
    results = learning_tables.load(args.results)
    if args.report:
        from benchmarks import learning_report  # draws, which runs need not

        learning_report.write(results)
    rows = learning_tables.tables(results)
    common.report("Held-out accuracy of runs that are done", rows, args)
    if args.json is not None:  # a row for each checkpoint, in place of the table
        checkpoints = [row for done in results.complete.values() for row in done]
        args.json.write_text(json.dumps(checkpoints, indent=1) + "\n")


if __name__ == "__main__":
    main()
