"""Checks that fail before training starts, or at the first row that cannot be trained on."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from accelerate.utils import get_int_from_env
from datasets import Dataset
from packaging.version import Version
from torch import nn
from transformers.utils import logging
from trl import GRPOConfig
from trl.data_utils import is_conversational
from trl.distributed import DistributedBackend

from ..advantages import ADVANTAGES
from ..branching import STRATEGIES, rounds_of, uses_entropies, uses_rewards
from .reward_checks import REWARD_ARGUMENTS, check_arguments, check_messages

logger = logging.get_logger(__name__)

TESTED_VLLM = ("0.22", "0.31")


def check_vllm() -> None:
    """Raise `ImportError` where vLLM is missing, and warn where its version was not tested."""
    oldest, newest = TESTED_VLLM
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"`use_vllm=True` needs vLLM, which cannot be imported ({error}). Tested versions: {oldest} to {newest}. "
            "Install one with: pip install '.[vllm]' in a copy of the repository."
        ) from error
    version = Version(vllm.__version__)
    if not Version(oldest) <= Version(f"{version.major}.{version.minor}") <= Version(newest):
        logger.warning(f"vLLM {version} was not tested with trl_ibtpo; versions {oldest} to {newest} were.")


NO_IMAGES = (
    "Images are not supported in training: a tree branches text prefixes. Remove the 'image'/'images' columns, or "
    "train this model with TRL's GRPOTrainer."
)


DIFFERENT_PROMPTS = (
    "`reset` of the environment {name} gave different prompts for one row: {prompts}. A tree has one question, so "
    "`reset` must depend on its arguments alone. Give the dataset a column that decides the task, for example `seed`, "
    "and use it: `def reset(self, seed, **kwargs): self.rng = random.Random(seed)`."
)


def refuse_unsupported(
    model: Any,
    reward_funcs: list[Any],
    args: GRPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    kwargs: dict[str, Any],
) -> None:
    """Say before anything is loaded what cannot work, and what to do instead."""
    if kwargs.get("rollout_func"):
        raise ValueError(
            "`rollout_func` is not supported: it samples whole completions by itself, which a tree has to branch. "
            "Give what it calls as `tools=` or `environment_factory=`, or train with TRL's GRPOTrainer."
        )
    if args.adaptive_budget is not None and (kwargs.get("tools") or kwargs.get("environment_factory")):
        raise ValueError(
            f"`adaptive_budget` is {args.adaptive_budget}, which cannot be combined with `tools` or "
            "`environment_factory`: each of the G rows of a question has an environment of its own. Leave it out."
        )
    for name, unused, reason in (
        ("path_filter", None, "what tools and environments did for the branches that are left out would be lost"),
        ("latent_mode", "none", "a branch whose environment cannot be brought back starts over, without a fork"),
    ):
        if getattr(args, name) != unused and (kwargs.get("tools") or kwargs.get("environment_factory")):
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, which cannot be combined with `tools` or "
                f"`environment_factory`: {reason}. Leave it out."
            )
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "`use_transformers_continuous_batching` is not supported: it cannot give each rollout its own token "
            "budget. Leave it off, or set `use_vllm=True`."
        )
    _check_model(model, args, processing_class, kwargs)
    _check_generation_kwargs(args)
    _check_dataset(train_dataset, args, kwargs.get("environment_factory"))
    _check_columns(train_dataset, eval_dataset, args)
    environments = kwargs.get("environment_factory") is not None
    _check_reward_funcs(reward_funcs, train_dataset, eval_dataset, args, environments)
    if args.use_vllm:
        _check_vllm_arguments(args)
        check_server_address(args)
        check_vllm()


def _check_vllm_arguments(args: GRPOConfig) -> None:
    if args.vllm_mode not in ("colocate", "server"):
        raise ValueError(
            f"`vllm_mode` is {args.vllm_mode!r}; it must be 'colocate' (an engine in each process) or 'server' (one "
            "that was started with `trl vllm-serve`)."
        )
    if args.vllm_tensor_parallel_size > 1:
        raise ValueError(
            f"`vllm_tensor_parallel_size` is {args.vllm_tensor_parallel_size}, which is not supported: the "
            "processes of a group would have to grow the same trees in step. Use 1 (each GPU has its own engine), "
            "or `vllm_mode='server'` with a server that is itself tensor-parallel."
        )
    if args.vllm_structured_outputs_regex is not None or "structured_outputs" in (args.generation_kwargs or {}):
        raise ValueError(
            "Structured outputs (`vllm_structured_outputs_regex`) are not supported: a branch would match the "
            "pattern from its own start, not from that of the completion. Leave it out, or train with TRL's "
            "GRPOTrainer."
        )


# Options of `generation_kwargs` that end a completion otherwise than the model does,
OWN_STOPS = {"stop", "stop_token_ids", "eos_token_id"}
# those that a tree sets itself,
SET_BY_TREE = ("n", "logprobs", "seed", "max_tokens", "max_new_tokens", "max_length")
# and those that count from where a request starts, which is in the middle of a completion where it is a branch.
COUNTED_FROM_START = (
    *("min_tokens", "min_new_tokens", "min_length", "thinking_token_budget"),
    *("presence_penalty", "frequency_penalty", "repetition_detection", "bad_words"),
    *("begin_suppress_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"),
)


def _check_generation_kwargs(args: GRPOConfig) -> None:
    generation_kwargs = args.generation_kwargs or {}
    for name in SET_BY_TREE:
        if name in generation_kwargs:
            raise ValueError(
                f"`generation_kwargs` sets `{name}` to {generation_kwargs[name]!r}, but a tree sets it for each of "
                "its rollouts. Leave it out; `max_completion_length` and `seed` are fields of their own."
            )
    if generation_kwargs.get("stop_strings"):
        raise ValueError(
            f"`generation_kwargs` sets `stop_strings` to {generation_kwargs['stop_strings']!r}, for which "
            "transformers needs a tokenizer that TRL does not give it. Leave it out, or generate with vLLM: "
            "`use_vllm=True` and `generation_kwargs={'stop': ...}`."
        )
    if args.mask_truncated_completions and generation_kwargs.keys() & OWN_STOPS:
        raise ValueError(
            "`mask_truncated_completions` is True, but TRL takes every completion without the tokenizer's `eos_token` "
            f"for truncated, so it would mask all those that `generation_kwargs` ({generation_kwargs}) ends. Leave "
            "`mask_truncated_completions` out, or let completions end with the `eos_token`."
        )
    if not args.branches:
        return
    for name in COUNTED_FROM_START:
        if generation_kwargs.get(name):
            raise ValueError(
                f"`generation_kwargs` sets `{name}` to {generation_kwargs[name]!r}, but it counts from where a "
                "rollout starts: a branch would not count the prefix that it shares. Leave it out (the field "
                "`repetition_penalty` does count prefixes), or train with TRL's GRPOTrainer."
            )
    stops, delimiters = generation_kwargs.get("stop") or [], args.step_delimiter
    delimiters = [delimiters] if isinstance(delimiters, str) else delimiters
    for stop in [stops] if isinstance(stops, str) else stops:
        heads = [stop[:length] for length in range(1, len(stop))]
        if any(each.endswith(head) or head.endswith(each) for head in heads for each in delimiters):
            raise ValueError(
                f"`generation_kwargs` sets `stop` to {stops!r}, but {stop!r} may begin with the end of a step "
                f"(`step_delimiter` is {args.step_delimiter!r}) and go on in a branch, which it would not end. Give "
                "a text that neither begins with the end of a delimiter nor holds the whole of one before its own end."
            )


_THIS_MACHINE = ("0.0.0.0", "localhost", "127.0.0.1", "::1")
_LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def name_of(function: Callable) -> str:
    """What a user's own function is called in messages, records and cards."""
    return getattr(function, "__name__", type(function).__name__)


