"""Which rule should share out rollouts: published ones and `adaptive_budget` against fixed groups, on shared samples.

    python -m benchmarks.budget [--quick] [--questions 256] [--model FOLDER] [--mixtures_only] [--json FILE]

The model is the quickstart's before IB-TPO, on its own task, on the easier half (4 terms) and on the harder one
(6 terms). Mixtures need no model: the success rates of questions are drawn from a beta distribution, and completions
have one token. A batch holds 16 questions of G = 12 rollouts on average, as in the quickstart.

`effective_groups` is the share of questions whose answers differ, `teaching_rows` the share of rows that belong to one
of these, both with standard errors over batches; `tokens` are sampled per question, `most` is the largest group. All
rules see the same samples: the n-th answer to a question is the same in each.

Published rules are served one leaf after the other, each knowing all answers before, which no engine that is kept full
can do; `adaptive_budget` is what training does (`trl_ibtpo.budget`). Trees (`ib`) are grown with a model only.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from benchmarks import common
from trl_ibtpo.budget import contrast
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive, leaf_budget
from trl_ibtpo.steps import StepSplitter
from trl_ibtpo.tree_grower import TreeGrower

BATCH, INITIAL, GROUP = 16, 4, 12  # questions, rollouts
MOST = BATCH * GROUP - (BATCH - 1) * INITIAL  # rollouts that one question may be given
MIXTURES = {"mixed": (0.4, 0.6), "hard": (0.2, 1.0), "easy": (1.0, 0.25)}  # of success rates: Beta(a, b)
MAX_COMPLETION_LENGTH = 64  # the quickstart's
TASKS = {"quickstart": (4, 6), "easier": (4, 4), "harder": (6, 6)}  # terms of the sums

# ----- published rules, as the priority of the next rollout of a question with these answers -------------------------


def pilot_commit(answers: np.ndarray) -> tuple:
    """Pilot-Commit (arXiv 2605.26606): go on where the first rollouts were right in 0.125 to 0.75 of the cases."""
    return (0.125 <= answers[:INITIAL].mean() <= 0.75, -len(answers))


def reinforce_ada(answers: np.ndarray, wanted: int) -> tuple:
    """Reinforce-Ada (arXiv 2510.04996): rounds for all questions that do not have `wanted` of each outcome."""
    return (contrast(answers) < wanted, -len(answers))


def knapsack(answers: np.ndarray) -> tuple:
    """Knapsack (arXiv 2509.25849): what the next one adds to P(mixed) * p (1 - p)^2, `p` the posterior mean."""
    p, n = (answers.sum() + 1) / (len(answers) + 2), len(answers)
    return ((p**n * (1 - p) + (1 - p) ** n * p) * p * (1 - p) ** 2, -n)


def vip(answers: np.ndarray) -> tuple:
    """VIP (arXiv 2602.01601): n - 1 proportional to sqrt(p (1 - p))."""
    p, n = (answers.sum() + 1) / (len(answers) + 2), len(answers)
    return (np.sqrt(p * (1 - p)) / n, -n)


def missing_outcome(answers: np.ndarray, wanted: int) -> tuple:
    """In the manner of TRACE (arXiv 2606.11119): where the rarer outcome is likeliest, until there are `wanted`."""
    p, n = (answers.sum() + 1) / (len(answers) + 2), len(answers)
    return (min(p, 1 - p) if contrast(answers) < wanted else 0.0, -n)


RULES: dict[str, Callable[[np.ndarray], tuple]] = {
    "pilot_commit": pilot_commit,
    "knapsack": knapsack,
    "vip": vip,
    **{f"reinforce_ada {wanted}": partial(reinforce_ada, wanted=wanted) for wanted in (1, 2)},
    **{f"missing_outcome {wanted}": partial(missing_outcome, wanted=wanted) for wanted in (1, 2)},
}
FIXED, ADAPTIVE = (8, 12, 16), (1, 2, 3, 100)


def served_in_turn(rule: Callable[[np.ndarray], tuple], success: np.ndarray) -> list[int]:
    """Leaves of each question of a batch, `success` being `(P, S)`."""
    leaves = [INITIAL] * len(success)
    priorities = [rule(answers[:INITIAL]) for answers in success]
    while sum(leaves) < GROUP * len(success):
        best = max((i for i in range(len(success)) if leaves[i] < success.shape[1]), key=priorities.__getitem__)
        leaves[best] += 1
        priorities[best] = rule(success[best, : leaves[best]])
    return leaves


class Scripted:
    """An engine whose n-th rollout of question `i` has one token, and of which the scorer knows the success."""

    max_length, clock = None, "polls"

    def __init__(self):
        self.queue = []

    def submit(self, requests):
        self.queue += requests

    def poll(self):
        queue, self.queue = self.queue, []
        return [Rollout(request.request_id, [request.request_id[1]], [-1.0]) for request in queue]

    def generated(self, request_id):
        return 0

    def abort(self):
        self.queue = []


def figures(success: list[np.ndarray], tokens: float) -> dict[str, float]:
    """Of one batch: what each question was answered, and tokens sampled for all of them."""
    mixed = np.array([answers.min() < answers.max() for answers in success])
    leaves = np.array([len(answers) for answers in success])
    return {
        "effective_groups": mixed.mean(),
        "teaching_rows": leaves[mixed].sum() / leaves.sum(),
        "tokens": tokens / len(success),
        "most": leaves.max(),
    }


def rules_on(success: np.ndarray, tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """All rules on one batch; both `(P, S)`."""

    def of(leaves):
        return figures(
            [answers[:count] for answers, count in zip(success, leaves, strict=True)],
            sum(lengths[:count].sum() for lengths, count in zip(tokens, leaves, strict=True)),
        )

    found = {f"fixed {group}": of([group] * len(success)) for group in FIXED}
    found |= {name: of(served_in_turn(rule, success)) for name, rule in RULES.items()}
    for wanted in ADAPTIVE:
        growth = GrowthSettings(branching="independent", adaptive_budget=wanted)
        growers = [TreeGrower([index], growth, common.FixedSteps(1)) for index in range(len(success))]
        scorer = common.ScriptedScorer(lambda tree, ids: float(success[tree, ids[0]]))
        drive(growers, Scripted(), scorer, budget=leaf_budget(growth, len(growers)))
        found[f"adaptive_budget {wanted}"] = of([len(grower.tree.leaves) for grower in growers])
    return found


def trees_on(engine, tokenizer, entries: list[dict], is_right) -> dict[str, dict[str, float]]:
    """Fixed and adaptive trees on one batch of questions."""
    found = {}
    for wanted in (None, *ADAPTIVE):
        growth = GrowthSettings(max_completion_length=MAX_COMPLETION_LENGTH, adaptive_budget=wanted)
        splitter = StepSplitter(tokenizer)
        growers = [TreeGrower(tokenizer(entry["question"])["input_ids"], growth, splitter) for entry in entries]
        engine.rewind()
        scorer = common.ScriptedScorer(lambda tree, ids: is_right(entries[tree], ids))
        drive(growers, engine, scorer, budget=leaf_budget(growth, len(growers)))
        name = "ib fixed 12" if wanted is None else f"ib adaptive_budget {wanted}"
        trees = [grower.tree for grower in growers]
        found[name] = figures([np.array(tree.success) for tree in trees], sum(tree.generated_tokens for tree in trees))
    return found


def sampled(engine, tokenizer, entries: list[dict], is_right):
    """Success and length of as many answers as a question may be given; both `(P, S)`."""
    growth = GrowthSettings(
        branching="independent",
        tree_levels=1,
        tree_initial_rollouts=MOST,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    splitter = StepSplitter(tokenizer)
    growers = [TreeGrower(tokenizer(entry["question"])["input_ids"], growth, splitter) for entry in entries]
    drive(growers, engine, common.ScriptedScorer(lambda tree, ids: is_right(entries[tree], ids)))
    trees = [grower.tree for grower in growers]
    return np.array([tree.success for tree in trees]), np.array([tree.ends()[tree.leaves] for tree in trees])


def summarize(source: str, batches: list[dict[str, dict[str, float]]]) -> list[dict]:
    rows = []
    for rule in batches[0]:
        row = {"source": source, "rule": rule, "questions": BATCH * len(batches)}
        for key in ("effective_groups", "teaching_rows"):
            row[key], row[f"{key}_se"] = common.mean_and_error([batch[rule][key] for batch in batches])
        row["tokens"] = float(np.mean([batch[rule]["tokens"] for batch in batches]))
        row["most"] = int(max(batch[rule]["most"] for batch in batches))
        rows.append(row)
    return rows


def with_model(args) -> list[dict]:
    """Fixed groups, rules and trees on the answers of a model."""
    # Here, since mixtures need none of it.
    import reasoning_gym
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.branching import SharedSamples
    from examples import quickstart

    if args.model is None:
        _, training = quickstart.make_questions(args.seed)
        steps = {"max_steps": 10} if args.quick else {}
        model, tokenizer = quickstart.warm_start(training, args.seed, **steps)
    else:
        model, tokenizer = (each.from_pretrained(args.model) for each in (AutoModelForCausalLM, AutoTokenizer))
    model.eval()

    def is_right(entry, ids):
        return float(quickstart.is_right(tokenizer.decode(ids, skip_special_tokens=True), entry))

    rows = []
    for name, (fewest, most) in TASKS.items():
        options = {"size": args.questions, "seed": 10_000 + args.seed, "min_digits": 1, "max_digits": 1}
        task = reasoning_gym.create_dataset("chain_sum", min_terms=fewest, max_terms=most, **options)
        entries, batches = list(task), []
        for start in tqdm(range(0, args.questions, BATCH), desc=name):
            torch.manual_seed(args.seed + start)
            engine, batch = SharedSamples(model, tokenizer), entries[start : start + BATCH]
            success, tokens = sampled(engine, tokenizer, batch, is_right)
            batches.append(rules_on(success, tokens) | trees_on(engine, tokenizer, batch, is_right))
        rows += summarize(name, batches)
    return rows


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--questions", type=int, default=256, help="of each task")
    arguments.add_argument("--mixture_questions", type=int, default=512)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", type=Path, help="a warm-started model of the quickstart, instead of a new one")
    arguments.add_argument("--mixtures_only", action="store_true", help="without a model")
    args = arguments.parse_args()
    if args.quick:
        args.questions, args.mixture_questions = BATCH, 4 * BATCH
    rows, rng = [], np.random.default_rng(args.seed)
    for name, (a, b) in tqdm(MIXTURES.items(), desc="mixtures"):
        batches = []
        for _ in range(args.mixture_questions // BATCH):
            rates = rng.beta(a, b, (BATCH, 1))
            success = (rng.random((BATCH, MOST)) < rates).astype(float)
            batches.append(rules_on(success, np.ones(success.shape)))
        rows += summarize(f"mixture {name}", batches)
    if not args.mixtures_only:
        rows += with_model(args)
    common.report("Which questions should get more rollouts", rows, args)


if __name__ == "__main__":
    main()
