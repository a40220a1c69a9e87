"""Checks of how rollouts are sampled: vLLM, `generation_kwargs`, and processes that would wait for one another."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from accelerate.utils import get_int_from_env
from packaging.version import Version
from torch import nn
from transformers.utils import logging
from trl import GRPOConfig
from trl.distributed import DistributedBackend

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


def check_vllm_arguments(args: GRPOConfig) -> None:
    """Raise where a field about vLLM asks for what a tree cannot have."""
    if args.vllm_mode not in ("colocate", "server"):
        raise ValueError(
            f"`vllm_mode` is {args.vllm_mode!r}; it must be 'colocate' (an engine in each process) or 'server' (one "
            "that was started with `vllm serve`)."
        )
    if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size > 1:
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


_THIS_MACHINE = ("0.0.0.0", "localhost", "127.0.0.1", "::1")
_LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


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


def check_generation_kwargs(args: GRPOConfig) -> None:
    """Raise where an option of `generation_kwargs` would not do in a tree what it says."""
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
