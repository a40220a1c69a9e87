"""Trees of a training run, written while it trains: `output_dir/trees/`.

`TreeLog` is what `IBTPOConfig.log_trees` turns on. `TreeRecorder` does the same for TRL's own `GRPOTrainer`, whose
groups are flat:

    trainer = GRPOTrainer(...)
    trainer.add_callback(TreeRecorder(trainer, every=10))
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging

from ..advantages import ADVANTAGES, TokenAdvantages
from ..branching import STRATEGIES, uses_rewards
from ..grown_tree import GrownTree
from .library import METRICS
from .records import Record, dump_record, record_group, record_tree
from .trackers import show_in_trackers

logger = logging.get_logger(__name__)

SAMPLING = ("temperature", "top_p", "top_k")  # fields of the config that a record keeps as well


class TreeLog(TrainerCallback):
    """Writes trees and logs of a run, by the main process.

    Args:
        trainer: whose trees.
        every: the trees of the first training step and of every so many are recorded, in a file named after the step
            in which they were grown; 0: none.
        count: trees of a generation batch that are recorded, the first ones of the main process.
    """

    def __init__(self, trainer: Any, every: int, count: int = 4):
        self.trainer, self.every, self.count = trainer, every, count
        self.folder = Path(trainer.args.output_dir) / "trees"
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._decode = tokenizer.decode
        self._decode_token = lru_cache(1 << 16)(lambda token_id: tokenizer.decode([token_id]))

    def wants(self, step: int, covered: int = 1) -> bool:
        """Whether trees of this training step and the next ones, `covered` in all, are recorded here; from 1."""
        wanted = self.every > 0 and (step == 1 or (step + covered - 1) // self.every > (step - 1) // self.every)
        return wanted and self.trainer.accelerator.is_main_process

    def record(
        self,
        grown: Sequence[GrownTree],
        advantages: Sequence[TokenAdvantages],
        prompts: Sequence[Any],
        rewards: np.ndarray,
        batch: int = 0,
    ) -> None:
        """Write the first trees of a generation batch.

        Args:
            grown, advantages: of each tree.
            prompts: of each trajectory, equal ones of a tree after each other.
            rewards: of each trajectory by each reward function, `(B, F)`.
            batch: which generation batch of its training step it is.
        """
        trainer = self.trainer
        step = trainer.state.global_step + 1
        # Trees are grown once for so many training steps; a wanted one may be any of them.
        micro_steps = trainer.args.steps_per_generation * trainer.num_iterations
        if not self.wants(step, covered=math.ceil(micro_steps / trainer.args.gradient_accumulation_steps)):
            return
        starts = np.cumsum([0, *[len(each.tree.leaves) for each in grown]])
        ends = {trainer._tokenizer.eos_token_id, *_as_list(trainer.model.generation_config.eos_token_id)}
        records = [
            record_tree(
                each,
                self._decode,
                question=prompts[start],
                step=step,
                rewards={name: rewards[start:stop, column] for column, name in enumerate(trainer.reward_func_names)},
                advantages=found,
                method=self._method(),
                end_ids=ends,
                decode_token=self._decode_token,
            )
            for each, found, (start, stop) in zip(grown[: self.count], advantages, pairwise(starts), strict=False)
        ]
        self.write(records, step, batch)

    def _method(self) -> dict[str, Any]:
        args, strategy, advantage = self.trainer.args, self.trainer._strategy, self.trainer._advantage
        method = {**asdict(args.credit_settings), **{name: getattr(args, name) for name in SAMPLING}}
        # Functions of a user's own have a name instead of the config's.
        if strategy is not None and STRATEGIES[args.branching] not in (strategy, type(strategy)):
            method["branching"] = getattr(strategy, "__name__", type(strategy).__name__)
        if advantage is not ADVANTAGES[args.advantage]:
            method["advantage"] = getattr(advantage, "__name__", type(advantage).__name__)
        return {**method, "success_reward": str(self.trainer._success), "uses_rewards": uses_rewards(strategy)}

    def write(self, records: Sequence[Record], step: int, batch: int = 0) -> None:
        """All records or none: a file has its name only when it is complete."""
        name = f"step-{step:06d}-{batch}.jsonl" if batch else f"step-{step:06d}.jsonl"
        part = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text("".join(dump_record(record) + "\n" for record in records), encoding="ascii")
            os.replace(part, self.folder / name)
        except OSError as error:  # a full disk: the run is worth more than its pictures
            logger.warning_once(f"Trees are not recorded in '{self.folder}': {error}. Training goes on. Said once.")
            with suppress(OSError):
                part.unlink()
            return
        try:
            show_in_trackers(self.trainer, records[0], step)
        except Exception as error:  # of a tracker, its network or the drawing
            logger.warning_once(
                f"Trees are not shown in the trackers of `report_to`: {type(error).__name__}: {error}. Training goes "
                f"on, and they are recorded in '{self.folder}'. Said once."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """A run that starts anew leaves an earlier one's trees in a folder beside its own."""
        if state.is_world_process_zero and state.global_step == 0 and self.every and self.folder.is_dir():
            number = 1
            while self.folder.with_name(f"trees-{number}").exists():
                number += 1
            self.folder.rename(self.folder.with_name(f"trees-{number}"))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Curves are drawn from these; transformers saves its own with checkpoints only."""
        if not state.is_world_process_zero or not self.every or not logs:
            return
        line = {key: value for key, value in logs.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / METRICS).open("a", encoding="ascii") as file:
                file.write(json.dumps({"step": state.global_step, **line}) + "\n")
        except OSError as error:
            logger.warning_once(f"Logs are not recorded in '{self.folder}': {error}. Training goes on. Said once.")


class TreeRecorder(TreeLog):
    """The same for a `GRPOTrainer`: its groups as trees of depth one, without log-probabilities.

    TRL keeps the prompts, completions, rewards and advantages of the last generation batch to log them; these are read
    when a training step ends.

    Args:
        trainer: the `GRPOTrainer` that the callback is added to.
        every: see `TreeLog`.
        count: groups of a generation batch.
    """

    def __init__(self, trainer: Any, every: int = 10, count: int = 4):
        super().__init__(trainer, every, count)
        self._evaluated = 0  # training steps done at the last evaluation
        logs = getattr(trainer, "_logs", None)
        if not isinstance(logs, dict) or not {"prompt", "completion", "rewards", "advantages"} <= set(logs):
            raise TypeError(
                f"{type(trainer).__name__} keeps no completions to record. TreeRecorder works with TRL 1.16's "
                "GRPOTrainer; IBTPOTrainer records trees with `log_trees`."
            )

    def on_evaluate(self, args, state, control, **kwargs):
        """From now on TRL's logs hold rows of the evaluation, until the next ones are generated for training."""
        self._evaluated = self.trainer._step

    def on_step_end(self, args, state, control, **kwargs):
        every = args.steps_per_generation * self.trainer.num_iterations
        generated = (self.trainer._step - 1) // every * every
        if not self.wants(state.global_step) or generated < self._evaluated:
            return
        logs, group = self.trainer._logs, self.trainer.num_generations
        prompts, completions = list(logs["prompt"]), list(logs["completion"])
        rewards = {name: list(values) for name, values in logs["rewards"].items()}
        advantages = list(logs["advantages"])
        records = [
            record_group(
                completions[start : start + group],
                question=prompts[start],
                rewards={name: values[start : start + group] for name, values in rewards.items()},
                advantages=advantages[start : start + group],
                step=state.global_step,
                count_tokens=lambda text: len(self.trainer._tokenizer(text, add_special_tokens=False)["input_ids"]),
                method={"advantage": "grpo", "temperature": args.temperature},
            )
            for start in range(0, min(len(prompts), self.count * group), group)
        ]
        if records:
            self.write(records, state.global_step)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
