"""What a forward and backward pass costs with each shared token computed once, against TRL's padded batch.

    python -m benchmarks.packed_forward [--quick] [--json FILE]
    python -m benchmarks.packed_forward --device cuda --bf16 --size Qwen/Qwen3-0.6B --attention sdpa flex_attention

One micro-batch is one question: a tree of the paper's shape (4, 9, 1, 1), or a flat group of GRPO. Prompts have 100 to
300 tokens, completions lognormal lengths (median 410) up to 1,024; trees grow by the package's own rules. The model
has the proportions of a small Qwen3 and random weights. Both passes go through TRL's fused head.

`real_tokens` are those of the rows without padding, `padded_tokens` what TRL's batch holds, `unique_tokens` what the
shared row holds, tokens repeated at branch points included. Memory is the peak of all tensors, the parameters
included: torch's own tracker on a CPU, the allocator's on a GPU.
"""

import random
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm.auto import tqdm
from transformers import Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from benchmarks import common, sizes
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.prefix_sharing.attention import prepare_model, shared_logps_and_entropies
from trl_ibtpo.prefix_sharing.trie import share_prefixes
from trl_ibtpo.tree_grower import TreeGrower

STEP_TOKENS, LENGTH_SIGMA = 32, 0.6
SHAPES = {
    "tree (4, 9, 1, 1)": {},
    "flat 8": {"branching": "independent", "tree_levels": 1, "tree_initial_rollouts": 8},
    "flat 12": {"branching": "independent", "tree_levels": 1, "tree_initial_rollouts": 12},
}


class RandomRollouts:
    """Random tokens of lognormal total lengths, and random log-probabilities."""

    clock, max_length = "tokens", None

    def __init__(self, seed: int, prompt_length: int, median_length: float, vocabulary: int):
        self.rng = np.random.default_rng(seed)
        self.prompt_length, self.median_length, self.vocabulary = prompt_length, median_length, vocabulary
        self.queue = []

    def submit(self, requests):
        self.queue += requests

    def poll(self):
        requests, self.queue = self.queue, []
        return [self._sample(request) for request in requests]

    def _sample(self, request):
        done = len(request.prefix_ids) - self.prompt_length
        total = 0
        while total <= done:  # a length that the prefix has not passed yet
            total = int(self.rng.lognormal(np.log(self.median_length), LENGTH_SIGMA))
        count = min(request.max_tokens, total - done)
        token_ids = self.rng.integers(0, self.vocabulary, count).tolist()
        return Rollout(request.request_id, token_ids, (-self.rng.exponential(0.5, count)).tolist())

    def generated(self, request_id):
        return 0

    def abort(self):
        self.queue = []


def make_batch(settings: dict, seed: int, max_length: int, vocabulary: int, device) -> tuple:
    """`input_ids`, `attention_mask` and `logits_to_keep` of the trajectories of one question."""
    rng = random.Random(seed)
    prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(100, 300) if max_length > 256 else 20)]
    steps = common.FixedSteps(STEP_TOKENS)
    grower = TreeGrower(prompt, GrowthSettings(max_completion_length=max_length, **settings), steps, (seed,))
    drive([grower], RandomRollouts(seed, len(prompt), 0.4 * max_length, vocabulary), common.ScriptedScorer())
    completions = [grower.tree.trajectory(leaf)[0] for leaf in range(len(grower.tree.leaves))]
    kept = max(map(len, completions))
    input_ids = torch.zeros(len(completions), len(prompt) + kept, dtype=torch.long, device=device)
    mask = torch.zeros_like(input_ids)
    for row, completion in enumerate(completions):
        input_ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[row, : len(prompt) + len(completion)] = 1
    return input_ids, mask, kept


def padded_forward(model, input_ids, mask, kept) -> torch.Tensor:
    """Log-probabilities as TRL computes them, `(B, C)`."""
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :-kept] = -100
    return model(input_ids=input_ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -kept:]


def shared_forward(model, input_ids, mask, kept) -> torch.Tensor:
    return shared_logps_and_entropies(model, model, share_prefixes(input_ids, mask, kept))[0]


def forward_backward(model, forward: Callable, batch: tuple, bf16: bool) -> torch.Tensor:
    """One pass of each, from gradients of None; the log-probabilities."""
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        logps = forward(model, *batch)
    # Any loss of the log-probabilities; this one is smooth and gives every token another weight.
    (logps.sin() * batch[1][:, -batch[2] :]).sum().backward()
    return logps.detach()


