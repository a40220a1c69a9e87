"""What choosing with older scores costs: trees of every strategy and lookahead on a warm-started model.

    python -m benchmarks.branching [--quick] [--questions 1024] [--json FILE]

The model is the quickstart's before IB-TPO. Eff-Rate is the share of questions whose completions differ in success,
Avg-Rate the mean success of all completions; both with standard errors over questions. `branched_steps` counts the
different steps that a tree was branched after. Trees run on their own clock
in tokens, as in vLLM, so the figures are those of any engine that keeps up with it.

All modes share their samples: the n-th continuation of a prefix is the same in each, drawn when a mode first asks for
it. Within a mode samples are independent as ever; between modes only the choice of steps differs, so their difference
(`..._to_exact`, with its own standard error) is known better than either figure.
"""

from collections import Counter, defaultdict

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from benchmarks import common
from examples import quickstart
from trl_ibtpo.engines.base import Rollout, RolloutRequest
from trl_ibtpo.engines.transformers import TransformersEngine
from trl_ibtpo.growth import GrowthSettings, TreeGrower, drive
from trl_ibtpo.steps import StepSplitter

INDEPENDENT = {"branching": "independent", "tree_levels": 1}
MODES = [
    ("independent", {**INDEPENDENT, "tree_initial_rollouts": 8}),
    ("independent", {**INDEPENDENT, "tree_initial_rollouts": 12}),
    ("random", {"branching": "random"}),
    ("confidence", {"branching": "confidence"}),
    ("ib", {}),
    *(("ib", {"branch_lookahead": lookahead}) for lookahead in (1, 2, 3, 4, 5, 8)),
]
EXACT = MODES.index(("ib", {}))


class SharedSamples:
    """An engine whose n-th continuation of a prefix is the same whenever it is asked for since `rewind` again."""

    def __init__(self, model, tokenizer):
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.engine = TransformersEngine(model, config, tokenizer.pad_token_id)
        self.samples = defaultdict(list)
        self.rewind()

    def rewind(self):
        self.asked, self.queue = Counter(), []

    def submit(self, requests):
        missing = []
        for request in requests:
            prefix = tuple(request.prefix_ids)
            index, self.asked[prefix] = self.asked[prefix], self.asked[prefix] + 1
            if index == len(self.samples[prefix]):
                self.samples[prefix].append(None)
                missing.append((prefix, index, request.max_tokens))
            self.queue.append((request.request_id, prefix, index))
        self.engine.submit(
            [RolloutRequest(str(row), list(prefix), budget, 0) for row, (prefix, _, budget) in enumerate(missing)]
        )
        for rollout in self.engine.poll():
            prefix, index, _ = missing[int(rollout.request_id)]
            self.samples[prefix][index] = (rollout.token_ids, rollout.logprobs)

    def poll(self):
        queue, self.queue = self.queue, []
        return [Rollout(request_id, *map(list, self.samples[prefix][index])) for request_id, prefix, index in queue]

    def generated(self, request_id):
        return 0  # all or nothing

    def abort(self):
        self.queue = []


def measure(engine: SharedSamples, tokenizer, entries, overrides: dict, seed: int) -> dict[str, np.ndarray]:
    """Effective (0/1), mean success, generated tokens and branched steps of each question's tree."""
    settings = GrowthSettings(max_completion_length=quickstart.MAX_COMPLETION_LENGTH, **overrides)
    splitter = StepSplitter(tokenizer)
    growers = [
        TreeGrower(tokenizer(entry["question"])["input_ids"], settings, splitter, (seed, index))
        for index, entry in enumerate(entries)
    ]

    def is_right(tree, ids):
        return float(quickstart.is_right(tokenizer.decode(ids, skip_special_tokens=True), entries[tree]))

    engine.rewind()
    drive(growers, engine, common.ScriptedScorer(is_right))
    success = np.array([grower.tree.success for grower in growers])
    return {
        "effective_rate": (success.min(1) < success.max(1)).astype(float),
        "average_success": success.mean(1),
        "generated_tokens": np.array([grower.tree.generated_tokens for grower in growers], dtype=float),
        "branched_steps": np.array([len(set(grower.tree.branch_steps) - {0}) for grower in growers], dtype=float),
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--questions", type=int, default=1024)
    arguments.add_argument("--chunk", type=int, default=512, help="questions grown together")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    if args.quick:
        args.questions = args.chunk = 16
    _, training = quickstart.make_questions(args.seed)
    model, tokenizer = quickstart.warm_start(training, args.seed, **({"max_steps": 10} if args.quick else {}))
    model.eval()
    entries = list(quickstart.make_task(args.questions, seed=10_000 + args.seed))
    results: dict[int, list] = {index: [] for index in range(len(MODES))}
    chunks = range(0, args.questions, args.chunk)
    with tqdm(total=len(chunks) * len(MODES), unit="run") as progress:
        for start in chunks:  # interleaved, chunk by chunk
            torch.manual_seed(args.seed + start)
            engine = SharedSamples(model, tokenizer)
            for index, (strategy, overrides) in enumerate(MODES):
                progress.set_description(f"{strategy} {overrides.get('branch_lookahead', 0)}")
                chunk = entries[start : start + args.chunk]
                results[index].append(measure(engine, tokenizer, chunk, overrides, seed=args.seed + start))
                progress.update()
    figures_of = [
        {key: np.concatenate([part[key] for part in results[index]]) for key in results[index][0]}
        for index in range(len(MODES))
    ]
    rows = []
    for (strategy, overrides), figures in zip(MODES, figures_of, strict=True):
        settings = GrowthSettings(**overrides)
        row = {
            "strategy": strategy,
            "group_size": settings.leaves,
            "lookahead": settings.branch_lookahead,
            "questions": args.questions,
        }
        for key in ("effective_rate", "average_success"):
            row[key], row[f"{key}_se"] = common.mean_and_error(figures[key])
            difference = figures[key] - figures_of[EXACT][key]
            row[f"{key}_to_exact"], row[f"{key}_to_exact_se"] = common.mean_and_error(difference)
        row |= {key: float(figures[key].mean()) for key in ("generated_tokens", "branched_steps")}
        rows.append(row)
    common.report("Where to branch, and with scores of what age", rows, args)


if __name__ == "__main__":
    main()
