"""What a trainer says of its trees beside the metrics: what it does, warnings, the table of completions, the bar."""

import textwrap
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from ..grown_tree import GrownTree
from .completions_table import COLUMNS, columns_of, mark_steps
from .environments import rung_of
from .generation_checks import OWN_STOPS
from .progress import show_trees
from .rewards import RewardScorer
from .step_check import FEW, describe_missing_steps
from .success import Success, SuccessWatch, describe_scaling, describe_unknown

logger = logging.get_logger(__name__)

_WAYS = {
    "snapshot": "from a snapshot",
    "deepcopy": "as a copy",
    "replay": "by executing the actions of its prefix again",
}


class TreeReports:
    """For a `GRPOTrainer` with an `IBTPOConfig`."""

    _success: Success
    _success_steers: bool  # whether success decides where trees branch, or what their steps are worth
    _grown: list[GrownTree]  # of the generation batch being made; none in evaluation
    _all_sizes: list[int]  # leaves of each of its trees, over all processes

    def _start_reports(self) -> None:
        self._success_watch = SuccessWatch()
        self._said: set[str] = set()  # what was warned of, of warnings that are given once
        self._trees_in_log = 0  # trees, over all processes, that the log step being written covers
        show_trees(self.callback_handler, lambda: self._trees_in_log)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        batches = len(self._metrics["train"].get("tree/effective_rate", ())) if self.model.training else 0
        self._trees_in_log = batches * self.args.generation_batch_size // self.num_generations
        super().log(logs, start_time)

    # ----- the line before it starts ---------------------------------------------------------------------------------

    def _describe(self) -> str:
        args = self.args
        if args.branching == "independent":
            shape = f"{self.num_generations} independent completions per question"
        else:
            shape = (
                f"trees of {args.growth_settings.leaves} trajectories per question (B0={args.tree_initial_rollouts}, "
                f"L={args.tree_levels}, K={args.tree_nodes_per_level}, B={args.tree_branches_per_node}), "
                f"branching '{self._branching}'"
            )
        trees = args.per_device_train_batch_size * args.steps_per_generation // self.num_generations
        if args.path_filter is not None:
            shape += f", of which {self.num_generations} are kept (by '{args.path_filter}')"
        if args.adaptive_budget is not None:
            shape += (
                f", on average: from {args.tree_initial_rollouts} on, a question stops when it has "
                f"{args.adaptive_budget} right and {args.adaptive_budget} wrong answers and leaves the rest to others"
            )
        engine = f"vLLM, {self.vllm_mode} mode" if self.use_vllm else "transformers (`use_vllm` is off)"
        return (
            f"IB-TPO: {shape}, {trees} per process and generation; advantage '{self._advantage_name}' "
            f"(ib_coef={args.ib_coef}, ib_beta={args.ib_beta}); success from {self._success}; engine: {engine}; "
            f"forward: {self._forward_in_words()}{self._describe_tools()}."
        )

    def _describe_tools(self) -> str:
        if not self.tools:
            return ""
        names = ", ".join(dict.fromkeys(tool.__name__ for tool in self.tools))
        ways = {
            type(pool[0]).__name__: _WAYS[rung_of(pool[0], self.args.environment_branching)]
            for pool in getattr(self, "_environment_pool", {}).values()
            if pool
        }
        environments = "".join(f"; a branch gets the environment {name} {way}" for name, way in ways.items())
        return f"; tools: {names}{environments}"

    # ----- warnings --------------------------------------------------------------------------------------------------

    def _warn_once(self, message: str | None, about: str) -> None:
        """Warn on the main process, unless there is nothing to say or it was said before."""
        if message is not None and about not in self._said and self.accelerator.is_main_process:
            self._said.add(about)
            logger.warning(message)

    def _look_for_steps(self, grown: list[GrownTree]) -> None:
        """Warn, once, where there is nothing to branch."""
        if not self.args.branches or "steps" in self._said:
            return
        leaves = [(each.tree, leaf) for each in grown for leaf in range(len(each.tree.leaves))]
        with_steps = sum(len(tree.path(tree.leaves[leaf])) > 1 for tree, leaf in leaves)
        if with_steps <= FEW * len(leaves):
            texts = self._tokenizer.batch_decode(
                [tree.trajectory(leaf)[0] for tree, leaf in leaves], skip_special_tokens=True
            )
            self._warn_once(describe_missing_steps(texts, with_steps, self.args.step_delimiters), about="steps")

    def _say_scaling(self, rewards_LF: np.ndarray) -> None:
        """Warn, once, how success is made of rewards outside [0, 1], where it matters."""
        if self._success_steers and self._success.scales and "scaling" not in self._said:
            message = describe_scaling(self._success.source, self._success.values(rewards_LF))
            self._warn_once(message, about="scaling")

    def _look_at_rewards(self, rewards_LF: np.ndarray, prompts: list) -> None:
        """Warn, once each, of rewards that cannot teach what they should; `(L, F)` over all processes."""
        unrewarded = np.isnan(rewards_LF).all(axis=1)
        if unrewarded.any():
            self._warn_once(
                f"All reward functions returned None (or NaN) for {unrewarded.sum()} of {len(rewards_LF)} completions "
                "of this batch, which teach nothing. A prompt of this batch: "
                f"{textwrap.shorten(repr(prompts[0]), 120)}. Said once.",
                about="no reward",
            )
        self._say_scaling(rewards_LF)
        if self._success_steers:
            message = self._success_watch.add(self._success, rewards_LF, self._all_sizes)
            self._warn_once(message, about="constant success")
            if "unknown success" not in self._said:
                message = describe_unknown(self._success, rewards_LF, self._all_sizes)
                self._warn_once(message, about="unknown success")

    # ----- the table of completions, and lengths ---------------------------------------------------------------------

    def _log_completion_extra(self, column: str, values: list) -> None:
        """What reward functions log; their cells would be mixed with those of a column of the same name."""
        if column in COLUMNS and self.args.log_completions:
            raise ValueError(
                f"A reward function called log_extra('{column}', ...), but the table of completions has a column of "
                f"that name ({', '.join(COLUMNS)} say where a completion is in its tree). Give another name."
            )
        super()._log_completion_extra(column, values)

    def _log_tree_columns(self, count: int) -> None:
        """What the completions table says about trees; nothing in evaluation, where the same table is filled."""
        if not self.args.log_completions:
            return
        columns = {}
        if self.model.training:
            columns = columns_of(self._grown, first_tree=self.accelerator.process_index * len(self._grown))
        for column in COLUMNS:  # the advantages of steps come later
            super()._log_completion_extra(column, columns.get(column, [None] * count))

    def _recount_clipped(self, completion_ids: list[list[int]]) -> None:
        """TRL takes a completion without a stop token for cut; one that a stop text of the user's ended is whole."""
        if not OWN_STOPS & (self.args.generation_kwargs or {}).keys():
            return
        budgets = [each.settings.max_completion_length for each in self._grown for _ in each.tree.leaves]
        budgets = budgets or [self.max_completion_length] * len(completion_ids)
        cut = [
            len(ids) >= budget and ids[-1] not in self.eos_token_ids
            for ids, budget in zip(completion_ids, budgets, strict=True)
        ]
        # As TRL's other lengths: without observations, which nobody sampled. In evaluation no tree knows them.
        sampled = [each.tree.sampled(leaf).sum() for each in self._grown for leaf in range(len(each.tree.leaves))]
        lengths = torch.tensor(sampled or [len(ids) for ids in completion_ids], dtype=torch.float32)
        both = torch.stack([lengths, torch.tensor(cut, dtype=torch.float32)]).T.to(self.accelerator.device)
        lengths, cut = self.accelerator.gather(both).T
        whole = lengths[cut == 0] if (cut == 0).any() else torch.zeros(1)
        figures = {"clipped_ratio": cut.mean(), "mean_terminated_length": whole.mean()}
        figures |= {"min_terminated_length": whole.min(), "max_terminated_length": whole.max()}
        for name, value in figures.items():
            self._metrics["train" if self.model.training else "eval"][f"completions/{name}"][-1] = value.item()

    def _log_timeouts(self, scorer: RewardScorer) -> None:
        """Completions that each function left unscored, over all processes; a collective call where a limit is set."""
        if self.args.reward_timeout is None:
            return
        local = torch.tensor(scorer.timed_out.sum(axis=0), dtype=torch.float32, device=self.accelerator.device)
        mode = "train" if self.model.training else "eval"
        counts = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, func, count in zip(self.reward_func_names, self.reward_funcs, counts, strict=True):
            if not isinstance(func, torch.nn.Module):
                self._metrics[mode][f"rewards/{name}/timeouts"].append(count)

    def _rewrite_logged_advantages(self, per_token: np.ndarray) -> None:
        """The completions table shows the mean over the tokens of a trajectory, and the advantage of every step."""
        sampled = [grown.tree.sampled(leaf) for grown in self._grown for leaf in range(len(grown.tree.leaves))]
        means = gather_object(
            [float(row[: len(mask)][mask].mean()) for row, mask in zip(per_token, sampled, strict=True)]
        )
        for _ in means:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(means)
        if self.args.log_completions:
            decode = partial(self._tokenizer.decode, skip_special_tokens=True)
            places = [(grown, leaf) for grown in self._grown for leaf in range(len(grown.tree.leaves))]
            marked = gather_object(
                [mark_steps(*place, row, decode) for place, row in zip(places, per_token, strict=True)]
            )
            column = self._logs["extra"]["step_advantages"]
            for _ in marked:
                column.pop()
            column.extend(marked)
