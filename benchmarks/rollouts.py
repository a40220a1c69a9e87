"""What growing trees costs in vLLM, against independent sampling of the same number of tokens.

    python -m benchmarks.rollouts [--quick] [--questions 8 32 128] [--graders 0 1 10] [--json FILE]

The engine is real; lengths are scripted (lognormal, the same for all modes), since random weights have none of their
own. Modes, all with the paper's tree (4, 9, 1, 1) unless said:

- `independent`: 8 rollouts per question, about the tokens of a tree; every ratio is to this;
- `reproducible`: the same with `reproducible_rollouts`, a seed per request;
- `independent_12`: as many rollouts as the tree has trajectories;
- `lock_step`: every round waits for all trees;
- `tree` with `lookahead` 0 (the paper, without barriers between trees) and more;
- with graders of `--graders` seconds a completion, as many at once as there are: `independent` again, `tree`, and the
  strategies that do not look at rewards, whose trees wait for none. Ratios are to `independent` with the same grader.

`steps_per_token` counts engine steps and does not depend on the machine; where a step costs the same whatever the
batch, as on a GPU bound by memory, wall clock tends to it.
"""

import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from benchmarks import common
from trl_ibtpo.engines.base import RolloutRequest
from trl_ibtpo.engines.vllm import VLLMEngine
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.segments import make_grower

