"""IBTPOTrainer: `GRPOTrainer` that grows trees and gives every step its own advantage.

A thin adapter. It hooks into TRL where completions are generated, scored and given advantages, calls `super()` for
everything else, and copies none of TRL's methods.
"""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational
from trl.extras.profiling import profiling_context
from trl.generation.vllm_client import VLLMClient
from trl.models import unwrap_model_for_generation

from . import checkpoints, compat
from .advantages import ADVANTAGES, per_token
from .engines import RolloutEngine
from .engines.transformers import TransformersEngine, unsharded
from .engines.vllm import (
    CPUVLLMGeneration,
    VLLMEngine,
    VLLMServerEngine,
    check_room,
    runs_on_cpu,
    sampling_arguments,
)
from .growth import TreeGrower, grow_trees
from .ibtpo_config import IBTPOConfig
from .metrics import TreeMetrics
from .model_card import GrownTree, complete_card, tree_to_show
from .packing import (
    keep_groups_together,
    pack_prefixes,
    packed_logps_and_entropies,
    prepare_model,
    why_not_packed,
)
from .rewards import RewardScorer
from .steps import StepSplitter


class IBTPOTrainer(GRPOTrainer):
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
            As in [`~trl.GRPOTrainer`], with [`IBTPOConfig`] for `args`. `tools`, `environment_factory` and
            `rollout_func` are not supported: a tree branches inside a single completion.
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
        **kwargs: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
            args = IBTPOConfig(f"{model_name.split('/')[-1]}-IBTPO")
        if not isinstance(args, IBTPOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; IBTPOTrainer needs an IBTPOConfig, which takes the same fields."
            )
        compat.check_hooks(GRPOTrainer)
        compat.refuse_unsupported(model, reward_funcs, args, train_dataset, processing_class, kwargs)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        compat.check_tokenizer(self._tokenizer)
        if self.use_vllm and self.vllm_mode == "colocate" and runs_on_cpu():
            self.vllm_generation = CPUVLLMGeneration.adopt(self.vllm_generation)
        compat.refuse_sharded_growth(self._dist, args)
        self._check_process_share()
        self._packed_forward, self._packed_reason = self._choose_forward()
        self._success_index = self._find_success_reward()
        self._splitter = StepSplitter(self._tokenizer, args.step_delimiter)
        self._tree_inputs: list[dict[str, Any]] = []  # dataset rows of the generation batch being made
        self._growers: list[TreeGrower] = []
        self._scorer: RewardScorer | None = None
        self._shown_tree: GrownTree | None = None  # one of the last generation batch, for the model card

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in TRL, except that `resume_from_checkpoint=True` is the last checkpoint that was written to the end."""
        self.accelerator.print(self._describe())
        if resume_from_checkpoint:
            self.accelerator.wait_for_everyone()  # the main process may still be writing that of a run just ended
            resume_from_checkpoint = checkpoints.to_resume_from(resume_from_checkpoint, self.args.output_dir)
            chosen = gather_object([resume_from_checkpoint])
            if len(set(chosen)) > 1:
                raise ValueError(
                    f"Processes found different last checkpoints in `output_dir`: {', '.join(sorted(set(chosen)))}. "
                    "Give the path of one that every node has as `resume_from_checkpoint`."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def grow_trees(self, rows: list[dict[str, Any]]) -> list[TreeGrower]:
        """Grow one tree per dataset row with the current policy, as a training step would, without training on it.

        Every process grows the rows that it is given.

        Args:
            rows: dataset rows, each with a `prompt` and the columns that the reward functions need.

        Returns:
            One grower per row: its `tree`, the `success` of each leaf and `scores()`.
        """
        compat.check_rows(rows)
        inputs = [dict(row) for row in rows for _ in range(self.num_generations)]
        prompt_ids, images, _ = self._tokenize_prompts([row["prompt"] for row in inputs])
        if images is not None:
            raise ValueError(compat.NO_IMAGES)
        growers, _ = self._grow(inputs, prompt_ids)
        return growers

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_card(
                self.args.output_dir,
                self.args,
                self.state.log_history,
                self._shown_tree,
                success_reward=self.reward_func_names[self._success_index],
                adapter=is_peft_model(self.accelerator.unwrap_model(self.model)),
            )

    # ----- hooks into TRL: generation, rewards, advantages -----------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        compat.check_rows(inputs)
        self._tree_inputs = inputs
        try:
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = self._step_advantages(output["advantages"], output["completion_ids"])
            output["row"] = torch.arange(len(inputs), device=output["advantages"].device)
            self._shown_tree = tree_to_show(self._growers, self.state.global_step + 1)
        finally:
            self._tree_inputs, self._growers, self._scorer = [], [], None
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not self.model.training:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        if images is not None:
            raise ValueError(compat.NO_IMAGES)
        self._growers, self._scorer = self._grow(self._tree_inputs, prompt_ids)
        trajectories = [grower.tree.trajectory(leaf) for grower in self._growers for leaf in range(num_generations)]
        completion_ids = [token_ids for token_ids, _ in trajectories]
        # As in TRL, only vLLM's log-probabilities are passed on, to correct for its mismatch with the policy.
        return completion_ids, [logprobs for _, logprobs in trajectories] if self.use_vllm else None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        scorer = self._scorer
        if not self.model.training:
            if self.args.reward_timeout is None:
                return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            scorer = self._score_evaluation(inputs, completions, completion_ids_list)
        if completions != scorer.completions:
            raise RuntimeError(
                "TRL decoded the completions differently than they were scored. This TRL release is not supported; "
                "trl_ibtpo was tested with TRL 1.16."
            )
        for column, values in scorer.extra_columns.items():
            self._log_completion_extra(column, values)
        for name, calls in scorer.metrics.items():
            leaves = sum(count for _, count in calls)
            self._log_metric(name, sum(value * count for value, count in calls) / leaves)
        self._log_timeouts(scorer)
        rewards = torch.tensor(scorer.rewards, device=self.accelerator.device)
        return self.accelerator.gather(rewards)

    # ----- hooks into TRL: the prefix-shared forward -----------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._packed_forward and self.model.training and self._buffered_inputs is not before:
            # TRL shuffles rows; what shares tokens has to be in one micro-batch.
            self._buffered_inputs = keep_groups_together(self._buffered_inputs, self.num_generations)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **multimodal,
    ):
        packed_batches = [None]
        # The load-balancing loss of a mixture of experts counts tokens, so it would change.
        if self._packed_forward and not compute_aux_loss and all(value is None for value in multimodal.values()):
            size = batch_size or len(input_ids)
            packed_batches = [
                pack_prefixes(input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep)
                for start in range(0, len(input_ids), size)
            ]
        if None in packed_batches:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **multimodal,
            )
        base_model = self._base_model(model)
        with self.accelerator.autocast():
            parts = [packed_logps_and_entropies(model, base_model, packed) for packed in packed_batches]
        logps, entropies = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _base_model(self, model: torch.nn.Module) -> PreTrainedModel:
        """The transformers model inside wrappers and adapters."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _choose_forward(self) -> tuple[bool, str]:
        """Whether to share prefixes in the forward pass, and why."""
        if self.args.packed_forward is False:
            return False, "`packed_forward` is off"
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            reason = "the adapter puts virtual tokens before the prompt"
        elif getattr(self.processing_class, "tokenizer", None) is not None:
            reason = "the model takes images"
        else:
            reason = why_not_packed(self._base_model(self.model))
        if reason is None:
            for each in (self.model, self.ref_model):
                if each is not None:
                    prepare_model(self._base_model(each))
            return True, "exact for this model"
        if self.args.packed_forward:
            raise ValueError(f"`packed_forward` is True, but {reason}. Leave it out to use TRL's forward here.")
        return False, reason

    # ----- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            checkpoints.begin(folder)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            raise checkpoints.CheckpointError(checkpoints.describe_failure(folder, error)) from error

    def _save_rng_state(self, output_dir):
        # The last file of every process; the main one goes on to write the trainer's state and to rotate checkpoints.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.write_manifest(Path(output_dir))

    # ----- growth ----------------------------------------------------------------------------------------------------

    def _grow(
        self, inputs: list[dict[str, Any]], prompt_ids: list[list[int]]
    ) -> tuple[list[TreeGrower], RewardScorer]:
        """Grow one tree for each run of G equal prompts; makes no collective call while trees grow."""
        scorer = self._make_scorer(inputs, self.num_generations, self._decoder(inputs, prompt_ids))
        with (
            self._engine() as engine,
            tqdm(
                total=len(prompt_ids),
                desc="Growing trees",
                unit="rollout",
                leave=False,
                delay=5,
                disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
            ) as progress,
        ):
            growers = self._plant(prompt_ids, engine)
            grow_trees(growers, engine, scorer, on_rollout=progress.update)
        scorer.warn_of_timeouts()
        return growers, scorer

    def _plant(self, prompt_ids: list[list[int]], engine: RolloutEngine) -> list[TreeGrower]:
        """One grower for each run of G equal prompts."""
        group, settings = self.num_generations, self.args.growth_settings
        growers = []
        for start in range(0, len(prompt_ids), group):
            rows = prompt_ids[start : start + group]
            if len(rows) < group or any(row != rows[0] for row in rows):
                raise RuntimeError(
                    f"Rows {start} to {start + len(rows) - 1} of the generation batch are not {group} copies of one "
                    "prompt, so they cannot share a tree. Use the trainer's own sampler."
                )
            budget = settings.max_completion_length
            if engine.max_length is not None:
                budget = check_room(len(rows[0]), budget, engine.max_length)
            compat.check_prompt(rows[0], self.model)
            prompt_index = self.accelerator.process_index * len(prompt_ids) // group + len(growers)
            growers.append(
                TreeGrower(
                    rows[0],
                    replace(settings, max_completion_length=budget),
                    self._splitter,
                    seed=(self.args.seed, self.state.global_step, prompt_index),
                    batched=engine.batched,
                )
            )
        return growers

    @contextmanager
    def _engine(self) -> Iterator[RolloutEngine]:
        """The rollout engine, holding what generation needs (weights in sync or gathered) until the batch is grown."""
        if self.use_vllm:
            self._sync_vllm()
            with self._vllm_engine().awake() as engine:
                yield engine
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            unsharded(self.model_wrapped, reshard_after_forward=self._reshards_after_forward),
        ):
            yield TransformersEngine(
                model,
                self.generation_config,
                self._tokenizer.pad_token_id,
                request_seeds=self.args.reproducible_rollouts,
            )

    @property
    def _reshards_after_forward(self) -> bool:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is None or bool(plugin.reshard_after_forward)

    def _sync_vllm(self) -> None:
        """Push the weights once per optimizer step, as TRL does; sleeping weights are always pushed."""
        generation = self.vllm_generation
        asleep = self.vllm_mode == "colocate" and generation._llm_weights_sleeping
        if self.state.global_step != self._last_loaded_step or asleep:
            with profiling_context(self, "sync_weights"):
                generation.sync_weights()
            self._last_loaded_step = self.state.global_step
            if self.vllm_mode == "server":  # only the main process pushes; nobody may sample before it is done
                self.accelerator.wait_for_everyone()

    def _vllm_engine(self) -> VLLMEngine | VLLMServerEngine:
        if self.vllm_mode == "colocate":
            return VLLMEngine(self.vllm_generation, request_seeds=self.args.reproducible_rollouts)
        generation = self.vllm_generation
        if not hasattr(generation, "vllm_client"):  # TRL connects the main process alone
            generation.vllm_client = VLLMClient(
                base_url=generation.server_base_url or f"http://{generation.server_host}:{generation.server_port}",
                connection_timeout=generation.server_timeout,
            )
        client = generation.vllm_client
        max_length = client.get_server_info()["model_config"]["max_model_len"]
        return VLLMServerEngine(
            client, sampling_arguments(generation), max_length, request_seeds=self.args.reproducible_rollouts
        )

    def _decoder(self, inputs: list[dict[str, Any]], prompt_ids: list[list[int]]) -> Callable[..., list]:
        """From completion ids and their rows to completions, as TRL decodes them."""

        def decode(completion_ids: list[list[int]], rows: list[int]) -> list:
            if not is_conversational(inputs[0]):
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

    def _score_evaluation(self, inputs: list[dict[str, Any]], completions: list, completion_ids: list) -> RewardScorer:
        """Score an evaluation batch in one call of each function, as TRL does, but within the time limit."""
        scorer = self._make_scorer(inputs, len(inputs), lambda _, rows: [completions[row] for row in rows])
        scorer.submit([(0, row, ids) for row, ids in enumerate(completion_ids)])
        scorer.collect(wait=True)
        scorer.warn_of_timeouts()
        return scorer

    def _make_scorer(self, inputs: list[dict[str, Any]], leaves_per_tree: int, decode: Callable) -> RewardScorer:
        return RewardScorer(
            inputs=inputs,
            leaves_per_tree=leaves_per_tree,
            reward_funcs=self.reward_funcs,
            reward_names=self.reward_func_names,
            reward_processing_classes=self.reward_processing_classes,
            success_index=self._success_index,
            decode=decode,
            shared_arguments={"trainer_state": self.state},
            event_loop=getattr(self, "async_loop", None),
            chat_template_kwargs=self.chat_template_kwargs,
            device=self.accelerator.device,
            timeout=self.args.reward_timeout,
        )

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

    # ----- advantages ------------------------------------------------------------------------------------------------

    def _step_advantages(self, advantages: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Replace GRPO's advantage of each trajectory by those of its steps: `(B,)` to `(B, T)`."""
        method = ADVANTAGES[self.args.advantage]
        unscorable = np.isnan(self._scorer.rewards).all(axis=1)
        advantage_B = np.where(unscorable, np.nan, advantages.cpu().double().numpy())
        per_step = np.zeros(completion_ids.shape)
        metrics = TreeMetrics()
        row = 0
        for grower in self._growers:
            tree, scores = grower.tree, grower.scores()
            leaf_advantages = advantage_B[row : row + len(tree.leaves)]
            terms = method(tree, scores, leaf_advantages, self.args.ib_coef)
            shared_by = tree.leaf_count()
            metrics.add_tree(grower, scores)
            for leaf, (global_S, local_S) in enumerate(zip(terms.global_terms, terms.local_terms, strict=True)):
                metrics.add_trajectory(*(per_token(tree, leaf, term) for term in (global_S, local_S)))
                values = global_S + local_S
                if self.args.shared_token_weight == "once":
                    values = values / shared_by[tree.path(tree.leaves[leaf])]
                values_T = per_token(tree, leaf, values)
                per_step[row, : len(values_T)] = values_T
                row += 1
        for name, value in metrics.reduce(self.accelerator).items():
            self._metrics["train"][name].append(value)
        self._rewrite_logged_advantages(per_step)
        return torch.tensor(per_step, dtype=advantages.dtype, device=advantages.device)

    def _rewrite_logged_advantages(self, per_step: np.ndarray) -> None:
        """The completions table shows one number per trajectory: the mean over its tokens."""
        lengths = [grower.tree.steps[leaf].end for grower in self._growers for leaf in grower.tree.leaves]
        means = gather_object([float(row[:length].mean()) for row, length in zip(per_step, lengths, strict=True)])
        for _ in means:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(means)

    # ----- checks and words ------------------------------------------------------------------------------------------

    def _check_process_share(self) -> None:
        share = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if share % self.num_generations:
            raise ValueError(
                f"Each process generates {share} completions at a time (`generation_batch_size` = "
                f"{self.args.generation_batch_size} over {self.accelerator.num_processes} processes), which does not "
                f"hold whole trees of {self.num_generations} trajectories. Trees never span processes; use a multiple "
                f"of {self.num_generations * self.accelerator.num_processes}."
            )

    def _find_success_reward(self) -> int:
        name = self.args.success_reward
        if name is None:
            return 0
        if name not in self.reward_func_names:
            raise ValueError(
                f"`success_reward` is {name!r}, which is not a reward function. Available: "
                f"{', '.join(self.reward_func_names)}."
            )
        return self.reward_func_names.index(name)

    def _describe(self) -> str:
        args = self.args
        if args.branching == "independent":
            shape = f"{self.num_generations} independent completions per question"
        else:
            shape = (
                f"trees of {self.num_generations} trajectories per question (B0={args.tree_initial_rollouts}, "
                f"L={args.tree_levels}, K={args.tree_nodes_per_level}, B={args.tree_branches_per_node}), "
                f"branching '{args.branching}'"
            )
        trees = args.per_device_train_batch_size * args.steps_per_generation // self.num_generations
        engine = f"vLLM, {self.vllm_mode} mode" if self.use_vllm else "transformers (`use_vllm` is off)"
        forward = "prefix-shared" if self._packed_forward else "TRL's"
        return (
            f"IB-TPO: {shape}, {trees} per process and generation; advantage '{args.advantage}' "
            f"(ib_coef={args.ib_coef}, ib_beta={args.ib_beta}); success from "
            f"'{self.reward_func_names[self._success_index]}'; engine: {engine}; forward: {forward} "
            f"({self._packed_reason})."
        )
