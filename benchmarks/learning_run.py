"""One run of `benchmarks.learning`: a method, a task and a seed, with TRL's GRPOTrainer or this package's trainer.

Runs of one seed start from the same weights, see the same questions in the same order and stop at the same number of
generated tokens. The settings below are those of every method; `learning_methods.METHODS` has what differs.
"""

import contextlib
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.facts import FactTask, RightSolutions, sampled_accuracy
from benchmarks.learning_methods import Method, Setting
from benchmarks.sampling import QuickQwen3
from trl_ibtpo import IBTPOConfig, IBTPOTrainer

# What all trainings share: one CPU, nothing saved, nothing reported.
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}

# What all methods of a comparison share.
COMPARED = {
    "max_steps": 100_000,  # the budget ends a run
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.99,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "beta": 0.0,
    "loss_type": "grpo",
    "shuffle_dataset": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}

SHAPE = ("tree_initial_rollouts", "tree_levels", "tree_nodes_per_level", "tree_branches_per_node")
GROUPS_PER_MICRO_BATCH = 8


def by_chance(completions, **kwargs) -> list[float]:
    """A reward that is 1 as often as answers are right at the start, whatever they are; the same for the same text."""
    return [float(random.Random(each).random() < 0.12) for each in completions]


def make_trainer(task: FactTask, method: Method, seed: int, setting: Setting, warm: Path) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(warm)
    rows = task.questions(setting.budget // 100, seed)  # more than any method gets to
    micro_batches = setting.updates * math.ceil(setting.questions / setting.updates / GROUPS_PER_MICRO_BATCH)
    group = method.leaves
    arguments = {
        **PLAIN,
        **COMPARED,
        "output_dir": tempfile.gettempdir(),
        "seed": seed,
        "per_device_train_batch_size": setting.questions // micro_batches * group,
        "steps_per_generation": micro_batches,
        "gradient_accumulation_steps": micro_batches // setting.updates,
        "learning_rate": setting.learning_rate * method.learning_rate,
        "max_completion_length": task.max_completion_length,
        **method.settings,
    }
    if method.group:
        trainer_class, args = GRPOTrainer, GRPOConfig(num_generations=group, **arguments)
    else:
        tree = dict(zip(SHAPE, method.shape, strict=True))
        # The same gradient as with shared prefixes, and at this size less work for a CPU.
        trainer_class, args = IBTPOTrainer, IBTPOConfig(**{"packed_forward": False, **tree, **arguments})
    # Latents act inside a model that generates as transformers does; the others sample the same with less work.
    model_class = Qwen3ForCausalLM if "latent_mode" in method.settings else QuickQwen3
    trainer = trainer_class(
        model=model_class.from_pretrained(warm, dtype=torch.float32),
        reward_funcs=by_chance if method.noise else task.reward,
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in ("prompt", *task.COLUMNS)} for row in rows]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Checkpoints(TrainerCallback):
    """Counts what a run costs, and evaluates where it passes a multiple of a share of its budget."""

    LOGGED = ("entropy", "tree/effective_rate", "ib/covariance", "ib/confidence", "grad_norm")

    def __init__(self, task: FactTask, method: Method, setting: Setting, trainer: GRPOTrainer):
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
        shared = generated + questions * self._prompt_tokens if self._method.shares_prefixes else row_tokens
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
    task: FactTask, method: Method, seed: int, setting: Setting, cache: Path, log: Path | None = None
) -> list[dict]:
    """Train, and return a flat row for each checkpoint; the run's `final` and `area` are in all of them."""
    torch.set_num_threads(1)
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
    return [{**row, **summary} for row in rows]


def curve(rows: list[dict], at: np.ndarray, over: str = "generated_tokens") -> np.ndarray:
    """Accuracy of one run at the given costs, on straight lines between its checkpoints."""
    return np.interp(at, [row[over] for row in rows], [row["accuracy"] for row in rows])


def final(rows: list[dict], budget: int) -> float:
    """Mean accuracy over the last fifth of the budget."""
    return round(float(curve(rows, np.linspace(0.8 * budget, budget, 41)).mean()), 5)


def area(rows: list[dict], budget: int) -> float:
    """Mean accuracy over the whole budget: the area under the learning curve."""
    return round(float(curve(rows, np.linspace(0, budget, 201)).mean()), 5)