PROMPT_TOKENS = 64
SAMPLING = {"repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
LENGTH_SIGMA = 0.6


@dataclass(frozen=True)
class Lengths:
    """Of completions, in tokens, with the proportions of the default."""

    median: int = 80

    @property
    def longest(self) -> int:
        return self.median * 16 // 5

    @property
    def step(self) -> int:
        return self.median * 3 // 20


class ScriptedLengths(VLLMEngine):
    """The colocated engine on scripted completion lengths, counting its steps and the time spent in vLLM."""

    def __init__(self, llm, lengths: Lengths, seed: int, request_seeds: bool):
        super().__init__(llm, {**SAMPLING, "ignore_eos": True}, request_seeds)
        self._script, self._lengths = seed, lengths
        self.steps, self.inside = 0, 0.0

    def submit(self, requests):
        begin = time.perf_counter()
        super().submit([self._with_length(request) for request in requests])
        self.inside += time.perf_counter() - begin

    def poll(self):
        step = self._llm_engine.step
        begin = time.perf_counter()
        outputs = step()
        self.inside += time.perf_counter() - begin
        self.steps += 1
        self._llm_engine.step = lambda: outputs
        try:
            return super().poll()
        finally:
            del self._llm_engine.step

    def _with_length(self, request: RolloutRequest) -> RolloutRequest:
        """A completion goes on until a total length drawn from the lengths that its prefix has not yet passed."""
        rng = random.Random(request.seed + self._script)
        done = len(request.prefix_ids) - PROMPT_TOKENS
        question = random.Random(hash(tuple(request.prefix_ids[:PROMPT_TOKENS])))
        median = self._lengths.median * np.exp(question.gauss(0, LENGTH_SIGMA / 2))
        total = next(
            (t for t in (rng.lognormvariate(np.log(median), LENGTH_SIGMA) for _ in range(200)) if t >= done + 1),
            done + self._lengths.step,
        )
        budget = max(1, min(request.max_tokens, int(total) - done))
        return RolloutRequest(request.request_id, request.prefix_ids, budget, request.seed)


class LockStep:
    """Makes every poll wait for all that was submitted."""

    def __init__(self, engine):
        self.engine, self.max_length = engine, engine.max_length

    def submit(self, requests):
        self.engine.submit(requests)

    def poll(self):
        finished = []
        while self.engine._in_flight:
            finished += self.engine.poll()
        return finished

    def abort(self):
        self.engine.abort()


@dataclass
class Mode:
    name: str
    lookahead: int = 0
    settings: dict = field(default_factory=dict)
    lock_step: bool = False
    request_seeds: bool = False
    grader: float = 0.0  # seconds


LOOKAHEADS = (0, 1, 2, 3, 4, 8)
INDEPENDENT = {"branching": "independent", "tree_levels": 1}
MODES = [
    Mode("independent", settings={**INDEPENDENT, "tree_initial_rollouts": 8}),
    Mode("reproducible", settings={**INDEPENDENT, "tree_initial_rollouts": 8}, request_seeds=True),
    Mode("independent_12", settings={**INDEPENDENT, "tree_initial_rollouts": 12}),
    Mode("lock_step", lock_step=True),
    *(Mode("tree", lookahead) for lookahead in LOOKAHEADS),
]


def with_grader(seconds: float) -> list[Mode]:
    """Modes that wait for a grader, and those that do not; the first is what the others are compared with."""
    shapes = [
        ("independent", 0, MODES[0].settings),
        ("tree", 3, {}),
        ("confidence", 4, {"branching": "confidence"}),
        ("random", 4, {"branching": "random"}),
        ("surprisal", 0, {"branching": "surprisal", "tree_levels": 2, "tree_nodes_per_level": 2}),
        ("segments", 0, {"branching": "segments"}),
    ]
    return [Mode(name, lookahead, settings, grader=seconds) for name, lookahead, settings in shapes]


class SlowGrader(common.ScriptedScorer):
    """Knows the success of a leaf some seconds after it was asked; all leaves are graded at once."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds, self.due = seconds, []

    def submit(self, leaves):
        super().submit(leaves)
        self.due += [time.monotonic() + self.seconds] * len(leaves)

    def collect(self, wait):
        if wait and self.due:
            time.sleep(max(0.0, self.due[0] - time.monotonic()))
        ready = sum(due <= time.monotonic() for due in self.due)
        scored, self.scored, self.due = self.scored[:ready], self.scored[ready:], self.due[ready:]
        return scored


def start_engine(
    layers: int,
    hidden: int,
    max_num_seqs: int,
    quick: bool = False,
    size: str | None = None,
    lengths: Lengths = Lengths(),
) -> Any:
    """A random Qwen3 in an engine inside this process, as TRL starts it.

    A quick start compiles nothing, and makes steps slower on a CPU.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if quick:
        os.environ["VLLM_CPU_CI_ENV"] = "1"
    from vllm import LLM

    from benchmarks import sizes, tiny
    from trl_ibtpo.engines.vllm_cpu import runs_on_cpu

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    path, longest = tempfile.mkdtemp(), PROMPT_TOKENS + lengths.longest
    if size is None:
        tiny.save_tiny(path, tiny.byte_level_tokenizer(), layers=layers, hidden=hidden)
    else:
        sizes.save_random(path, size)
    options: dict[str, Any] = {"gpu_memory_utilization": 0.6}
    if runs_on_cpu():
        options = {
            "dtype": "float32",  # vLLM would take bfloat16, which many CPUs compute slowly
            "block_size": 32,  # the smallest on a CPU; 16 on a GPU
            "enable_chunked_prefill": False,  # see `CPUVLLMGeneration`
        }
    return LLM(
        model=path,
        max_model_len=longest,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=4096,
        hf_overrides={"max_position_embeddings": longest},
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="external_launcher",
        enforce_eager=quick,
        **options,
    )


def run(llm, mode: Mode, questions: int, seed: int, lengths: Lengths = Lengths()) -> dict[str, float]:
    """Grow all trees once."""
    llm.reset_prefix_cache()
    rng = random.Random(1000 * questions + seed)
    settings = GrowthSettings(max_completion_length=lengths.longest, branch_lookahead=mode.lookahead, **mode.settings)
    growers = [
        make_grower(
            [rng.randrange(5, 300) for _ in range(PROMPT_TOKENS)],
            settings,
            common.FixedSteps(lengths.step),
            (seed, index),
        )
        for index in range(questions)
    ]
    engine = ScriptedLengths(llm, lengths, seed, mode.request_seeds)
    begin = time.perf_counter()
    drive(growers, LockStep(engine) if mode.lock_step else engine, SlowGrader(mode.grader))
    seconds = time.perf_counter() - begin
    tokens = sum(grower.tree.generated_tokens for grower in growers)
    return {
        "generated_tokens": tokens / questions,
        "seconds_per_token": seconds / tokens,
        "steps_per_token": engine.steps / tokens,
        "cached_share": engine.cached_tokens / engine.prefix_tokens,
        "own_share": 1 - engine.inside / seconds,
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--questions", type=int, nargs="+", default=[8, 32, 128])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--hidden", type=int, default=512)
    arguments.add_argument("--size", help="a key of benchmarks.sizes.SIZES, in place of --layers and --hidden")
    arguments.add_argument("--median-length", type=int, default=80, help="of completions; at most 3.2 times as long")
    arguments.add_argument("--graders", type=float, nargs="*", default=[0, 1, 10], help="seconds; with 32 questions")
    names = list(dict.fromkeys(mode.name for mode in MODES))
    arguments.add_argument("--modes", nargs="+", choices=names, default=names, help="besides `independent`")
    arguments.add_argument("--lookahead", type=int, nargs="+", default=list(LOOKAHEADS), help="of `tree`")
    args = arguments.parse_args()
    modes = [mode for mode in MODES if mode.name in ("independent", *args.modes)]
    modes = [mode for mode in modes if mode.name != "tree" or mode.lookahead in args.lookahead]
    graded = 32
    if args.quick:
        args.questions, args.repeats, args.layers, args.hidden, args.graders = [2], 1, 2, 64, [0.1]
        graded = 2
    groups = [(questions, modes) for questions in args.questions]
    groups += [(graded, with_grader(seconds)) for seconds in args.graders]
    lengths, most = Lengths(args.median_length), max(questions for questions, _ in groups)
    llm = start_engine(args.layers, args.hidden, 12 * most, args.quick, args.size, lengths)
    run(llm, MODES[0], min(questions for questions, _ in groups), 99, lengths)  # warm up
    rows = []
    with tqdm(total=args.repeats * sum(len(modes) for _, modes in groups), unit="run") as progress:
        for questions, modes in groups:
            runs = {index: [] for index in range(len(modes))}
            for repeat in range(args.repeats):  # interleaved: every repeat measures every mode
                for index, mode in enumerate(modes):
                    progress.set_description(f"{questions} questions, {mode.name} {mode.lookahead}")
                    runs[index].append(run(llm, mode, questions, repeat, lengths))
                    progress.update()
            for index, mode in enumerate(modes):
                row = {"mode": mode.name, "questions": questions, "lookahead": mode.lookahead, "grader": mode.grader}
                row |= {key: float(np.mean([each[key] for each in runs[index]])) for key in runs[index][0]}
                for name, key in (("time_ratio", "seconds_per_token"), ("step_ratio", "steps_per_token")):
                    ratios = [mine[key] / base[key] for mine, base in zip(runs[index], runs[0], strict=True)]
                    row[name], row[f"{name}_se"] = common.mean_and_error(ratios)
                rows.append(row)
    common.report("Growing trees in vLLM", rows, args)


if __name__ == "__main__":
    main()
