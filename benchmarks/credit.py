"""Bias and variance of the gradient that each advantage and weight gives, on a policy whose gradient is known.

    python -m benchmarks.credit [--quick] [--trees 2000] [--json FILE]

A table of logits for every prefix is the policy: four steps of one token, three choices each, success at a quarter of
the 81 ends. Its policy gradient is the sum over all ends. Trees are grown by `trl_ibtpo.growth.drive`, graded with
rewards minus their mean as TRL does without scaling, and each way to give credit makes one gradient of each tree.

    scale          what of the true gradient is in the mean gradient; 1 for an unbiased one. Only a common factor,
                   which a learning rate takes up
    astray         length of the rest of the mean gradient, divided by that part; 0 for an unbiased one. Estimated
                   with a direction from one half of the trees and a length from the other, so that noise adds nothing
    variance       of the gradient of one tree, relative to the squared length of its mean, times the tokens that were
                   generated for it; over that of 12 independent completions with a leave-one-out baseline
    selected_bias  of the values of branched steps: estimate minus true value

Branching: all but `level` are the package's. `level` looks at nothing that was sampled after a step: round by round it
goes down the tree and takes the step whose next choice is the most uncertain. All trees have 12 leaves, and a
segment is a step.
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from benchmarks import common
from trl_ibtpo.advantages import ADVANTAGES, CreditSettings, GradedTree
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.scores import score_tree
from trl_ibtpo.segments import make_grower
from trl_ibtpo.tree_grower import TreeGrower
from trl_ibtpo.weights import step_weights

BLOCKS = 20
# Initial rollouts, levels, nodes and branches of what is measured beside `independent`.
SHAPE, FIELDS = (
    (4, 9, 1, 1),
    ("tree_initial_rollouts", "tree_levels", "tree_nodes_per_level", "tree_branches_per_node"),
)
TREES = [("random", SHAPE), ("level", SHAPE), ("confidence", SHAPE), ("ib", SHAPE)]
TREES += [("contrast", SHAPE), ("surprisal", (4, 3, 1, 1)), ("segments", SHAPE)]
TREES += [(name, shape) for name in ("level", "confidence") for shape in ((2, 6, 1, 2), (2, 3, 1, 5), (4, 3, 1, 4))]


class Policy:
    """Logits of the next choice after every prefix, and what follows from them."""

    def __init__(self, depth: int, choices: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.depth, self.choices = depth, choices
        prefixes = [p for length in range(depth) for p in itertools.product(range(choices), repeat=length)]
        self.place = {prefix: number for number, prefix in enumerate(prefixes)}
        self.logits = rng.normal(size=(len(prefixes), choices)) * rng.uniform(0.3, 2, size=(len(prefixes), 1))
        self.probabilities = np.exp(self.logits) / np.exp(self.logits).sum(1, keepdims=True)
        self.entropy = -(self.probabilities * np.log(self.probabilities)).sum(1)
        ends = list(itertools.product(range(choices), repeat=depth))
        self.reward = dict(zip(ends, (rng.random(len(ends)) < 0.25).astype(float), strict=True))
        self.value = {prefix: 0.0 for prefix in prefixes} | self.reward
        for prefix in reversed(prefixes):
            after = [self.value[(*prefix, choice)] for choice in range(choices)]
            self.value[prefix] = float(self.probabilities[self.place[prefix]] @ after)

    def direction(self, prefix: tuple[int, ...], choice: int) -> np.ndarray:
        """Gradient of the log-probability of a choice with respect to the logits after its prefix."""
        return (np.arange(self.choices) == choice) - self.probabilities[self.place[prefix]]

    def gradient(self) -> np.ndarray:
        """Of the expected reward, by the sum over all ends."""
        total = np.zeros_like(self.logits)
        for end, reward in self.reward.items():
            steps = [(end[:step], end[step]) for step in range(self.depth)]
            chance = np.prod([self.probabilities[self.place[prefix], choice] for prefix, choice in steps])
            for prefix, choice in steps:
                total[self.place[prefix]] += chance * reward * self.direction(prefix, choice)
        return total.ravel()


class PolicyEngine:
    """Samples whole continuations at once."""

    max_length, batched, clock = None, True, "polls"

    def __init__(self, policy: Policy):
        self.policy, self.queue = policy, []

    def submit(self, requests):
        self.queue += requests

    def poll(self):
        finished = []
        for request in self.queue:
            rng, prefix = np.random.default_rng(request.seed), tuple(request.prefix_ids[1:])
            done, logprobs = len(prefix), []
            while len(prefix) < self.policy.depth:
                chances = self.policy.probabilities[self.policy.place[prefix]]
                choice = int(rng.choice(len(chances), p=chances))
                logprobs.append(math.log(chances[choice]))
                prefix = (*prefix, choice)
            finished.append(Rollout(request.request_id, list(prefix[done:]), logprobs))
        self.queue = []
        return finished

    def generated(self, request_id):
        return 0

    def abort(self):
        self.queue = []


def level_by_level(policy: Policy, settings: GrowthSettings):
    """A strategy that looks at nothing below the steps that it chooses from; never twice at one."""

    def level(tree, scores, rng):
        depth = 1 + max(tree.rounds) * (policy.depth - 1) // (settings.tree_levels - 1)
        children, ends = tree.child_counts(), tree.ends()
        entropy = [
            policy.entropy[policy.place[tuple(tree.prefix(step))]] if children[step] else 0.0
            for step in range(len(tree))
        ]
        fresh = (ends == depth) & (children == 1)
        return np.where(fresh, entropy, np.where(ends == depth, -1.0, -2.0))

    level.uses_rewards = False
    return level


def grow(policy: Policy, branching: str, count: int, seed: int, shape: tuple = SHAPE) -> list[TreeGrower]:
    """Trees of 12 leaves from one question."""
    settings = GrowthSettings(
        branching="random" if branching == "level" else branching, **dict(zip(FIELDS, shape, strict=True))
    )
    strategy = level_by_level(policy, settings) if branching == "level" else None
    growers = [
        make_grower([0], settings, common.FixedSteps(1), seed=(seed, number), clock="polls", strategy=strategy)
        for number in range(count)
    ]
    drive(growers, PolicyEngine(policy), common.ScriptedScorer(lambda tree, ids: policy.reward[tuple(ids)]))
    return growers


@dataclass(frozen=True)
class Method:
    """One way to give credit."""

    advantage: str
    weight: str = "per_trajectory"
    value: str = "leaf_mean"
    kappa: float = 16.0
    correction: bool = False
    baseline: bool = True  # whether rewards are given minus their mean, as by TRL

    @property
    def settings(self) -> CreditSettings:
        return CreditSettings(
            advantage=self.advantage,
            ib_coef=0.0,
            sibling_kappa=self.kappa,
            value_estimate=self.value,
            selection_correction=self.correction,
            shared_token_weight=self.weight,
        )


WEIGHTS = ("per_trajectory", "once", "sampled")
KAPPAS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)
FLAT = Method("sibling", kappa=math.inf)
METHODS = [
    FLAT,
    *(Method("grpo", weight, baseline=False) for weight in WEIGHTS),
    *(Method("ibtpo", weight) for weight in WEIGHTS),
    Method("ibtpo", "sampled", "backup"),
    Method("treerl"),
    Method("treepo"),
    Method("treepo_size_weighted"),
    Method("tree_grpo"),
    Method("segment_value", "once", "backup"),
    *(Method("sibling", "per_trajectory", kappa=kappa) for kappa in (1.0, 16.0, math.inf)),
    *(Method("sibling", "sampled", kappa=kappa) for kappa in KAPPAS),
    *(Method("sibling", "sampled", "backup", kappa) for kappa in (1.0, 16.0, math.inf)),
]


def gradients(policy: Policy, grower: TreeGrower, methods: list[Method]) -> np.ndarray:
    """Gradient of `sum of weight * advantage * log-probability / G` over one tree, for each method."""
    tree = grower.tree
    steps = np.zeros((len(tree), policy.logits.size))  # gradient of the log-probability of each step
    for step, each in enumerate(tree.steps):
        if step:
            prefix = tuple(tree.prefix(each.parent))
            place = policy.place[prefix] * policy.choices
            steps[step, place : place + policy.choices] = policy.direction(prefix, each.token_ids[0])
    paths = [tree.path(leaf) for leaf in tree.leaves]
    rewards, scores = np.array(tree.rewards), score_tree(tree, beta=5)
    weights = {kind: step_weights(tree, kind) for kind in WEIGHTS}  # a step is one token
    credit, chosen = np.zeros((len(methods), len(tree))), grower.grown().choices
    for row, method in zip(credit, methods, strict=True):
        advantage_L = rewards - rewards.mean() if method.baseline else rewards
        terms = ADVANTAGES[method.advantage](GradedTree(tree, scores, advantage_L, method.settings, chosen))
        for leaf, path in enumerate(paths):
            values = terms.global_terms[leaf] + terms.local_terms[leaf]
            row[path] += weights[method.weight][leaf] * values / len(paths)
    return credit @ steps


@dataclass
class Sums:
    """Of the gradients of the trees of one block."""

    trees: int = 0
    tokens: int = 0
    gradient: np.ndarray | float = 0.0  # (methods, parameters)
    squares: np.ndarray | float = 0.0  # (methods,)
    biases: dict[str, list[float]] = field(default_factory=lambda: {"leaf_mean": [], "corrected": [], "fresh": []})


def measure(
    policy: Policy,
    branching: str,
    methods: list[Method],
    trees: int,
    seed: int = 0,
    progress: bool = True,
    shape: tuple = SHAPE,
) -> list[Sums]:
    blocks = []
    for block in tqdm(range(BLOCKS), desc=branching, disable=not progress):
        sums = Sums()
        for grower in grow(policy, branching, trees // BLOCKS, seed=1000 * seed + block, shape=shape):
            found = gradients(policy, grower, methods)
            sums.trees += 1
            sums.tokens += grower.tree.generated_tokens
            sums.gradient = sums.gradient + found
            sums.squares = sums.squares + (found**2).sum(1)
            note_biases(policy, grower, sums.biases)
        blocks.append(sums)
    return blocks


def note_biases(policy: Policy, grower: TreeGrower, biases: dict[str, list[float]]) -> None:
    """Of the values of branched steps: from all leaves, with the correction, and from fresh leaves alone."""
    tree, rewards = grower.tree, np.array(grower.tree.rewards)
    scores, choices = score_tree(tree, beta=5), grower.grown().choices
    value_N = {
        name: GradedTree(tree, scores, rewards, CreditSettings(selection_correction=on), choices).value_N
        for name, on in (("leaf_mean", False), ("corrected", True))
    }
    for step in {step for choice in choices for step in choice.steps if step}:
        truth = policy.value[tuple(tree.prefix(step))]
        for name, values in value_N.items():
            biases[name].append(values[step] - truth)
        fresh = [rewards[leaf] for leaf, after in enumerate(tree.branch_steps) if after == step]
        biases["fresh"].append(np.mean(fresh) - truth)


def summarize(true: np.ndarray, blocks: list[Sums], method: int) -> dict[str, float]:
    """Scale and direction of the mean gradient with standard errors, and variance at equal tokens."""
    means = np.array([block.gradient[method] / block.trees for block in blocks])
    length = np.linalg.norm(true)
    scale, scale_se = common.mean_and_error(means @ true / length**2)
    rest = means - np.outer(means @ true, true) / length**2
    lengths = []
    for half in (0, 1):
        direction = rest[half::2].mean(0)
        lengths += list(rest[1 - half :: 2] @ direction / np.linalg.norm(direction) / length)
    astray, astray_se = common.mean_and_error(lengths)
    astray_se *= 2**0.5  # both halves say the same: the product of their means
    trees = sum(block.trees for block in blocks)
    spread = sum(block.squares[method] for block in blocks) / trees - (means.mean(0) ** 2).sum()
    tokens = sum(block.tokens for block in blocks) / trees
    return {
        "scale": scale,
        "scale_se": scale_se,
        "astray": astray / scale,
        "astray_se": astray_se / scale,
        "variance": float(spread * tokens / (scale * length) ** 2),
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--trees", type=int, default=2000, help="trees of each branching")
    args = arguments.parse_args()
    trees = 5 * BLOCKS if args.quick else args.trees
    policy = Policy(depth=4, choices=3)
    true, rows, flat = policy.gradient(), [], None
    for branching, shape in [("independent", SHAPE), *TREES]:
        methods = [FLAT, *METHODS[1:4]] if branching == "independent" else METHODS
        blocks = measure(policy, branching, methods, trees, shape=shape)
        values = {}
        for name in blocks[0].biases:
            found = [value for block in blocks for value in block.biases[name]]
            values[name] = "" if not found else "{:+.4f} +- {:.4f}".format(*common.mean_and_error(found))
        for number, method in enumerate(methods):
            found = summarize(true, blocks, number)
            flat = flat or found["variance"]
            rows.append(
                {
                    "branching": branching,
                    "shape": "" if branching == "independent" else " ".join(map(str, shape)),
                    "advantage": method.advantage if method.baseline else "reward",
                    "value": method.value,
                    "weight": method.weight,
                    "kappa": method.kappa if method.advantage == "sibling" else "",
                    **found,
                    "variance": found["variance"] / flat,
                }
            )
        rows[-len(methods)] |= {f"selected_bias_{name}": value for name, value in values.items()}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    common.report("Bias and variance of the gradient", rows, args)


if __name__ == "__main__":
    main()
