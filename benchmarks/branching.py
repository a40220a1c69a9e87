"""What choosing with older scores costs: trees of every strategy and lookahead on a warm-started model.

    python -m benchmarks.branching [--quick] [--questions 1024] [--json FILE]

The model is the quickstart's before IB-TPO. Eff-Rate is the share of questions whose completions differ in success,
Avg-Rate the mean success of all completions; both with standard errors over questions. Trees run on their own clock
in tokens, as in vLLM, so the figures are those of any engine that keeps up with it.
"""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from benchmarks import common
from examples import quickstart
from trl_ibtpo.engines.transformers import TransformersEngine
from trl_ibtpo.growth import GrowthSettings, TreeGrower, grow_trees
from trl_ibtpo.steps import StepSplitter

INDEPENDENT = {"branching": "independent", "levels": 1}
MODES = [
    ("independent", {**INDEPENDENT, "initial_rollouts": 8}),
    ("independent", {**INDEPENDENT, "initial_rollouts": 12}),
    ("random", {"branching": "random"}),
    ("confidence", {"branching": "confidence"}),
    ("ib", {}),
    *(("ib", {"branch_lookahead": lookahead}) for lookahead in (1, 2, 4, 8)),
]


class Verifier:
    """Success of a completion by the task's own verifier."""

    def __init__(self, tokenizer, entries):
        self.tokenizer, self.entries, self.scored = tokenizer, entries, []

    def submit(self, leaves):
        texts = self.tokenizer.batch_decode([ids for _, _, ids in leaves], skip_special_tokens=True)
        for (tree, number, _), text in zip(leaves, texts, strict=True):
            self.scored.append((tree, number, float(quickstart.is_right(text, self.entries[tree]))))

    def collect(self, wait):
        scored, self.scored = self.scored, []
        return scored

    def cancel(self):
        self.scored = []


def measure(model, tokenizer, entries, overrides: dict, seed: int) -> dict[str, np.ndarray]:
    """Effective (0/1), mean success and generated tokens of each question's tree."""
    torch.manual_seed(seed)
    settings = GrowthSettings(max_completion_length=quickstart.MAX_COMPLETION_LENGTH, **overrides)
    splitter = StepSplitter(tokenizer)
    growers = [
        TreeGrower(tokenizer(entry["question"])["input_ids"], settings, splitter, (seed, index))
        for index, entry in enumerate(entries)
    ]
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    engine = TransformersEngine(model, config, tokenizer.pad_token_id)
    grow_trees(growers, engine, Verifier(tokenizer, entries))
    success = np.array([grower.success for grower in growers])
    return {
        "effective_rate": (success.min(1) < success.max(1)).astype(float),
        "average_success": success.mean(1),
        "generated_tokens": np.array([grower.tree.generated_tokens for grower in growers], dtype=float),
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--questions", type=int, default=1024)
    arguments.add_argument("--chunk", type=int, default=128, help="questions grown together")
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
            for index, (strategy, overrides) in enumerate(MODES):
                progress.set_description(f"{strategy} {overrides.get('branch_lookahead', 0)}")
                chunk = entries[start : start + args.chunk]
                results[index].append(measure(model, tokenizer, chunk, overrides, seed=args.seed + start))
                progress.update()
    rows = []
    for index, (strategy, overrides) in enumerate(MODES):
        figures = {key: np.concatenate([part[key] for part in results[index]]) for key in results[index][0]}
        settings = GrowthSettings(**overrides)
        row = {
            "strategy": strategy,
            "group_size": settings.leaves,
            "lookahead": settings.branch_lookahead,
            "questions": args.questions,
        }
        for key in ("effective_rate", "average_success"):
            row[key], row[f"{key}_se"] = common.mean_and_error(figures[key])
        row["generated_tokens"] = float(figures["generated_tokens"].mean())
        rows.append(row)
    common.report("Where to branch, and with scores of what age", rows, args.json)


if __name__ == "__main__":
    main()
