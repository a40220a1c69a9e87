"""Where to branch, and with how many siblings: trees of every strategy and shape on policies of different skill.

    python -m benchmarks.branching [--quick] [--tasks chain7 chain10] [--chain_steps 6 12] [--json FILE]

The policies are the models that `benchmarks.learning` starts from on `--tasks`, simulated ones that answer chains of
`--chain_steps` operations (`benchmarks.simulated`), and the quickstart's model before IB-TPO, after as many supervised
steps as `--warm_steps` says. Eff-Rate is the share of
questions whose completions differ in success, Avg-Rate the mean success of all completions; both with standard errors
over questions. `distinct_answers` counts the different answers of a question's completions, `branched_steps` the
different steps that a tree was branched after. Trees run on their own clock in tokens, as in vLLM, so the figures are
those of any engine that keeps up with it.

All modes share their samples: the n-th continuation of a prefix is the same in each, drawn when a mode first asks for
it. Within a mode samples are independent as ever; between modes only the choice of steps differs, so their difference
(`..._to_exact`, to IB in the paper's shape, with its own standard error) is known better than either figure.

With `--json`, rows are written after every chunk of questions, so that a run that is stopped leaves what it has.
"""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks import common
from benchmarks.sampling import QuickQwen3
from benchmarks.simulated import BlankLines, SimulatedChains
from benchmarks.tasks import TASKS, Chain
from examples import quickstart
from trl_ibtpo.engines.base import Rollout, RolloutRequest
from trl_ibtpo.engines.transformers import TransformersEngine
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.segments import make_grower
from trl_ibtpo.steps import StepSplitter

# All of 12 leaves: (B0, L, K, B), of which every initial rollout has rounds of its own with `surprisal`.
SHAPES = [(4, 9, 1, 1), (2, 6, 1, 2), (2, 3, 1, 5), (4, 3, 1, 4)]
SHAPES_OF = {
    "surprisal": [(4, 3, 1, 1), (4, 2, 2, 1), (2, 6, 1, 1), (4, 2, 1, 2), (2, 2, 1, 5)],
    "segments": [(4, 9, 1, 1), (2, 11, 1, 1)],
    "pivot": [*SHAPES, (4, 2, 1, 8)],  # the last: one fork with eight siblings, as its authors have it
    "independent": [(8, 1, 1, 1), (12, 1, 1, 1)],
}
STRATEGIES = ["independent", "ib", "confidence", "contrast", "surprisal", "segments", "random", "pivot"]
FIELDS = ("tree_initial_rollouts", "tree_levels", "tree_nodes_per_level", "tree_branches_per_node")
PAPER = ("ib", SHAPES[0], 0)


def modes(lookaheads: list[int]) -> list[tuple[str, tuple, int]]:
    """Strategy, shape and lookahead of every row."""
    plain = [(strategy, shape, 0) for strategy in STRATEGIES for shape in SHAPES_OF.get(strategy, SHAPES)]
    return plain + [(*PAPER[:2], lookahead) for lookahead in lookaheads]


