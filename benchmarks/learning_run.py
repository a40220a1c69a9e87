"""One run of `benchmarks.learning`: a method, a task and a seed, with TRL's GRPOTrainer or this package's trainer.

Runs of one seed start from the same weights, see the same questions in the same order and stop at the same number of
generated tokens. The settings below are those of every method; `METHODS` has what differs.
"""

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.sampling import QuickQwen3
from benchmarks.tasks import PLAIN, Chain, RightSolutions, sampled_accuracy
from trl_ibtpo import IBTPOConfig, IBTPOTrainer

# Shapes of trees: B0, L, K, B.
PAPER = (4, 9, 1, 1)
# Each step is forked once and the choice looks at no reward, so that `sampled` has the gradient of the policy.
CONFIDENCE = {"branching": "confidence", "allow_repeated_branching": False, "ib_coef": 0.0}
RANDOM = {"branching": "random", "allow_repeated_branching": False, "ib_coef": 0.0}


@dataclass(frozen=True)
class Method:
    """Where a method differs from the settings that all share."""

    group: int = 0  # completions of a question in TRL's GRPOTrainer; 0: a tree of this package
    shape: tuple[int, int, int, int] = PAPER
    learning_rate: float = 1.0  # factor
    settings: dict[str, Any] | None = None


METHODS = {
    "grpo_8": Method(group=8),
    "grpo_12": Method(group=12),
    "confidence": Method(settings=CONFIDENCE),
    "confidence_once": Method(settings={**CONFIDENCE, "shared_token_weight": "once"}),
    "confidence_sampled": Method(settings={**CONFIDENCE, "shared_token_weight": "sampled"}),
    "ib_no_local": Method(settings={"ib_coef": 0.0}),
    "ibtpo": Method(settings={}),
    "ib_once": Method(settings={"ib_coef": 0.0, "shared_token_weight": "once"}),
    "random": Method(settings=RANDOM),
    "random_once": Method(settings={**RANDOM, "shared_token_weight": "once"}),
    "random_sampled": Method(settings={**RANDOM, "shared_token_weight": "sampled"}),
    "ibtpo_lookahead_3": Method(settings={"branch_lookahead": 3}),
    "ib_no_local_lookahead_3": Method(settings={"ib_coef": 0.0, "branch_lookahead": 3}),
    "ibtpo_2_3_1_5": Method(shape=(2, 3, 1, 5), settings={}),
    "ibtpo_4_3_1_4": Method(shape=(4, 3, 1, 4), settings={}),
    "grpo_8_top_entropy": Method(group=8, settings={"top_entropy_quantile": 0.2}),
    "confidence_top_entropy": Method(settings={**CONFIDENCE, "top_entropy_quantile": 0.2}),
    "grpo_8_rate_0.7": Method(group=8, learning_rate=0.7),
    "grpo_8_rate_1.4": Method(group=8, learning_rate=1.4),
}


@dataclass(frozen=True)
class Setting:
    """How long and how fast a task is trained."""

    budget: int  # generated tokens
    learning_rate: float
    questions: int = 32  # of a generation batch
    updates: int = 2  # optimizer steps of a generation batch
    checkpoints: int = 10


SETTINGS = {
    "chain7": Setting(budget=240_000, learning_rate=4e-4),
    "chain10": Setting(budget=360_000, learning_rate=4e-4),
    "chain8": Setting(budget=180_000, learning_rate=4e-4),
    "chain12": Setting(budget=900_000, learning_rate=5e-4),
}

GROUPS_PER_MICRO_BATCH = 8


