"""Our own time while trees grow: all but the engine and the scorer, which are scripted here. No model, no torch.

    python -m benchmarks.growth [--quick] [--against DIR] [--repeats 3] [--json FILE]

`trl_ibtpo.growth.drive` is called as in training. The engine gives every running request one token a poll, as vLLM
does, and takes its continuations from a table; completions have half to one and a half times `length` tokens, steps
40. Every measurement is a process of its own. Time is processor time of its one thread, less what the engine and the
scorer took, so that other work on the machine hardly matters.

`--against DIR` measures another checkout as well, alternating with this one, and checks that both grow the same trees:

    git worktree add DIR COMMIT
    python -m benchmarks.growth --against DIR

`against_ratio` is its time over ours. `splitter` is `fixed` where steps are cut by counting, and `text` where the
package's `StepSplitter` looks for blank lines.
"""

import argparse
import gc
import hashlib
import inspect
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks import common

HERE = Path(__file__).parent.parent
PROMPT_TOKENS, STEP_TOKENS, POOL_TOKENS = 64, 40, 1_000_003
SHAPES = {12: (4, 9), 64: (8, 57)}  # initial rollouts and levels, one branch a level

BASE = {"questions": 32, "group_size": 12, "length": 2000, "lookahead": 0, "splitter": "fixed"}
VARIED = [
    {},
    {"length": 500},
    {"length": 8000},
    {"group_size": 64},
    *({"questions": questions} for questions in (128, 512, 1024)),
]
POINTS = [BASE | point | {"lookahead": lookahead} for lookahead in (0, 3) for point in VARIED]
POINTS.append(BASE | {"splitter": "text"})


# ----- one measurement -----------------------------------------------------------------------------------------------


