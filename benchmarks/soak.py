"""Whether anything is left behind: generation batches on the real vLLM engine, some aborted, some failing.

    python -m benchmarks.soak [--quick] [--runs 10] [--batches 200] [--json FILE]

After every batch the engine must hold no request; after every run the memory of the process is reported, and how many
blocks Python's allocator has given out, which counts every object of vLLM's and this package's Python code.
"""

import gc
import random
import sys

import psutil
from tqdm.auto import tqdm

from benchmarks import common, rollouts
from trl_ibtpo.engines.vllm import VLLMEngine
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.tree_grower import TreeGrower


class Aborted(Exception):
    pass


class FailingScorer(common.ScriptedScorer):
    """Raises at a call drawn beforehand."""

    def __init__(self, fails_at: int):
        super().__init__()
        self.calls_left = fails_at

    def submit(self, leaves):
        self.calls_left -= 1
        if not self.calls_left:
            raise ValueError("the reward function fails")
        super().submit(leaves)


def batch(llm, rng: random.Random) -> str:
    """Grow three trees with a lookahead and a fate drawn at random; returns the fate."""
    fate = rng.choice(["grown", "grown", "aborted", "failed"])
    settings = GrowthSettings(max_completion_length=16, branch_lookahead=rng.choice([0, 2, 8]))
    growers = [
        TreeGrower([rng.randrange(5, 300) for _ in range(8)], settings, common.FixedSteps(12), (rng.randrange(2**31),))
        for _ in range(3)
    ]
    aborts_at, finished = rng.randrange(1, 30), 0

    def on_rollout():
        nonlocal finished
        finished += 1
        if fate == "aborted" and finished == aborts_at:
            raise Aborted

    scorer = FailingScorer(rng.randrange(1, 4)) if fate == "failed" else common.ScriptedScorer()
    try:
        drive(growers, VLLMEngine(llm, rollouts.SAMPLING), scorer, on_rollout)
    except (Aborted, ValueError):
        assert fate != "grown"
    else:
        assert all(grower.done for grower in growers)
        fate = "grown"  # also where the trees were done before the call that was to fail
    assert not llm.llm_engine.has_unfinished_requests(), f"a request is left behind: {fate}"
    return fate


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=10)
    arguments.add_argument("--batches", type=int, default=200)
    args = arguments.parse_args()
    if args.quick:
        args.runs, args.batches = 2, 5
    llm = rollouts.start_engine(layers=2, hidden=64, max_num_seqs=36, quick=args.quick)
    process, rows = psutil.Process(), []
    with tqdm(total=args.runs * args.batches, unit="batch") as progress:
        for run in range(args.runs):
            rng, fates = random.Random(run), []
            for _ in range(args.batches):
                fates.append(batch(llm, rng))
                progress.update()
            row = {"run": run, **{fate: fates.count(fate) for fate in ("grown", "aborted", "failed")}}
            processor = llm.llm_engine.output_processor
            row["requests_left"] = processor.get_num_unfinished_requests()
            gc.collect()
            row["python_blocks"] = sys.getallocatedblocks()
            row["memory_mib"] = process.memory_info().rss / 2**20
            rows.append(row)
    common.report("Generation batches that end badly", rows, args)


if __name__ == "__main__":
    main()
