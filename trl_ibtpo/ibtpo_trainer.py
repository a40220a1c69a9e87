"""IBTPOTrainer: `GRPOTrainer` that grows trees and gives every step its own advantage.

A thin adapter. It hooks into TRL where completions are generated, scored and given advantages, calls `super()` for
everything else, and copies none of TRL's methods. What it mixes in keeps to one idea each: where trees come from
(`generation`), what is said of them (`reports`), the forward pass (`trainer_mixin`), checkpoints.
"""

import os
import textwrap
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name

from .advantages import ADVANTAGES, AdvantageFunction, GradedTree, TokenAdvantages, token_advantages, whiten
from .branching import Strategy, make_strategy, uses_entropies, uses_rewards
from .engines.vllm_cpu import CPUVLLMGeneration, runs_on_cpu
from .grown_tree import GrownTree
from .ibtpo_config import IBTPOConfig
from .prefix_sharing.trainer_mixin import PrefixSharedForward
from .steps import StepSplitter
from .training.checkpoints import WholeCheckpoints
from .training.checks import (
    check_advantage,
    check_forks,
    check_process_share,
    check_strategy,
    name_of,
    refuse_unsupported,
)
from .training.dataset_checks import NO_IMAGES, check_rows, first_row, refuse_columns
from .training.environments import check_environment
from .training.generation import Grown, TreeGeneration
from .training.generation_checks import refuse_sharded_growth
from .training.group_statistics import group_advantages
from .training.hooks import check_hooks
from .training.metrics import TreeMetrics, mean_per_question
from .training.model_card import complete_card, tree_to_show
from .training.model_checks import check_markers, check_template, check_tokenizer
from .training.regularization import IBRegularization
from .training.reports import TreeReports
from .training.reward_checks import resolve_reward_funcs
from .training.rewards import RewardScorer
from .training.step_check import describe_escapes
from .training.success import Success, SuccessFunction
from .training.time_limit import LimitedCalls
from .training.tools import ToolHost
from .viewing.recorder import TreeLog

logger = logging.get_logger(__name__)


