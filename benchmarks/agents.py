"""Tools that take time: an optimizer step of trees over turns and of TRL's GRPO with the same tools.

    python -m benchmarks.agents [--quick] [--questions 8 32] [--latency 0.05 2] [--repeats 3] [--json FILE]

Real trainers on one real vLLM engine; the task is `benchmarks.agents_task`, whose tool sleeps for a time drawn
log-uniformly from `--latency` seconds, the same for the same expression. TRL generates a turn of all rows, then calls
their tools one after the other. Here tools run beside generation, 32 at a time.

- `grpo`: TRL's GRPOTrainer, 8 completions a question; ratios are to it, per generated token;
- `independent`: this trainer without a tree, 8 completions: what running tools beside generation saves by itself;
- `ibtpo`: the paper's tree (4, 9, 1, 1), about the tokens of 8 completions, without and with `branch_lookahead`.

`idle` is the share of the generation's wall clock outside of vLLM's steps: the engine has nothing to do. Observations
are no generated tokens. `serial` is what the calls of a step would take one after the other.
"""

import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks import agents_task, common
from benchmarks.trainer_pair import FLAT, TREE, make_trainers, start_over
from trl_ibtpo.branching import make_strategy

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29514")


@dataclass
class Method:
    name: str
    group_size: int
    lookahead: int = 0
    growth: dict = field(default_factory=dict)  # settings of the tree


METHODS = [
    Method("grpo", 8),
    Method("independent", 8, growth=FLAT),
    Method("ibtpo", 12, growth=TREE),
    Method("ibtpo", 12, lookahead=3, growth=TREE),
]


class SlowCalculator:
    """The tool, which sleeps first, and what it cost."""

    def __init__(self, shortest: float, longest: float):
        self.bounds = np.log([shortest, longest]) if shortest > 0 else None
        self.slept: list[float] = []

    def tool(self):
        def calculate(expression: str) -> str:
            """
            Calculate modulo 23.

            Args:
                expression: Two numbers and what to do with them, one of + - *.
            """
            if self.bounds is not None:
                self.slept.append(float(np.exp(random.Random(expression).uniform(*self.bounds))))
                time.sleep(self.slept[-1])
            return agents_task.calculate(expression)

        return calculate


class EngineClock:
    """In place of a vLLM engine's `step`: counts the time spent in it."""

    def __init__(self, engine):
        self._step, self.busy = engine.step, 0.0
        engine.step = self

    def __call__(self):
        begin = time.perf_counter()
        try:
            return self._step()
        finally:
            self.busy += time.perf_counter() - begin


def run(trainer, method: Method, questions: int, seed: int, clock: EngineClock, slow: SlowCalculator) -> dict:
    """One optimizer step."""
    args = trainer.args
    args.gradient_accumulation_steps = args.steps_per_generation = questions
    start_over(trainer, method.group_size, 1 + seed)
    for name, value in method.growth.items():
        setattr(args, name, value)
    args.branch_lookahead = method.lookahead
    if method.name != "grpo":
        trainer._strategy, trainer._branching = make_strategy(args.branching), args.branching
    trainer._step = 0
    clock.busy, found = 0.0, {}
    slow.slept.clear()
    generate = trainer._generate_and_score_completions

    def measured(inputs):
        begin = time.perf_counter()
        output = generate(inputs)
        found["generation_seconds"] = time.perf_counter() - begin
        found["generated_tokens"] = int((output["completion_mask"] * output["tool_mask"]).sum())
        return output

    trainer._generate_and_score_completions = measured
    begin = time.perf_counter()
    trainer.train()
    found["seconds"] = time.perf_counter() - begin
    del trainer._generate_and_score_completions
    last = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry][-1]
    if "tree/generated_tokens" in last:
        found["generated_tokens"] = round(questions * last["tree/generated_tokens"])
    found["idle"] = 1 - clock.busy / found["generation_seconds"]
    return {**found, "calls": len(slow.slept), "serial": sum(slow.slept)}


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--questions", type=int, nargs="+", default=[8, 32], help="per optimizer step")
    arguments.add_argument(
        "--latency", type=float, nargs=2, default=[0.05, 2.0], help="seconds, from and to; 0 0: none"
    )
    arguments.add_argument("--warm-start", type=Path, help="folder of the model; made there where it is missing")
    args = arguments.parse_args()
    if args.quick:
        os.environ["VLLM_CPU_CI_ENV"] = "1"
        args.repeats, args.questions, args.latency = 1, [2], [0.05, 0.2]
    folder = args.warm_start or Path(tempfile.mkdtemp())
    path = agents_task.warm_start(folder, *([2, 8] if args.quick else []))
    slow = SlowCalculator(*args.latency)
    grpo, ibtpo = make_trainers(
        str(path),
        agents_task.right_answer,
        agents_task.rows(512, seed=0),
        args.questions[0],
        tools=[slow.tool()],
        max_steps=1,
        learning_rate=1e-9,  # every run samples from the same policy
        max_completion_length=agents_task.MAX_LENGTH,
        max_tool_calling_iterations=6,
        vllm_max_model_length=160,
        vllm_gpu_memory_utilization=0.3,
    )
    clock = EngineClock(ibtpo.vllm_generation.llm.llm_engine)
    run(grpo, METHODS[0], 2, -1, clock, slow)  # not measured: the first steps of an engine take longer
    rows = []
    with tqdm(total=args.repeats * len(args.questions) * len(METHODS), unit="run") as progress:
        for questions in args.questions:
            runs: list[list[dict]] = [[] for _ in METHODS]
            for repeat in range(args.repeats):  # interleaved: every repeat measures every method
                for index, method in enumerate(METHODS):
                    progress.set_description(f"{method.name} {method.group_size} {method.lookahead}")
                    trainer = grpo if method.name == "grpo" else ibtpo
                    runs[index].append(run(trainer, method, questions, repeat, clock, slow))
                    progress.write(f"{questions} questions, {method.name} {method.lookahead}: {runs[index][-1]}")
                    progress.update()
            for method, mine in zip(METHODS, runs, strict=True):
                row = {"questions": questions, "method": method.name, "group_size": method.group_size}
                row["lookahead"] = method.lookahead
                row |= {key: float(np.mean([each[key] for each in mine])) for key in mine[0]}
                ratios = [
                    (each["seconds"] / each["generated_tokens"]) / (base["seconds"] / base["generated_tokens"])
                    for each, base in zip(mine, runs[0], strict=True)
                ]
                row["time_ratio"], row["time_ratio_se"] = common.mean_and_error(ratios)
                row["idle_se"] = common.mean_and_error([each["idle"] for each in mine])[1]
                rows.append(row)
    seconds = " to ".join(f"{each:g}" for each in args.latency)
    common.report(f"One optimizer step with tools of {seconds} seconds", rows, args)


if __name__ == "__main__":
    main()