def make_trainer(task: Chain, method: Method, seed: int, setting: Setting, warm: Path) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(warm)
    rows = task.questions(setting.budget // 100, seed)  # more than any method gets to
    micro_batches = setting.updates * math.ceil(setting.questions / setting.updates / GROUPS_PER_MICRO_BATCH)
    b0, levels, nodes, branches = method.shape
    group = method.group or b0 + (levels - 1) * nodes * branches
    arguments = {
        **PLAIN,
        "output_dir": tempfile.gettempdir(),
        "seed": seed,
        "per_device_train_batch_size": setting.questions // micro_batches * group,
        "steps_per_generation": micro_batches,
        "gradient_accumulation_steps": micro_batches // setting.updates,
        "max_steps": 100_000,  # the budget ends a run
        "learning_rate": setting.learning_rate * method.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "max_completion_length": task.max_completion_length,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "loss_type": "grpo",
        "shuffle_dataset": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        **(method.settings or {}),
    }
    if method.group:
        trainer_class, args = GRPOTrainer, GRPOConfig(num_generations=group, **arguments)
    else:
        tree = {
            "tree_initial_rollouts": b0,
            "tree_levels": levels,
            "tree_nodes_per_level": nodes,
            "tree_branches_per_node": branches,
        }
        # The same gradient as with shared prefixes, and at this size less work for a CPU.
        trainer_class, args = IBTPOTrainer, IBTPOConfig(**{"packed_forward": False, **tree, **arguments})
    trainer = trainer_class(
        model=QuickQwen3.from_pretrained(warm, dtype=torch.float32),
        reward_funcs=task.reward,
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in ("prompt", "solution")} for row in rows]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Checkpoints(TrainerCallback):
    """Counts what a run costs, and evaluates where it passes a multiple of a share of its budget."""

    LOGGED = ("entropy", "tree/effective_rate", "ib/covariance", "ib/confidence", "grad_norm")

    def __init__(self, task: Chain, method: Method, setting: Setting, trainer: GRPOTrainer):
        self._evaluation = RightSolutions(task, trainer.processing_class)
        self._method, self._setting, self._trainer = method, setting, trainer
        self._prompt_tokens = len(trainer.processing_class.encode(task.questions(1, 0)[0]["prompt"]))
        self._spent = {"generated_tokens": 0, "row_tokens": 0, "trained_tokens": 0}
        self._paused = (0.0, 0.0)  # wall clock and CPU time of evaluations, which no run is charged
        self._logs: dict[str, list[float]] = {}
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter(), time.process_time()
        self._evaluate(0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "completions/mean_length" not in logs:
            return  # the second optimizer step of a generation batch, or the summary at the end
        questions, group = self._setting.questions, args.num_generations
        row_tokens = (
            round(logs["completions/mean_length"] * questions * group) + questions * group * self._prompt_tokens
        )
        generated = row_tokens - questions * group * self._prompt_tokens
        if not self._method.group:
            generated = round(logs["tree/generated_tokens"] * questions)
        shared = row_tokens if self._method.group else generated + questions * self._prompt_tokens
        spent = {"generated_tokens": generated, "row_tokens": row_tokens, "trained_tokens": shared}
        self._spent = {name: self._spent[name] + spent[name] for name in spent}
        if self._method.group:
            logs = {**logs, "tree/effective_rate": 1 - logs["frac_reward_zero_std"]}
        for name in self.LOGGED:
            if name in logs:
                self._logs.setdefault(name, []).append(float(logs[name]))
        share = self._setting.budget / self._setting.checkpoints
        if self._spent["generated_tokens"] // share > self.rows[-1]["generated_tokens"] // share:
            self._evaluate(state.global_step)
        if self._spent["generated_tokens"] >= self._setting.budget:
            control.should_training_stop = True

    def _evaluate(self, step: int) -> None:
        now = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = (
            each - begun - paused for each, begun, paused in zip(now, self._begun, self._paused, strict=True)
        )
        row = {**self._spent, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "steps": step}
        row["accuracy"] = round(self._evaluation.probability(self._trainer.model), 5)
        # Means since the last checkpoint; what was not measured is missing.
        row.update({name.split("/")[-1]: round(float(np.mean(values)), 5) for name, values in self._logs.items()})
        self._logs = {}
        self.rows.append(row)
        later = time.perf_counter(), time.process_time()
        self._paused = tuple(paused + end - start for paused, end, start in zip(self._paused, later, now, strict=True))


def run(
    task: Chain, method_name: str, seed: int, setting: Setting, cache: Path, log: Path | None = None
) -> list[dict]:
    """Train, and return a flat row for each checkpoint; the run's `final` and `area` are in all of them."""
    torch.set_num_threads(1)
    method = METHODS[method_name]
    with contextlib.ExitStack() as stack:
        if log is not None:
            stream = stack.enter_context(log.open("a"))
            stack.enter_context(contextlib.redirect_stdout(stream))
            stack.enter_context(contextlib.redirect_stderr(stream))
        trainer = make_trainer(task, method, seed, setting, task.warm_start(cache))
        checkpoints = Checkpoints(task, method, setting, trainer)
        trainer.add_callback(checkpoints)
        trainer.train()
        sampled, _ = sampled_accuracy(task, trainer.model, trainer.processing_class)
    rows = checkpoints.rows
    summary = {"final": final(rows, setting.budget), "area": area(rows, setting.budget), "sampled_accuracy": sampled}
    named = {"task": task.name, "method": method_name, "seed": seed}
    return [{**named, **row, **summary} for row in rows]


def curve(rows: list[dict], at: np.ndarray, over: str = "generated_tokens") -> np.ndarray:
    """Accuracy of one run at the given costs, on straight lines between its checkpoints."""
    return np.interp(at, [row[over] for row in rows], [row["accuracy"] for row in rows])


def final(rows: list[dict], budget: int) -> float:
    """Mean accuracy over the last fifth of the budget."""
    return round(float(curve(rows, np.linspace(0.8 * budget, budget, 41)).mean()), 5)


def area(rows: list[dict], budget: int) -> float:
    """Mean accuracy over the whole budget: the area under the learning curve."""
    return round(float(curve(rows, np.linspace(0, budget, 201)).mean()), 5)