class IBTPOTrainer(TreeGeneration, TreeReports, IBRegularization, PrefixSharedForward, WholeCheckpoints, GRPOTrainer):
    """
    Trainer for Information Bottleneck Tree-based Policy Optimization (IB-TPO), from the paper [Long Live The Balance:
    Information Bottleneck Driven Tree-based Policy
    Optimization](https://huggingface.co/papers/2605.28109).

    A drop-in for [`~trl.GRPOTrainer`]. Where GRPO samples G independent completions per question, this trainer grows
    one tree with G leaves: rollouts branch from the steps of highest IB-Score and share their prefix. Each step gets
    the advantage `A_GL + ib_coef * A_IB`; the loss, the reference model, logging, checkpoints and everything else are
    TRL's. Evaluation generates ordinary independent completions.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_ibtpo import IBTPOConfig, IBTPOTrainer

    >>> trainer = IBTPOTrainer(
    ...     model="Qwen/Qwen3-1.7B-Base",
    ...     reward_funcs=accuracy_reward,
    ...     args=IBTPOConfig(output_dir="Qwen3-1.7B-IBTPO"),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`~trl.GRPOTrainer`], with [`IBTPOConfig`] for `args`. `rollout_func` is not supported: it samples
            whole completions by itself. `reward_funcs` also takes the names of functions in `trl.rewards`.
        success_func:
            Says how right a completion is, in place of `success_reward`: gets its rewards as a dict from the names of
            the reward functions to numbers (`None` where there is none), and returns True or False, a number in
            [0, 1], or `None` where that is unknown. For example
            `lambda rewards: rewards["accuracy_reward"] == 1 and rewards["length_reward"] > 0.2`.
        advantage (`Callable`, *optional*):
            A function of your own in place of the one that `advantage` in `args` names; see docs/methods.md.
        branching:
            A strategy of your own in place of the one that [`IBTPOConfig`] names: a function that gives every step of
            a tree a priority, see [`branching.Strategy`].
    """

    _tag_names = ["trl", "ibtpo"]  # noqa: RUF012 - TRL's form
    _name = "IB-TPO"
    _paper = {  # noqa: RUF012 - TRL's form
        "title": "Long Live The Balance: Information Bottleneck Driven Tree-based Policy Optimization",
        "id": "2605.28109",
        "citation": textwrap.dedent("""\
            @inproceedings{ibtpo2026,
                title        = {{Long Live The Balance: Information Bottleneck Driven Tree-based Policy Optimization}},
                year         = 2026,
                booktitle    = {International Conference on Machine Learning (ICML)},
                eprint       = {arXiv:2605.28109},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: IBTPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        success_func: SuccessFunction | None = None,
        advantage: AdvantageFunction | None = None,
        branching: Strategy | None = None,
        **kwargs: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
            args = IBTPOConfig(f"{model_name.split('/')[-1]}-IBTPO")
        if not isinstance(args, IBTPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; IBTPOTrainer needs an IBTPOConfig, which takes the same fields."
            )
        check_advantage(advantage, args)
        self._advantage = ADVANTAGES[args.advantage] if advantage is None else advantage
        self._advantage_name = args.advantage if advantage is None else name_of(advantage)
        check_strategy(branching, args)
        self._strategy = make_strategy(args.branching) if branching is None else branching
        self._branching = args.branching if branching is None else name_of(branching)
        check_forks(self._strategy, args)
        check_hooks(GRPOTrainer)
        environments = kwargs.get("environment_factory") is not None  # which may have rewards of their own
        reward_funcs = resolve_reward_funcs(reward_funcs, optional=environments)
        if (message := describe_escapes(args.step_delimiters)) is not None:
            logger.warning(message)
        if not environments and not any(isinstance(func, (str, torch.nn.Module)) for func in reward_funcs):
            # Only to complain before a model is loaded: TRL has the last word on names.
            Success(list(map(get_callable_name, reward_funcs)), args.success_reward, args.success_range, success_func)
        refuse_unsupported(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, kwargs)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        check_tokenizer(self._tokenizer)
        check_markers(self._tokenizer, args)
        check_template(self.processing_class, first_row(train_dataset))
        for pool in getattr(self, "_environment_pool", {}).values():
            check_environment(pool[0], args.environment_branching)
        if self.use_vllm and self.vllm_mode == "colocate" and runs_on_cpu():
            self.vllm_generation = CPUVLLMGeneration.adopt(self.vllm_generation)
        measures = uses_entropies(self._strategy) and args.fork_entropy == "exact"
        forward = measures or args.path_filter == "pmi" or args.latent_mode == "psa" or args.latent_prior is not None
        refuse_sharded_growth(self._dist, args, self.reward_funcs, forward=forward)
        check_process_share(args, self.accelerator.num_processes)
        self._attach_latents()
        self._choose_forward()
        self._success = Success(self.reward_func_names, args.success_reward, args.success_range, success_func)
        self._success_steers = args.success_steers or (branching is not None and uses_rewards(branching))
        self._start_reports()
        self._splitter = StepSplitter(
            self._tokenizer, args.step_delimiter, args.step_min_tokens, args.step_max_tokens, args.step_noise
        )
        self._tree_inputs: list[dict[str, Any]] = []  # dataset rows of the generation batch being made
        self._grown: list[GrownTree] = []
        self._token_advantages: list[TokenAdvantages] = []
        self._scorer: RewardScorer | None = None
        self._host: ToolHost | None = None
        self._limited_calls = LimitedCalls(args.tool_timeout)  # those of tools and environments
        self._prompts: list = []  # of the generation batch being made, one per row
        self._all_rewards: torch.Tensor | None = None  # of all processes, as the next
        self._all_sizes: list[int] = []  # leaves of each tree
        self._shown_tree: tuple[GrownTree, int] | None = None  # and its training step, for the model card
        self._tree_log = TreeLog(self, args.log_trees, args.log_trees_count)
        self.add_callback(self._tree_log)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in TRL, except that `resume_from_checkpoint=True` is the last checkpoint that was written to the end."""
        self.accelerator.print(self._describe())
        self._last_batch = (-1, 0)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False  # also where the run ended with an error
            self._close_environments_between_runs()

    def evaluate(self, *args: Any, **kwargs: Any):
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._close_environments_between_runs()

    def predict(self, *args: Any, **kwargs: Any):
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._close_environments_between_runs()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        # A file or folder of this machine is no dataset of the Hub, which refuses a card that names one.
        local = isinstance(dataset_name, str) and os.path.exists(dataset_name)
        super().create_model_card(model_name, None if local else dataset_name, tags)
        if not self.is_world_process_zero():
            return
        try:
            complete_card(
                self.args.output_dir,
                self.args,
                self.state.log_history,
                self._shown_tree,
                success_reward=str(self._success).replace("'", ""),  # a cell needs no quotes
                branching=self._branching,
                advantage=self._advantage_name,
                adapter=is_peft_model(self.accelerator.unwrap_model(self.model)),
            )
        except Exception as error:  # a checkpoint is worth more than its card
            logger.warning(
                f"The model card in '{self.args.output_dir}' has no section about trees: writing it raised "
                f"{type(error).__name__}: {error}. The checkpoint is not affected.",
                exc_info=True,
            )

    # ----- hooks into TRL: generation, rewards, advantages -----------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            refuse_columns(inputs[0], "eval_dataset")
            return super()._generate_and_score_completions(inputs)
        check_rows(inputs, self.tools, self.environment_factories)
        self._tree_inputs = inputs
        try:
            if self.args.adaptive_budget is not None:
                inputs = self._grow_ahead(inputs)
            output = super()._generate_and_score_completions(inputs)
            if self.args.adaptive_budget is not None:
                output["advantages"] = self._advantages_in_groups(output["advantages"])
            self._set_step_advantages(output)
            device = output["advantages"].device
            output["tree"] = torch.arange(len(self._grown)).repeat_interleave(torch.tensor(self._sizes)).to(device)
            if hasattr(self._strategy, "learn"):
                found = [self._strategy.evidence(grown.tree, grown.scores) for grown in self._grown]
                self._strategy.learn([each for trees in gather_object(found) for each in trees])
            self._shown_tree = tree_to_show(self._grown), self.state.global_step + 1
            rewards, batch = self._scorer.rewards, self._last_batch[1]
            self._tree_log.record(self._grown, self._token_advantages, self._prompts, rewards, batch)
        finally:
            self._tree_inputs, self._grown, self._token_advantages, self._scorer = [], [], [], None
            self._host, self._prompts = None, []
        return output

    @property
    def _sizes(self) -> list[int]:
        """Leaves of each tree."""
        return [len(grown.tree.leaves) for grown in self._grown]

    def _grow_ahead(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Grow before TRL counts rows, and return as many of each question's, side by side, as it has leaves."""
        prompt_ids, images, _ = self._tokenize_prompts([row["prompt"] for row in inputs])
        if images is not None:
            raise ValueError(NO_IMAGES)
        self._grown, self._scorer, _ = self._grow(inputs, prompt_ids, self._next_batch())
        first_rows = inputs[:: self.num_generations]
        return [dict(row) for row, size in zip(first_rows, self._sizes, strict=True) for _ in range(size)]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not self._grows:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        if images is not None:
            raise ValueError(NO_IMAGES)
        if self._growing_alone:
            raise Grown(*self._grow(self._tree_inputs, prompt_ids)[:2])
        if not self._grown:
            self._grown, self._scorer, self._host = self._grow(self._tree_inputs, prompt_ids, self._next_batch())
        completion_ids, logprobs, masks = self._trajectories()
        # TRL decodes the first turn, and asks `_tool_call_loop` for what follows it.
        first_turns = [mask.index(0) if 0 in mask else len(mask) for mask in masks]
        return (
            [ids[:end] for ids, end in zip(completion_ids, first_turns, strict=True)],
            None if logprobs is None else [each[:end] for each, end in zip(logprobs, first_turns, strict=True)],
        )

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields):
        if not self._grows:
            return super()._tool_call_loop(
                prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields
            )
        completion_ids, logprobs, masks = self._trajectories()
        conversations = [self._host.conversations[row] for row in range(len(masks))]
        return (
            masks,
            [self._host.completion(row) for row in range(len(masks))],
            completion_ids,
            logprobs,
            sum(conversation.calls for conversation in conversations),
            sum(conversation.failures for conversation in conversations),
            [[] for _ in masks],
        )

    def _trajectories(self) -> tuple[list[list[int]], list[list[float]] | None, list[list[int]]]:
        """Token ids, log-probabilities and the mask of sampled tokens of every row, in TRL's form."""
        leaves = [(grown.tree, leaf) for grown in self._grown for leaf in range(len(grown.tree.leaves))]
        trajectories = [tree.trajectory(leaf) for tree, leaf in leaves]
        masks = [tree.sampled(leaf).astype(int).tolist() for tree, leaf in leaves]
        logprobs = None
        if self.use_vllm:  # as in TRL, to correct for its mismatch with the policy
            logprobs = [
                [value if sampled else 0.0 for value, sampled in zip(values, mask, strict=True)]
                for (_, values), mask in zip(trajectories, masks, strict=True)
            ]
        return [token_ids for token_ids, _ in trajectories], logprobs, masks

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        scorer = self._scorer
        self._recount_clipped(completion_ids_list)
        if not self.model.training:
            if self.args.reward_timeout is None:
                self._log_tree_columns(len(completions))
                return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            scorer = self._score_evaluation(inputs, prompts, completions, completion_ids_list)
        elif [repr(completion) for completion in completions] != scorer.decoded:
            raise RuntimeError(
                "TRL decoded the completions differently than they were scored. This TRL release is not supported; "
                "trl_ibtpo was tested with TRL 1.16."
            )
        completions[:] = scorer.completions  # reward functions may have edited them, which TRL's table shows
        for column, values in scorer.extra_columns.items():
            self._log_completion_extra(column, values)
        self._log_tree_columns(len(completions))
        for name, calls in scorer.metrics.items():
            leaves = sum(count for _, count in calls)
            self._log_metric(name, sum(value * count for value, count in calls) / leaves)
        self._log_timeouts(scorer)
        rewards = self.accelerator.gather(torch.tensor(scorer.rewards, device=self.accelerator.device))
        if self.model.training:
            self._all_rewards, self._all_sizes = (
                rewards,
                [self.num_generations] * (len(rewards) // self.num_generations),
            )
            if self.args.adaptive_budget is not None:
                self._all_sizes = [size for sizes in gather_object([self._sizes]) for size in sizes]
            self._look_at_rewards(rewards.cpu().double().numpy(), prompts)
        return rewards

    # ----- advantages ------------------------------------------------------------------------------------------------

    def _advantages_in_groups(self, advantages: torch.Tensor) -> torch.Tensor:
        """GRPO's advantages in groups as they are, instead of TRL's in groups of G rows; `(B,)`."""
        found, is_std_zero = group_advantages(
            self._all_rewards,
            self._all_sizes,
            self.reward_weights,
            scale_rewards=self.scale_rewards,
            multi_objective_aggregation=self.multi_objective_aggregation,
        )
        self._metrics["train"]["frac_reward_zero_std"][-1] = is_std_zero.float().mean().item()
        return found.split(len(advantages))[self.accelerator.process_index].to(advantages)

    def _set_step_advantages(self, output: dict[str, Any]) -> None:
        """Replace GRPO's advantage of each trajectory by those of its steps, weighted: `(B,)` to `(B, T)`."""
        advantages = output["advantages"]
        unscorable = np.isnan(self._scorer.rewards).all(axis=1)
        advantage_B = np.where(unscorable, np.nan, advantages.cpu().double().numpy())
        metrics, values_B, weights_B = TreeMetrics(), [], []
        trained_B = output["completion_mask"].any(dim=1).cpu().numpy()  # not those that TRL masks as truncated
        ends = np.cumsum(self._sizes)[:-1]
        of_trees = zip(self._grown, np.split(advantage_B, ends), np.split(trained_B, ends), strict=True)
        for grown, advantage_L, trained_L in of_trees:
            graded = GradedTree(
                grown.tree, grown.scores, advantage_L, self.args.credit_settings, grown.choices, trained_L
            )
            found = token_advantages(graded, self._advantage)
            metrics.add_tree(grown, found)
            self._token_advantages.append(found)
            values_B += found.advantages
            weights_B += found.weights
        logged = metrics.reduce(self.accelerator)
        if self._host is not None and (counts := self._host.counts()):
            logged |= mean_per_question(counts, len(self._grown), self.accelerator)
        for name, value in logged.items():
            self._metrics["train"][name].append(value)

        def padded(rows: list[np.ndarray]) -> np.ndarray:
            result = np.zeros(output["completion_ids"].shape)
            for row, values_T in zip(result, rows, strict=True):
                row[: len(values_T)] = values_T
            return result

        per_token = padded(values_B)
        if getattr(self._advantage, "whitened", False):
            mask = (output["completion_mask"] * output.get("tool_mask", 1)).cpu().numpy() > 0
            per_token = whiten(per_token, mask & ~unscorable[:, None], self._sum_over_processes)
        weighted = per_token * padded(weights_B)
        self._rewrite_logged_advantages(weighted)
        output["advantages"] = torch.as_tensor(weighted).to(advantages)
        if self.args.ib_regularization_coef and self.args.shared_token_weight != "per_trajectory":
            output["unweighted_advantages"] = torch.as_tensor(per_token).to(advantages)

    def _sum_over_processes(self, values: np.ndarray) -> np.ndarray:
        local = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(local, reduction="sum").cpu().double().numpy()