def seconds_of(model, forward: Callable, batch: tuple, bf16: bool) -> float:
    _synchronize(model.device)
    begin = time.perf_counter()
    forward_backward(model, forward, batch, bf16)
    _synchronize(model.device)
    return time.perf_counter() - begin


def difference(model, batch: tuple, bf16: bool) -> dict[str, float]:
    """By how much the forwards differ: the most of a log-probability, and the gradient as a share of its norm."""
    logps, gradients = [], []
    for forward in (padded_forward, shared_forward):
        logps.append(forward_backward(model, forward, batch, bf16))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    plain, shared = gradients
    return {
        "max_logp_diff": float((logps[1] - logps[0]).abs().max()),
        "grad_rel_diff": float((shared - plain).norm() / plain.norm()),
    }


def peak_memory(model, forward: Callable, batch: tuple, bf16: bool = False) -> float:
    """Bytes of all tensors at the worst moment of a forward and backward pass."""
    model.zero_grad()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        forward_backward(model, forward, batch, bf16)
        return torch.cuda.max_memory_allocated()
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        forward(model, *batch).sum().backward()
    return sum(each["Total"] for each in tracker.get_tracker_snapshot("peak").values())


def _synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3, help="micro-batches of each shape")
    arguments.add_argument(
        "--passes", type=int, default=3, help="of each forward over a micro-batch; the median counts"
    )
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--hidden", type=int, default=512)
    arguments.add_argument("--vocabulary", type=int, default=8192)
    arguments.add_argument("--max-length", type=int, default=1024, help="tokens of a completion")
    arguments.add_argument("--size", help="a key of benchmarks.sizes.SIZES, in place of the three above")
    arguments.add_argument("--attention", nargs="+", default=["sdpa"], choices=["sdpa", "eager", "flex_attention"])
    arguments.add_argument("--bf16", action="store_true", help="compute in bfloat16, with weights in float32")
    arguments.add_argument("--checkpointing", action="store_true", help="keep no activations but those of layers")
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args()
    if args.quick:
        args.repeats, args.layers, args.hidden, args.vocabulary, args.max_length = 2, 2, 128, 512, 256
    rows = []
    for attention in args.attention:
        rows += compare(attention, args)
    common.report("Forward and backward with prefix sharing, against the padded batch", rows, args)


def compare(attention: str, args) -> list[dict]:
    """A row for each shape, with one implementation of attention."""
    torch.manual_seed(0)
    if args.size is None:
        config = common.qwen3_config(args.layers, args.hidden, args.vocabulary, attn_implementation=attention)
    else:
        config = sizes.config(args.size, attn_implementation=attention)
    with torch.device(args.device):
        model = Qwen3ForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    prepare_model(model)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = []
    with tqdm(total=args.repeats * len(SHAPES), unit="batch") as progress:
        for shape, settings in SHAPES.items():
            results = []
            for repeat in range(args.repeats):
                progress.set_description(f"{attention}, {shape}")
                batch = make_batch(settings, repeat, args.max_length, config.vocab_size, model.device)
                found = difference(model, batch, args.bf16)  # also warms up: every batch has shapes of its own
                seconds = {padded_forward: [], shared_forward: []}
                for _ in range(args.passes):
                    for forward, taken in seconds.items():  # in turns
                        taken.append(seconds_of(model, forward, batch, args.bf16))
                plain, shared = (float(np.median(taken)) for taken in seconds.values())
                results.append(
                    {
                        "unique_tokens": share_prefixes(*batch).input_ids.numel(),
                        "real_tokens": int(batch[1].sum()),
                        "padded_tokens": batch[1].numel(),
                        "padded_seconds": plain,
                        "time_ratio": shared / plain,
                        "memory_ratio": peak_memory(model, shared_forward, batch, args.bf16)
                        / peak_memory(model, padded_forward, batch, args.bf16),
                        **found,
                    }
                )
                progress.update()
            row = {"shape": shape, "attention": attention}
            for key in results[0]:
                values = [result[key] for result in results]
                row[key] = float(np.max(values) if key.endswith("diff") else np.mean(values))
                if key == "time_ratio":
                    row["time_ratio_se"] = common.mean_and_error(values)[1]
            row["token_ratio"] = row["unique_tokens"] / row["padded_tokens"]
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
