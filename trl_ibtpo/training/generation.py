"""Where a trainer's trees come from: its engine, its prompts and its reward functions, put together for growth."""

import textwrap
from collections.abc import Callable
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational

from ..branching import uses_rewards
from ..engines.base import RolloutEngine
from ..engines.turns import TurnEngine
from ..grown_tree import GrownTree
from ..growth import drive, leaf_budget
from ..segments import make_grower
from ..tree_grower import TreeGrower
from .dataset_checks import DIFFERENT_PROMPTS, NO_IMAGES, check_rows
from .environments import close
from .model_checks import check_prompt
from .path_filter import PathFilter
from .policy_engine import PolicyEngine
from .rewards import RewardScorer
from .time_limit import LimitedCalls
from .tools import ToolHost


class TreeGeneration(PathFilter, PolicyEngine):
    """For a `GRPOTrainer` with an `IBTPOConfig`: grows trees with the current policy."""

    _last_batch = (-1, 0)  # optimizer step, and which of its generation batches
    _growing_alone = False  # `grow_trees` is at work
    _limited_calls: LimitedCalls  # those of tools and environments

    def _next_batch(self) -> int:
        """Which generation batch of its optimizer step the coming one is; 0 where a step needs but one."""
        last_step, number = self._last_batch
        number = number + 1 if last_step == self.state.global_step else 0
        self._last_batch = self.state.global_step, number
        return number

    def grow_trees(self, rows: list[dict[str, Any]]) -> list[GrownTree]:
        """Grow one tree per dataset row with the current policy, as a training step would, without training on it.

        Every process grows the rows that it is given.

        Args:
            rows: dataset rows, each with a `prompt` and the columns that the reward functions need.

        Returns:
            One tree per row, with its scores.
        """
        check_rows(rows, self.tools, self.environment_factories)
        inputs = [deepcopy(row) for row in rows for _ in range(self.num_generations)]  # functions may edit them
        if self.tools or self.environment_factories is not None:
            grown, scorer = self._grow_over_turns(inputs)
        else:
            prompt_ids, images, _ = self._tokenize_prompts([row["prompt"] for row in inputs])
            if images is not None:
                raise ValueError(NO_IMAGES)
            grown, scorer, _ = self._grow(inputs, prompt_ids)
        self._say_scaling(scorer.rewards)
        return grown

    def _grow_over_turns(self, inputs: list[dict[str, Any]]) -> tuple[list[GrownTree], RewardScorer]:
        """TRL resets environments and finds the tools of every row on its way to generation; no further."""
        self._growing_alone, self._tree_inputs, before = True, inputs, self.environments
        try:
            super()._generate_and_score_completions(inputs)
        except Grown as grown:
            return grown.trees, grown.scorer
        finally:
            self._growing_alone, self.environments = False, before
            self._tree_inputs, self._prompts = [], []
            self._close_environments_between_runs()

    @property
    def _grows(self) -> bool:
        """Whether what TRL asks for now is grown as trees; evaluation is not."""
        return self.model.training or self._growing_alone

    def _close_environments_between_runs(self) -> None:
        """Close the environments that TRL keeps to use them again, outside of a training run; it makes new ones."""
        for pool in {} if self.is_in_train else getattr(self, "_environment_pool", {}).values():
            for environment in pool:
                close(environment, self._limited_calls)
            pool.clear()

    def _generate(self, prompts: list) -> tuple:
        if self._grows:
            self._prompts = prompts  # with what environments answered to `reset`
        return super()._generate(prompts)

    def _grow(
        self, inputs: list[dict[str, Any]], prompt_ids: list[list[int]], batch: int = 0
    ) -> tuple[list[GrownTree], RewardScorer, ToolHost | None]:
        """Grow one tree for each run of G equal prompts; makes no collective call while trees grow."""
        prompts = self._prompts or [row["prompt"] for row in inputs]
        host = ToolHost(self, prompts, prompt_ids, inputs, self.num_generations) if self.tools else None
        uneven = self.args.adaptive_budget is not None
        leaves = self.args.growth_settings.leaves
        rows, row_ids = inputs, prompt_ids  # one a leaf
        if leaves != self.num_generations:  # some will be left out
            sources = [first for first in range(0, len(inputs), self.num_generations) for _ in range(leaves)]
            rows, row_ids = [deepcopy(inputs[row]) for row in sources], [prompt_ids[row] for row in sources]
            prompts = [prompts[row] for row in sources]
        scorer = self._make_scorer(rows, prompts, leaves, self._decoder(prompts, row_ids, host), uneven, host)
        with (
            self._engine() as engine,
            nullcontext() if host is None else closing(host),
            tqdm(
                total=len(rows),
                desc="Growing trees",
                unit="rollout",
                leave=False,
                delay=5,
                disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
            ) as progress,
        ):
            if host is not None:
                engine = TurnEngine(engine, host)
            growers = self._plant(prompt_ids, engine, batch)
            budget = leaf_budget(self.args.growth_settings, len(growers), in_order=self.args.reproducible_rollouts)
            drive(growers, engine, scorer, progress.update, budget)
        scorer.arrange([len(grower.tree.leaves) for grower in growers])
        scorer.warn_of_timeouts()
        grown = [grower.grown() for grower in growers]
        if self.args.path_filter is not None:
            grown, kept = self._filter_paths(grown, scorer.rewards, rows)
            scorer.keep(kept)
        self._look_for_steps(grown)
        return grown, scorer, host

    def _plant(self, prompt_ids: list[list[int]], engine: RolloutEngine, batch: int) -> list[TreeGrower]:
        """One grower for each run of G equal prompts, whose seeds number the prompts of an optimizer step."""
        group = self.num_generations
        settings = replace(self.args.growth_settings, branching=self._branching)
        growers = []
        for start in range(0, len(prompt_ids), group):
            rows = prompt_ids[start : start + group]
            if len(rows) < group or any(row != rows[0] for row in rows):
                if self.environment_factories is not None:
                    name = type(self.environments[start]).__name__
                    raise RuntimeError(DIFFERENT_PROMPTS.format(name=name, prompts=self._two_prompts(start)))
                raise RuntimeError(
                    f"Rows {start} to {start + len(rows) - 1} of the generation batch are not {group} copies of one "
                    "prompt, so they cannot share a tree. Use the trainer's own sampler."
                )
            budget = settings.max_completion_length
            if engine.max_length is not None:
                budget = check_room(len(rows[0]), budget, engine.max_length)
            if budget < settings.max_completion_length:
                self._warn_once(
                    f"A prompt of {len(rows[0])} tokens leaves {budget} of the {settings.max_completion_length} "
                    f"tokens of `max_completion_length`, since vLLM's context holds {engine.max_length}. Raise "
                    "`vllm_max_model_length` to use all of them. Said once.",
                    about="room",
                )
            check_prompt(rows[0], self.model)
            share = batch * self.accelerator.num_processes + self.accelerator.process_index
            prompt_index = share * len(prompt_ids) // group + len(growers)
            growers.append(
                make_grower(
                    rows[0],
                    replace(settings, max_completion_length=budget),
                    self._splitter,
                    seed=(self.args.seed, self.state.global_step, prompt_index),
                    clock=engine.clock,
                    strategy=self._strategy,
                    latent=None if self._latent_source is None else self._latent_source.noise,
                )
            )
        return growers

    def _two_prompts(self, start: int) -> str:
        """The first prompt of a group and the first that differs from it, for a message."""
        prompts = self._prompts[start : start + self.num_generations]
        other = next((prompt for prompt in prompts if prompt != prompts[0]), prompts[0])
        return " and ".join(textwrap.shorten(repr(prompt[-1]["content"]), 120) for prompt in (prompts[0], other))

    def _decoder(self, prompts: list, prompt_ids: list[list[int]], host: ToolHost | None) -> Callable[..., list]:
        """From completion ids and their rows to completions, as TRL decodes them."""

        def decode(completion_ids: list[list[int]], rows: list[int]) -> list:
            if host is not None:
                return [host.completion(row) for row in rows]
            if not is_conversational({"prompt": prompts[0]}):
                return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
            if getattr(self._tokenizer, "response_template", None) or getattr(
                self._tokenizer, "response_schema", None
            ):
                return [
                    [parse_response(self._tokenizer, ids, prefix=prompt_ids[row], tools=[])]
                    for ids, row in zip(completion_ids, rows, strict=True)
                ]
            contents = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
            return [[{"role": "assistant", "content": content}] for content in contents]

        return decode

    def _score_evaluation(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids: list
    ) -> RewardScorer:
        """Score an evaluation batch in one call of each function, as TRL does, but within the time limit."""
        scorer = self._make_scorer(inputs, prompts, len(inputs), lambda _, rows: [completions[row] for row in rows])
        scorer.submit([(0, row, ids) for row, ids in enumerate(completion_ids)])
        scorer.collect(wait=True)
        scorer.warn_of_timeouts()
        return scorer

    def _make_scorer(
        self,
        inputs: list[dict[str, Any]],
        prompts: list,
        leaves_per_tree: int,
        decode: Callable,
        uneven: bool = False,
        host: ToolHost | None = None,
    ) -> RewardScorer:
        return RewardScorer(
            inputs=inputs,
            prompts=None if uneven else prompts,
            environments=self.environments,
            failed_rows=set if host is None else host.failed_rows,
            leaves_per_tree=leaves_per_tree,
            reward_funcs=self.reward_funcs,
            reward_names=self.reward_func_names,
            reward_processing_classes=self.reward_processing_classes,
            success=self._success,
            decode=decode,
            shared_arguments={"trainer_state": self.state},
            event_loop=getattr(self, "async_loop", None),
            chat_template_kwargs=self.chat_template_kwargs,
            device=self.accelerator.device,
            timeout=self.args.reward_timeout,
            postpone=not uses_rewards(self._strategy) and self.args.adaptive_budget is None,
            uneven=uneven,
        )


class Grown(BaseException):
    """Ends what TRL does with a generation batch once its trees are grown."""

    def __init__(self, trees: list[GrownTree], scorer: RewardScorer):
        self.trees, self.scorer = trees, scorer


def check_room(prompt_length: int, max_completion_length: int, max_length: int) -> int:
    """Completion tokens that fit behind a question.

    vLLM shortens a completion that does not fit without a word; the trainer says so, once. A question that leaves no
    room at all is an error.
    """
    room = max_length - prompt_length
    if room < 1:
        raise ValueError(
            f"A prompt has {prompt_length} tokens, but vLLM's context holds {max_length} for prompt and completion "
            f"together. Set `vllm_max_model_length` to at least {prompt_length + max_completion_length} (prompt plus "
            "`max_completion_length`), or drop long prompts from the dataset."
        )
    return min(room, max_completion_length)