def check_advantage(advantage: Any, args: GRPOConfig) -> None:
    """Raise where what the trainer got as `advantage` cannot give advantages, or has the name of one that is here."""
    if advantage is None:
        return
    if not callable(advantage) or isinstance(advantage, type):
        raise TypeError(
            f"`advantage` of the trainer is {advantage!r}; give a function of a GradedTree that returns the advantage "
            "of every step or trajectory. An advantage of the package is a name in the configuration: "
            "IBTPOConfig(advantage='grpo')."
        )
    if name_of(advantage) in ADVANTAGES and advantage is not ADVANTAGES[name_of(advantage)]:
        raise ValueError(
            f"`advantage` of the trainer is a function named '{name_of(advantage)}', as an advantage of the package "
            "is. Rename it: model cards and records go by this name."
        )


SAMPLED_BY_REWARD = (
    "`shared_token_weight` is 'sampled', which takes the children of a step for equal samples of the policy, but "
    "`branching` is {!r}, which looks at rewards: a step that is branched because its first answers were right has "
    "children whose answers are right more often than the policy's. Use `branching='confidence'` or 'random', or "
    "`shared_token_weight='once'`."
)


def check_strategy(strategy: Any, args: GRPOConfig) -> None:
    """Raise where what the trainer got as `branching` cannot choose steps, or rewards choose that may not."""
    if strategy is None:
        if args.shared_token_weight == "sampled" and args.branches_by_reward:
            raise ValueError(SAMPLED_BY_REWARD.format(args.branching))
        return
    if not callable(strategy) or isinstance(strategy, type):
        raise TypeError(
            f"`branching` of the trainer is {strategy!r}; give a function of a tree, its scores and a random "
            "generator that returns the priority of every step. A strategy of the package is a name in "
            "the configuration: IBTPOConfig(branching='confidence')."
        )
    if name_of(strategy) in STRATEGIES:
        raise ValueError(
            f"`branching` of the trainer is a function named '{name_of(strategy)}', as a strategy of the package is. "
            "Rename it: trees and model cards go by this name."
        )
    if args.branching == "independent":
        raise ValueError(
            f"`branching` of the trainer is the function '{name_of(strategy)}', but `branching` of the configuration "
            "is 'independent', which never asks one. Leave the field out."
        )
    if rounds_of(args.branching) != "tree":
        raise ValueError(
            f"`branching` of the trainer is the function '{name_of(strategy)}', but `branching` of the configuration "
            f"is {args.branching!r}, which shapes trees in a way that no function of your own does. Leave the field "
            "out."
        )
    if args.shared_token_weight == "sampled" and uses_rewards(strategy):
        raise ValueError(
            f"`shared_token_weight` is 'sampled', which is right only where rewards do not decide where trees "
            f"branch, but the function '{name_of(strategy)}' does not say that it leaves them alone. If it does, set "
            "its `uses_rewards = False`; else use `shared_token_weight='once'`."
        )


