"""Whether trees over turns learn a calculator task better than TRL's GRPO, from as many generated tokens.

    python -m benchmarks.agents_learning [--quick] [--seeds 0 1 2 3 4] [--results FILE] [--json FILE]

Task and model are those of `benchmarks.agents_task`. Runs of one seed start from the same weights, see the same
questions in the same order and stop at the same number of generated tokens; observations are not generated. Every run
appends a line to the results when it starts, and one for each evaluation when it is done. Runs that are done are kept.
The plan is benchmarks/agents_plan.md.
"""

import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import agents_task, common
from benchmarks.estimates import Estimate
from benchmarks.learning_run import COMPARED, PLAIN
from benchmarks.sampling import QuickQwen3
from trl_ibtpo import IBTPOConfig, IBTPOTrainer

RESULTS = Path(__file__).parent / "results" / "agents.jsonl"
CACHE = Path("outputs/warm_starts/agents")
OPERATIONS = 2  # of a chain
QUESTIONS, UPDATES = 16, 2  # of a generation batch, and its optimizer steps
TREE = {
    "branching": "confidence",
    "allow_repeated_branching": False,
    "ib_coef": 0.0,
    "packed_forward": False,
}
METHODS = {
    "grpo_8": None,
    "confidence_once": {**TREE, "shared_token_weight": "once"},
    "confidence_sampled": {**TREE, "shared_token_weight": "sampled"},
}


def make_trainer(warm: Path, method: str, seed: int, budget: int, learning_rate: float) -> GRPOTrainer:
    tree = METHODS[method]
    group = 8 if tree is None else 12
    arguments = {
        **PLAIN,
        **COMPARED,
        "output_dir": tempfile.mkdtemp(),
        "seed": seed,
        "per_device_train_batch_size": QUESTIONS * group // UPDATES,
        "steps_per_generation": UPDATES,
        "gradient_accumulation_steps": 1,
        "learning_rate": learning_rate,
        "max_completion_length": agents_task.MAX_LENGTH,
        "max_tool_calling_iterations": 6,
        "num_generations_eval": 2,
        "per_device_eval_batch_size": 192,
    }
    trainer_class, args = (
        (GRPOTrainer, GRPOConfig(num_generations=group, **arguments))
        if tree is None
        else (IBTPOTrainer, IBTPOConfig(**arguments, **tree))
    )
    trainer = trainer_class(
        QuickQwen3.from_pretrained(warm, dtype=torch.float32),
        agents_task.right_answer,
        args,
        agents_task.rows(budget // 50, seed, OPERATIONS),  # more than any method gets to
        agents_task.rows(96, -2, OPERATIONS),
        processing_class=AutoTokenizer.from_pretrained(warm),
        tools=[agents_task.calculate],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Evaluations(TrainerCallback):
    """Counts generated tokens, and evaluates at the start and where they pass a multiple of a share of the budget."""

    def __init__(self, trainer: GRPOTrainer, budget: int, count: int = 5):
        self._trainer, self._budget, self._share = trainer, budget, budget / count
        self._generated, self.rows = 0, []
        self._begun, self._paused = time.process_time(), 0.0
        self._generate = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self._counted

    def _counted(self, inputs):
        output = self._generate(inputs)
        if self._trainer.model.training:
            shared = self._trainer._metrics["train"].get("tree/generated_tokens")  # per question, prefixes once
            sampled = (output["completion_mask"] * output["tool_mask"]).sum()
            self._generated += int(sampled) if shared is None else round(shared[-1] * QUESTIONS)
        return output

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluate()

    def on_step_end(self, args, state, control, **kwargs):
        if self._generated // self._share > self.rows[-1]["generated_tokens"] // self._share:
            self._evaluate()
        control.should_training_stop = self._generated >= self._budget
        return control

    def _evaluate(self):
        begin = time.process_time()
        found = self._trainer.evaluate()
        row = {"generated_tokens": self._generated, "cpu_seconds": begin - self._begun - self._paused}
        row |= {"accuracy": found["eval_reward"], "calls": found["eval_tools/call_frequency"]}
        self.rows.append(row)
        self._paused += time.process_time() - begin


def run(warm: Path, method: str, seed: int, budget: int, learning_rate: float) -> list[dict]:
    """Train, and return a flat row for each evaluation; the run's `final` and `area` are in all of them."""
    trainer = make_trainer(warm, method, seed, budget, learning_rate)
    evaluations = Evaluations(trainer, budget)
    trainer.add_callback(evaluations)
    trainer.train()
    rows = evaluations.rows
    curve = np.interp(
        np.linspace(0, budget, 201), [row["generated_tokens"] for row in rows], [row["accuracy"] for row in rows]
    )
    summary = {"final": rows[-1]["accuracy"], "area": float(curve.mean())}
    return [{"method": method, "seed": seed, "learning_rate": learning_rate, **row, **summary} for row in rows]


def load(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(results: Path, rows: list[dict]) -> None:
    with results.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def table(rows: list[dict]) -> list[dict]:
    """Means over seeds, and the paired difference to GRPO, with Student's 95% intervals, in points."""
    started = [row for row in rows if row.get("event") == "started"]
    done = {(row["method"], row["seed"]): row for row in rows if "event" not in row}
    lines = []
    for measure in ("area", "final"):
        for method in METHODS:
            values = {seed: row[measure] for (name, seed), row in done.items() if name == method}
            base = {seed: row[measure] for (name, seed), row in done.items() if name == "grpo_8"}
            pairs = [values[seed] - base[seed] for seed in values if seed in base]
            lines.append(
                {
                    "measure": measure,
                    "method": method,
                    "started": sum(row["method"] == method for row in started),
                    "done": len(values),
                    "points": Estimate.of(list(values.values())).text(),
                    "to GRPO, paired": "" if method == "grpo_8" else Estimate.of(pairs).text(sign=True),
                }
            )
    return lines


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments.add_argument("--budget", type=int, default=20_000, help="generated tokens of a run")
    arguments.add_argument("--learning-rate", type=float, default=3e-4)
    arguments.add_argument("--warm-start", type=Path, default=CACHE, help="made there where it is missing")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    warm_steps = 300
    if args.quick:
        args.seeds, args.budget, warm_steps = [0], 3_000, 2
        args.results, args.warm_start = Path(tempfile.mkdtemp()) / "agents.jsonl", Path(tempfile.mkdtemp())
    args.results.parent.mkdir(parents=True, exist_ok=True)
    warm = agents_task.warm_start(args.warm_start, warm_steps, operations=OPERATIONS)
    runs = [(method, seed) for seed in args.seeds for method in args.methods]  # every prefix of it has pairs
    for method, seed in tqdm(runs, unit="run"):
        if any(row["method"] == method and row["seed"] == seed and "event" not in row for row in load(args.results)):
            continue
        start = {"event": "started", "method": method, "seed": seed, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        append(args.results, [{**start, "budget": args.budget, "learning_rate": args.learning_rate}])
        append(args.results, run(warm, method, seed, args.budget, args.learning_rate))
    common.report("Held-out accuracy of runs that are done", table(load(args.results)), args)


if __name__ == "__main__":
    main()