class ScriptedEngine:
    """One token a poll for every request. Nothing but a request's prefix length and seed decide what it gets."""

    max_length, batched, clock = None, False, "tokens"

    def __init__(self, length: int):
        rng = np.random.default_rng(0)
        self.length, self.polls, self.seconds = length, 0, 0.0
        # Token 0 is the blank line of `ByteTokenizer`, one token in 40, as the steps of `FixedSteps` are long.
        blank = rng.random(POOL_TOKENS) < 1 / STEP_TOKENS
        self.token_ids = np.where(blank, 0, rng.integers(33, 127, POOL_TOKENS)).tolist()
        self.logprobs = (-rng.exponential(size=POOL_TOKENS)).tolist()
        self.in_flight, self.due = {}, {}  # request to poll of submission and place in the table; poll to its ends

    def submit(self, requests):
        begin = time.thread_time()
        for request in requests:
            rng, done = random.Random(request.seed), len(request.prefix_ids) - PROMPT_TOKENS
            total = rng.randint(max(self.length // 2, done + 1), max(self.length * 3 // 2, done + 1))
            tokens = min(request.max_tokens, total - done)
            place = rng.randrange(POOL_TOKENS - tokens)
            self.in_flight[request.request_id] = self.polls, place
            self.due.setdefault(self.polls + tokens, []).append((request.request_id, place, tokens))
        self.seconds += time.thread_time() - begin

    def poll(self):
        self.polls += 1
        ends = self.due.pop(self.polls, None)
        if ends is None:
            return []
        begin = time.thread_time()
        from trl_ibtpo.engines.base import Rollout

        rollouts = [Rollout(name, *self._slice(place, place + tokens)) for name, place, tokens in ends]
        for name, _, _ in ends:
            del self.in_flight[name]
        self.seconds += time.thread_time() - begin
        return rollouts

    def generated(self, request_id):
        if request_id not in self.in_flight:
            return 0
        return self.polls - self.in_flight[request_id][0]

    def partial(self, request_id, start, stop):
        begin = time.thread_time()
        place = self.in_flight[request_id][1]
        piece = self._slice(place + start, place + stop)
        self.seconds += time.thread_time() - begin
        return piece

    def _slice(self, start, stop):
        return self.token_ids[start:stop], self.logprobs[start:stop]

    def abort(self):
        self.in_flight.clear()


class TimedScorer(common.ScriptedScorer):
    seconds = 0.0

    def submit(self, leaves):
        begin = time.thread_time()
        super().submit(leaves)
        self.seconds += time.thread_time() - begin


class ByteTokenizer:
    """The least that `StepSplitter` asks of a tokenizer: printable bytes, and a blank line as token 0."""

    added_tokens_decoder, all_special_ids = {}, ()

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def convert_ids_to_tokens(self, ids):
        return [self.convert_ids_to_tokens(each) for each in ids] if isinstance(ids, list) else _piece(ids)


def _piece(token_id: int) -> str:
    return {0: "\u010a\u010a", 10: "\u010a"}.get(token_id, chr(token_id))


def measure(point: dict, profile: bool = False) -> dict:
    """Grow the trees of one point once, with whatever `trl_ibtpo` is first on the path."""
    from trl_ibtpo import growth
    from trl_ibtpo.steps import StepSplitter

    # Names that earlier commits had.
    drive = getattr(growth, "drive", None) or growth.grow_trees
    initial, levels = SHAPES[point["group_size"]]
    shape = {"initial_rollouts": initial, "levels": levels, "nodes_per_level": 1, "branches_per_node": 1}
    fields = growth.GrowthSettings.__dataclass_fields__
    settings = growth.GrowthSettings(
        **{key if key in fields else f"tree_{key}": value for key, value in shape.items()},
        max_completion_length=2 * point["length"],
        branch_lookahead=point["lookahead"],
    )
    timing = {"clock": "tokens"} if "clock" in inspect.signature(growth.TreeGrower).parameters else {}
    splitter = StepSplitter(ByteTokenizer()) if point["splitter"] == "text" else common.FixedSteps(STEP_TOKENS)
    engine, scorer = ScriptedEngine(point["length"]), TimedScorer()
    prompts = [[index] * PROMPT_TOKENS for index in range(point["questions"])]
    gc.collect()
    gc.freeze()  # the table of samples is not ours, and garbage collection would look through it

    begin = time.thread_time()
    growers = [
        growth.TreeGrower(prompt, settings, splitter, (0, index), **timing) for index, prompt in enumerate(prompts)
    ]
    drive(growers, engine, scorer)
    seconds = time.thread_time() - begin - engine.seconds - scorer.seconds
    trees = [grower.tree for grower in growers]
    return {
        "seconds": seconds,
        "tokens": sum(tree.generated_tokens for tree in trees),
        "digest": digest(growers),
    }


def digest(growers) -> str:
    """Of every tree's parents, ends of steps, leaves, branched steps and successes."""
    sha = hashlib.sha256()
    for grower in growers:
        tree = grower.tree
        success = getattr(tree, "success", None) or grower.success
        steps = [(int(step.parent), int(step.end)) for step in tree.steps]
        leaves = [(int(leaf), int(after)) for leaf, after in zip(tree.leaves, tree.branch_steps, strict=True)]
        sha.update(json.dumps([steps, leaves, [float(value) for value in success]]).encode())
    return sha.hexdigest()


# ----- all of them ---------------------------------------------------------------------------------------------------


def in_process(point: dict, package: Path) -> dict:
    """`measure` in a new process with the `trl_ibtpo` of a checkout."""
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(point), "--package", str(package)]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"Measuring {point} with {package} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def work(point: dict, package: Path) -> None:
    """What such a process does: print its figures as a line of JSON."""
    sys.path.insert(0, str(package))
    import trl_ibtpo

    assert Path(trl_ibtpo.__file__).is_relative_to(package), trl_ibtpo.__file__
    figures = measure(point)
    assert "torch" not in sys.modules
    print(json.dumps(figures))


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--against", type=Path, metavar="DIR", help="a checkout to measure as well")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # for the processes it starts
    arguments.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.point:
        work(args.point, args.package)
        return
    points = POINTS
    if args.quick:
        args.repeats = 2
        points = [point | {"questions": max(2, point["questions"] // 32)} for point in POINTS]
    packages = [HERE] + ([args.against.resolve()] if args.against else [])
    rows = []
    with tqdm(total=len(points) * args.repeats * len(packages), unit="run") as progress:
        for point in points:
            runs = [[] for _ in packages]
            for _ in range(args.repeats):  # interleaved
                for index, package in enumerate(packages):
                    runs[index].append(in_process(point, package))
                    progress.update()
            rows.append(point | figures(runs, rows))
    common.report("Our own time while trees grow", rows, args)


def figures(runs: list[list[dict]], rows: list[dict]) -> dict:
    """One row's figures: `runs` of this checkout and, where there is one, of the other."""
    ours, *others = [np.array([run["seconds"] / run["tokens"] for run in each]) for each in runs]
    row = {}
    row["own_seconds_per_token"], row["own_seconds_per_token_error"] = common.mean_and_error(ours)
    first = rows[0]["own_seconds_per_token"] if rows else row["own_seconds_per_token"]
    row["own_ratio"], row["own_ratio_error"] = common.mean_and_error(ours / first)
    row["digest"] = runs[0][0]["digest"][:12]
    if others:
        row["against_seconds_per_token"], row["against_seconds_per_token_error"] = common.mean_and_error(others[0])
        row["against_ratio"], row["against_ratio_error"] = common.mean_and_error(others[0] / ours)
        row["same_trees"] = len({run["digest"] for each in runs for run in each}) == 1
    return row


if __name__ == "__main__":
    main()