def check_forks(strategy: Any, args: GRPOConfig) -> None:
    """Raise where a field about forks would do nothing; `strategy` is what the trainer branches by."""
    name = None if strategy is None else name_of(strategy)
    if args.fork_keeps_token and getattr(strategy, "forks", "steps") != "tokens":
        raise ValueError(
            f"`fork_keeps_token` is True, but `branching` is {name!r}, which forks no tokens: branches continue "
            "steps. Leave it out, or use `branching='entropy_fork'` or 'surprisal'."
        )
    if args.fork_entropy == "truncated" and not (args.use_vllm and uses_entropies(strategy)):
        reason = (
            "`use_vllm` is False: transformers has exact entropies, which cost nothing"
            if uses_entropies(strategy)
            else f"`branching` is {name!r}, which looks at no entropies"
        )
        raise ValueError(f"`fork_entropy` is 'truncated', but {reason}. Leave it out.")


def check_server_address(args: GRPOConfig) -> None:
    """Raise where processes on several machines would each look for the vLLM server on their own machine.

    TRL connects the main process alone, beside which the server may run; here every process has its own connection.
    How many processes run on this machine is what the launcher says: torchrun, DeepSpeed, Open MPI, Intel MPI.
    """
    local = get_int_from_env(_LOCAL_PROCESSES, args.world_size)
    if args.vllm_mode != "server" or local >= args.world_size:
        return
    url = args.vllm_server_base_url
    host = args.vllm_server_host if url is None else urlsplit(url).hostname
    if host in _THIS_MACHINE:
        name, value = ("vllm_server_host", host) if url is None else ("vllm_server_base_url", url)
        raise ValueError(
            f"`{name}` is {value!r}, which means itself on each machine of this run "
            f"({args.world_size} processes, {local} of them here): every process connects to the vLLM server. Give an "
            "address that all of them reach, for example `vllm_server_base_url='http://10.0.0.5:8000'`."
        )