class SharedSamples:
    """An engine whose n-th continuation of a prefix is the same whenever it is asked for since `rewind` again.

    It also knows the questions and their answers, as `SimulatedChains` does; here those of the quickstart.
    """

    max_completion_length = quickstart.MAX_COMPLETION_LENGTH

    def __init__(self, model, tokenizer, entries=()):
        self.tokenizer, self.entries = tokenizer, entries
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

    def prompt(self, question):
        return self.tokenizer(self.entries[question]["question"])["input_ids"]

    def answer(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip().rsplit("\n", 1)[-1]

    def is_right(self, question, ids):
        return quickstart.is_right(self.tokenizer.decode(ids, skip_special_tokens=True), self.entries[question])

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


class TaskSamples(SharedSamples):
    """The same for a task of `benchmarks.learning`."""

    def __init__(self, task: Chain, model, tokenizer, rows):
        super().__init__(model, tokenizer, rows)
        self.task, self.max_completion_length = task, task.max_completion_length

    def prompt(self, question):
        return self.tokenizer(self.entries[question]["prompt"])["input_ids"]

    def answer(self, ids):
        return (self.tokenizer.decode(ids, skip_special_tokens=True).split() or [""])[-1]

    def is_right(self, question, ids):
        text, row = self.tokenizer.decode(ids, skip_special_tokens=True), self.entries[question]
        return self.task.reward([text], **{name: [value] for name, value in row.items() if name != "prompt"})[0] == 1


def measure(engine, splitter, questions: int, mode: tuple, seed: int) -> dict[str, np.ndarray]:
    """Effective (0/1), mean success, generated tokens, distinct answers and branched steps of each question's tree."""
    strategy, shape, lookahead = mode
    settings = GrowthSettings(
        branching=strategy,
        branch_lookahead=lookahead,
        max_completion_length=getattr(engine, "max_completion_length", quickstart.MAX_COMPLETION_LENGTH),
        **dict(zip(FIELDS, shape, strict=True)),
    )
    growers = [
        make_grower(engine.prompt(question), settings, splitter, (seed, question)) for question in range(questions)
    ]
    engine.rewind()
    drive(growers, engine, common.ScriptedScorer(lambda tree, ids: float(engine.is_right(tree, ids))))
    trees = [grower.tree for grower in growers]
    success = np.array([tree.success for tree in trees])
    answers = [{engine.answer(tree.trajectory(leaf)[0]) for leaf in range(settings.leaves)} for tree in trees]
    return {
        "effective_rate": (success.min(1) < success.max(1)).astype(float),
        "average_success": success.mean(1),
        "generated_tokens": np.array([tree.generated_tokens for tree in trees], dtype=float),
        "distinct_answers": np.array([len(each) for each in answers], dtype=float),
        "branched_steps": np.array([len(set(tree.branch_steps) - {0}) for tree in trees], dtype=float),
    }


def summarise(results: dict[tuple, list[dict]], policy: str) -> list[dict]:
    """A row a mode, of the questions so far."""
    figures_of = {
        mode: {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for mode, parts in results.items()
    }
    rows = []
    for (strategy, shape, lookahead), figures in figures_of.items():
        settings = GrowthSettings(branching=strategy, **dict(zip(FIELDS, shape, strict=True)))
        row = {
            "policy": policy,
            "strategy": strategy,
            "shape": " ".join(map(str, shape)),
            "group_size": settings.leaves,
            "lookahead": lookahead,
            "questions": len(figures["effective_rate"]),
        }
        for key in ("effective_rate", "average_success"):
            row[key], row[f"{key}_se"] = common.mean_and_error(figures[key])
            difference = figures[key] - figures_of[PAPER][key]
            row[f"{key}_to_exact"], row[f"{key}_to_exact_se"] = common.mean_and_error(difference)
        names = ("generated_tokens", "distinct_answers", "branched_steps")
        rows.append(row | {key: float(figures[key].mean()) for key in names})
    return rows


def warm_model(folder: Path | None, warm_steps: int, seed: int):
    """The quickstart's model after `warm_steps`, kept in `folder` for the next run."""
    place = None if folder is None else folder / f"quickstart-{warm_steps}-{seed}"
    if place is not None and place.is_dir():
        return AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    model, tokenizer = quickstart.warm_start(quickstart.make_questions(seed)[1], seed, max_steps=warm_steps)
    if place is not None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return model, tokenizer


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--questions", type=int, default=1024)
    arguments.add_argument("--chunk", type=int, default=256, help="questions grown together")
    arguments.add_argument("--tasks", nargs="*", choices=list(TASKS), default=["chain7", "chain10"])
    arguments.add_argument("--warm_steps", type=int, nargs="*", default=[], help="a model for each")
    arguments.add_argument("--chain_steps", type=int, nargs="*", default=[6, 12], help="a simulated policy for each")
    arguments.add_argument(
        "--lookahead", type=int, nargs="*", default=[], help="rows of IB with it, beside the others"
    )
    arguments.add_argument("--warm_starts", type=Path, metavar="FOLDER", help="keeps warm-started models")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    if args.quick:
        args.questions = args.chunk = 8
        args.tasks, args.warm_steps, args.chain_steps, args.lookahead = [], [10], [6], [3]
    measured, rows = modes(args.lookahead), []
    policies = [("task", name) for name in args.tasks] + [("chain", steps) for steps in args.chain_steps]
    policies += [("warm start", steps) for steps in args.warm_steps]
    for kind, steps in policies:
        if kind == "task":
            task, folder = TASKS[steps], TASKS[steps].warm_start(args.warm_starts or Path("outputs/warm_starts"))
            model = QuickQwen3.from_pretrained(folder, dtype=torch.float32).eval()
            tokenizer, entries = AutoTokenizer.from_pretrained(folder), task.questions(args.questions, seed=-3)
        if kind == "warm start":
            model, tokenizer = warm_model(args.warm_starts, steps, args.seed)
            model.eval()
            entries = list(quickstart.make_task(args.questions, seed=10_000 + args.seed))
        results: dict[tuple, list] = {mode: [] for mode in measured}
        chunks = range(0, args.questions, args.chunk)
        with tqdm(total=len(chunks) * len(measured), unit="run") as progress:
            for start in chunks:  # interleaved, chunk by chunk
                count, seed = min(args.chunk, args.questions - start), args.seed + start
                torch.manual_seed(seed)
                chunk = [] if kind == "chain" else entries[start : start + count]
                if kind == "warm start":
                    engine, splitter = SharedSamples(model, tokenizer, chunk), StepSplitter(tokenizer)
                elif kind == "task":
                    engine, splitter = TaskSamples(task, model, tokenizer, chunk), StepSplitter(tokenizer)
                else:
                    engine, splitter = SimulatedChains(steps, count, seed), BlankLines()
                for mode in measured:
                    progress.set_description(f"{kind} {steps}: {mode[0]} {mode[1]}")
                    results[mode].append(measure(engine, splitter, count, mode, seed))
                    progress.update()
                so_far = rows + summarise(results, f"{kind} {steps}")
                common.write_rows(so_far, args)
        rows = so_far
    common.report("Where to branch, and with how many siblings", rows, args)


if __name__ == "__main__":
    main()