def _check_model(model: Any, args: GRPOConfig, processing_class: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(model, str):
        _check_path("model", model)
    elif not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` is {model!r}; give the name of a model on the Hub, the path of its folder, or a loaded model, "
            "for example 'Qwen/Qwen3-1.7B-Base'."
        )
    elif not model.config._name_or_path:
        # TRL loads what is missing by the name of the model.
        if processing_class is None:
            raise ValueError(
                f"`model` is a {type(model).__name__} that was not loaded from a folder or the Hub, so its tokenizer "
                "is not known. Give it as `processing_class`."
            )
        if args.beta != 0 and kwargs.get("peft_config") is None and not hasattr(model, "peft_config"):
            raise ValueError(
                f"`beta` is {args.beta}, which needs a reference model, but `model` is a {type(model).__name__} that "
                "was not loaded from a folder or the Hub, so there is nothing to load it from. Save the model and "
                "give its path, or set `beta=0.0`."
            )


def _check_path(name: str, value: str) -> None:
    """Of what can only be a path, the Hub's client says that it is a malformed name."""
    if (value.startswith(("/", ".", "~")) or value.count("/") > 1) and not os.path.isdir(value):
        raise FileNotFoundError(
            f"`{name}` names {value!r}, which is no folder here (from {os.getcwd()!r}). Give a folder with a saved "
            "model, or a name on the Hub, for example 'Qwen/Qwen3-1.7B-Base'."
        )


def _check_reward_funcs(
    reward_funcs: list[Any], train_dataset: Any, eval_dataset: Any, args: GRPOConfig, environments: bool
) -> None:
    for reward_func in reward_funcs:
        if isinstance(reward_func, str):
            _check_path("reward_funcs", reward_func)
    datasets = [("train_dataset", train_dataset)]
    if args.eval_strategy != "no" and eval_dataset is not None:
        several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets += [("eval_dataset", each) for each in several]
    for name, dataset in datasets:
        columns = getattr(dataset, "column_names", None)
        check_arguments(reward_funcs, columns, name, args.remove_unused_columns, environments)
        check_messages(reward_funcs, (first_row(dataset) or {}).get("prompt"))


def _check_dataset(dataset: Any, args: GRPOConfig, environment_factory: Any) -> None:
    if dataset is None and environment_factory:
        return  # TRL makes rows of its own
    if dataset is None:
        raise ValueError("`train_dataset` is required; it must have a column 'prompt'.")
    if isinstance(dataset, str):
        raise TypeError(
            f"`train_dataset` is {dataset!r}; it must be a dataset, not its name. Load it, for example "
            "`load_dataset('json', data_files='questions.jsonl', split='train')`."
        )
    if isinstance(dataset, dict):
        splits = list(dataset)
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__} with the splits {', '.join(map(str, splits)) or 'none'}. "
            f"Give one of them, for example `dataset[{(splits or ['train'])[0]!r}]`, or load one: "
            f"`load_dataset(..., split={(splits or ['train'])[0]!r})`."
        )
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns and not environment_factory:
        raise ValueError(
            f"`train_dataset` has no column 'prompt' (it has: {', '.join(map(str, columns)) or 'none'}). Rename the "
            "question's column, for example `dataset.rename_column('question', 'prompt')`."
        )
    if columns is not None and args.path_filter == "pmi" and args.answer_column not in columns:
        raise ValueError(
            f"`train_dataset` has no column '{args.answer_column}' (it has: {', '.join(map(str, columns))}), but "
            "`path_filter='pmi'` asks how likely the right answer is. Name the column that holds it in "
            "`answer_column`, or use `path_filter='advantage'`."
        )
    if columns is not None and {"image", "images"} & set(columns):
        raise ValueError(NO_IMAGES)
    # TRL drops an incomplete batch, and so would end at once without a word.
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(dataset, "__len__") and len(dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, but {prompts} prompts are generated for at a time "
            f"(`generation_batch_size` {args.generation_batch_size} / {args.num_generations} trajectories), so that "
            "no batch could be filled. Give more rows, or lower `per_device_train_batch_size` or "
            "`steps_per_generation`."
        )


def _check_columns(train_dataset: Any, eval_dataset: Any, args: GRPOConfig) -> None:
    if args.remove_unused_columns:  # then reward functions get no column at all
        return
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    for name, dataset in (("train_dataset", train_dataset), *(("eval_dataset", each) for each in evaluation.values())):
        refuse_columns(getattr(dataset, "column_names", None) or [], name)


def refuse_columns(columns: Iterable[str], dataset: str) -> None:
    """Raise where a column would replace, or be replaced by, what reward functions get from the trainer."""
    for column in columns:
        if column in REWARD_ARGUMENTS:
            raise ValueError(
                f"`{dataset}` has a column '{column}', but reward functions get their `{column}` from the trainer. "
                f"Rename it, for example `dataset.rename_column('{column}', 'dataset_{column}')`."
            )


def check_rows(rows: list[dict[str, Any]], tools: Sequence[Any] = (), environments: Any = None) -> None:
    """Raise where a row has no prompt that can be continued; streamed rows are seen here first.

    Args:
        rows: dataset rows.
        tools: with any, prompts are messages.
        environments: with any, they may make the prompt.
    """
    if isinstance(rows, dict):
        raise TypeError(
            f"`rows` is one row (with {', '.join(map(str, rows))}); give a list of rows, for example `[row]`."
        )
    for row in rows:
        if {"image", "images"} & row.keys():
            raise ValueError(NO_IMAGES)
        refuse_columns(row, "train_dataset")
        prompt = row.get("prompt")
        if isinstance(prompt, str) and not tools:
            continue
        if isinstance(prompt, str):
            raise ValueError(
                f"The column 'prompt' of `train_dataset` holds the text {prompt!r}, but tools need messages, which "
                "the chat template renders with them. Give [{'role': 'user', 'content': ...}]."
            )
        if prompt is None and environments is not None:
            continue
        if not (prompt and isinstance(prompt, list) and all(_is_message(message) for message in prompt)):
            raise ValueError(
                f"The column 'prompt' of `train_dataset` holds {prompt!r}; a prompt must be text or a list of "
                "messages, for example 'What is 3 + 4?' or [{'role': 'user', 'content': 'What is 3 + 4?'}]."
            )
        contents = [message.get("content") for message in prompt]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(part.get("type") == "image" for part in parts):
            raise ValueError(NO_IMAGES)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and "role" in message and bool({"content", "tool_calls"} & message.keys())


def check_template(tokenizer: Any, row: dict[str, Any] | None) -> None:
    """Raise where a row holds chat messages that the tokenizer has no template for."""
    if tokenizer.chat_template is None and row is not None and is_conversational({"prompt": row.get("prompt")}):
        raise ValueError(
            f"The column 'prompt' holds chat messages, but the tokenizer ({tokenizer.name_or_path or 'no name'}) has "
            "no chat template. Set one, `tokenizer.chat_template = ...`, and give the tokenizer as "
            "`processing_class`; or make the prompts text. docs/base_models.md shows both."
        )


def first_row(dataset: Any) -> dict[str, Any] | None:
    """The first row of a dataset that can be looked at without consuming it."""
    return dataset[0] if isinstance(dataset, Dataset) and len(dataset) else None


def check_tokenizer(tokenizer: Any) -> None:
    """Raise where a tokenizer cannot end a completion."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer's `eos_token` is None, so that no completion could end. Set it to the token that ends a "
            "text, for example `tokenizer.eos_token = '<|endoftext|>'`, and give the tokenizer as `processing_class`."
        )


def check_prompt(token_ids: list[int], model: nn.Module) -> None:
    """Raise where a prompt cannot be fed to `model`."""
    if not token_ids:
        raise ValueError(
            "A 'prompt' of `train_dataset` is empty: it has no token to continue. Drop such rows, for example "
            "`dataset.filter(lambda row: row['prompt'])`."
        )
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if embeddings is not None and max(token_ids) >= embeddings:
        raise ValueError(
            f"A prompt holds the token id {max(token_ids)}, but the model has embeddings for {embeddings} tokens. "
            "Give the model's own tokenizer as `processing_class`."
        )
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    # Where rotary embeddings are scaled, the configuration may still hold the length before scaling.
    scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if positions is not None and not scaled and len(token_ids) >= positions:
        raise ValueError(
            f"A prompt has {len(token_ids)} tokens, which leaves no room for a completion: `max_position_embeddings` "
            f"of the model is {positions}. Drop rows with prompts of {positions} tokens or more from `train_dataset`, "
            "or use a model with a longer context."
        )


def refuse_sharded_growth(
    backend: DistributedBackend, args: GRPOConfig, reward_funcs: Sequence[Any] = (), forward: bool = False
) -> None:
    """Refuse sharding in which a forward pass waits for other processes, since each grows trees at its own pace.

    With `forward`, the policy has a part in growth although vLLM generates.
    """
    if backend.is_zero3 and any(isinstance(reward_func, nn.Module) for reward_func in reward_funcs):
        # Under FSDP, TRL leaves reward models whole.
        raise ValueError(
            "`reward_funcs` holds a model, which ZeRO-3 shards: each process scores its own trees, and a forward pass "
            "of one would wait for the others. Use ZeRO-2, or serve the model and give a function that asks it."
        )
    if args.use_vllm and not forward:
        return
    if backend.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 cannot generate with transformers here: each process grows its own trees, and a forward pass of "
            "one would wait for the others. Set `fsdp_version: 2` in the accelerate config, or `use_vllm=True`."
        )
    if backend.is_zero3 and not args.ds3_gather_for_generation:
        raise ValueError(
            "`ds3_gather_for_generation` is False, which cannot generate with transformers under ZeRO-3 here: each "
            "process grows its own trees, and a forward pass of one would wait for the others. Set it to True (the "
            "weights are gathered while trees grow), or `use_vllm=True`."
        )
