"""Which steps to branch: one short function per method, all behind `IBTPOConfig.branching`.

A strategy gives every step of a tree a priority, or every token; `select_steps` takes the eligible ones of highest
priority. A new method is a function with the signature of `ib` and a line in `STRATEGIES`; a user's own function is
given to the trainer in place of a name, and works the same way.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from .pivot import Pivot
from .scores import TreeScores
from .tree import RolloutTree


class Strategy(Protocol):
    """A function, or an object that can be called like one, with attributes that may be left out."""

    uses_rewards: bool = True
    """Whether it looks at rewards. A tree of one that does not (`False`) knows none, and waits for none unless
    there is an adaptive budget."""

    forks: Literal["steps", "tokens"] = "steps"
    """What it gives priorities to: `steps`, which are continued from where they end, or `tokens`, each of which is
    sampled again, with what follows it (`RolloutTree.token_steps`); at each place once."""

    uses_entropies: bool = False
    """Whether it looks at `RolloutTree.token_entropies`, which initial rollouts are then asked for."""

    drawn_from: float | None = None
    """Where it forks tokens: the share of highest priority from which they are drawn uniformly. None: the highest."""

    def __call__(self, tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
        """Priority of every step, `(N,)`, where NaN is last; or of every token, `(M,)`, where NaN is never chosen.

        Args:
            tree: as grown so far: token ids, log-probabilities, rewards. It must not be changed.
            scores: of the same tree.
            rng: the tree's own, so that trees do not depend on what else grows.
        """


class LearningStrategy(Strategy, Protocol):
    """One that learns from the trees it has chosen for. What it knows is saved with every checkpoint."""

    def evidence(self, tree: RolloutTree, scores: TreeScores) -> list[Any]:
        """What a tree that is done teaches: values that JSON can hold."""

    def learn(self, evidence: Sequence[Any]) -> None:
        """From the evidence of all trees of a generation batch, the same in every process."""

    def state_dict(self) -> dict[str, Any]:
        """What it knows, as values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""


def marked(**traits: Any) -> Callable:
    """Give a function the attributes of a `Strategy` that differ from those it has otherwise."""

    def mark(strategy: Callable) -> Callable:
        for name, value in traits.items():
            setattr(strategy, name, value)
        return strategy

    return mark


without_rewards = marked(uses_rewards=False)


def uses_rewards(strategy: Strategy | None) -> bool:
    """Whether a strategy looks at rewards; one that does not say is taken to."""
    return strategy is not None and getattr(strategy, "uses_rewards", True)


def ib(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """IB-TPO (arXiv 2605.28109): the highest IB-Score first."""
    return scores.ib_score


@without_rewards
def confidence(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """Lowest mean confidence of the children first: the IB-Score with all `rho = 1`, a control without rewards."""
    return -scores.mean_confidence


@without_rewards
def random(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """A step drawn uniformly."""
    return rng.random(len(tree))


@marked(uses_rewards=False, forks="tokens", rounds="rollout")
def surprisal(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """TreeRL's EPTree (arXiv 2506.11902): the sampled token of largest surprisal `-log pi(y_t)` is sampled again.

    Each initial rollout grows a tree of its own: in each of L - 1 rounds K of its tokens are forked, with B
    continuations each. No fork is forked again, so that the first token of a branch is none.
    """
    return -tree.token_logprobs()


@marked(uses_rewards=False, forks="tokens", rounds="rollout", uses_entropies=True, drawn_from=0.05)
def entropy_fork(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """I2B-LPO (arXiv 2601.05870): an initial rollout is forked where the policy is uncertain.

        t* ~ uniform over the 5% of its tokens with the largest H_t

    `H_t` is the entropy of the whole vocabulary at the temperature of sampling. Each of the L - 1 rounds of an initial
    rollout forks K of its tokens, with B continuations each; in the paper it is one token. Branches are not forked.
    """
    initial_N = np.zeros(len(tree), dtype=bool)
    for leaf in np.flatnonzero(np.array(tree.rounds) == 0):
        initial_N[tree.path(tree.leaves[leaf])] = True
    return np.where(initial_N[tree.token_steps()], tree.token_entropies(), np.nan)


@marked(uses_rewards=False, rounds="levels")
def segments(active: int, finished: int, just_finished: int, width: int, divergence: int) -> int:
    """TreePO (arXiv 2508.17445): how many paths go on after a segment, spread evenly over those that are active.

        max(a, min(max(W - f, 0), w f_now + w a))

    Not a priority: segments are steps here, all paths of a tree are looked at after each (`segments.SegmentGrower`).

    Args:
        active: `a`, paths that go on after this segment.
        finished: `f`, those that have ended by now.
        just_finished: `f_now`, those that have ended with this segment.
        width: `W`, leaves of the tree.
        divergence: `w`, 2 in the paper: `tree_branches_per_node` and the path itself.
    """
    return max(active, min(max(width - finished, 0), divergence * (just_finished + active)))


@without_rewards
def turn_entropy(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """ARPO (arXiv 2507.19849): after a tool result, where the next turn begins less certain than the first one did.

        H(s) - H(question)

    `H`: entropy of what follows a step or the question, as the mean surprisal `-log pi(y_t)` of the first `OPENING`
    tokens of each child, of those that were sampled; a child is one step, which may be shorter. Steps without a tool
    result have no priority, unless the tree has none that goes on after one.
    """
    surprisal_M, step_M = -tree.token_logprobs(), tree.token_steps()
    place_M = np.arange(len(step_M)) - np.searchsorted(step_M, step_M)  # in its step
    opening = (place_M < OPENING) & ~np.isnan(surprisal_M)
    parent_of = scores.parents[step_M[opening]]
    total_N = np.bincount(parent_of, surprisal_M[opening], minlength=len(tree))
    count_N = np.bincount(parent_of, minlength=len(tree))
    entropy_N = np.divide(total_N, count_N, out=np.full(len(tree), np.nan), where=count_N > 0)
    priority_N, after_tool_N = entropy_N - entropy_N[0], tree.observed() > 0
    if (after_tool_N & (count_N > 0)).any():
        priority_N[~after_tool_N] = np.nan
    return priority_N


OPENING = 20  # tokens of a turn in which ARPO's code looks for uncertainty


def contrast(tree: RolloutTree, scores: TreeScores, rng: np.random.Generator) -> np.ndarray:
    """Where another answer is likeliest to come out for what it costs; ours, after TRACE (arXiv 2606.11119).

        [r (1 - V) + (1 - r) V] * (1 - mean confidence) / new tokens

    `r` is the outcome of the rollout that owns the step, the first one through it, and `V` its shrunken density, see
    `shrunken_density`: so the bracket is the chance that the next rollout from here ends otherwise. The children's
    confidence says how open the step is, and what is left of the rollouts through it how many tokens a branch costs.
    A rollout without an outcome so far has `r = V`. docs/method.md derives it and says what was tried.
    """
    owner_N = np.zeros(len(tree), dtype=int)
    for leaf in reversed(range(len(tree.leaves))):
        owner_N[[0, *tree.path(tree.leaves[leaf])]] = leaf
    value_N, outcome_N = shrunken_density(tree), np.array(tree.success)[owner_N]
    outcome_N = np.where(np.isnan(outcome_N), value_N, outcome_N)
    otherwise_N = outcome_N * (1 - value_N) + (1 - outcome_N) * value_N
    # A rollout that is still running ends, so far, where it was last grafted: it says nothing of what is left.
    ends_L = tree.ends()[tree.leaves]
    known_N = tree.leaf_mean(np.where(np.isnan(tree.success), np.nan, ends_L))
    tokens_N = np.where(np.isnan(known_N), tree.leaf_mean(ends_L), known_N) - tree.ends()
    return otherwise_N * (1 - scores.mean_confidence) / np.maximum(tokens_N, 1)


def shrunken_density(tree: RolloutTree, prior: float = 4.0) -> np.ndarray:
    """`V`: chance of success from every step, `(N,)`, in (0, 1).

    The mean of a Beta posterior whose data are the leaves under the step and whose prior has the mean of the parent's
    posterior and counts as `prior` leaves; at the question it is uniform.

        V(question) = (S + 1) / (n + 2)        V(step) = (S(step) + prior * V(parent)) / (n(step) + prior)
    """
    count_N = tree.known_leaves()
    success_N = np.where(count_N > 0, np.nan_to_num(tree.density()) * count_N, 0.0)
    value_N, parents = np.empty(len(tree)), tree.parents().tolist()
    value_N[0] = (success_N[0] + 1) / (count_N[0] + 2)
    for step in range(1, len(tree)):
        value_N[step] = (success_N[step] + prior * value_N[parents[step]]) / (count_N[step] + prior)
    return value_N


# `independent` never branches: all G rollouts start at the question, as in GRPO. Of a class, each trainer has its own.
STRATEGIES: dict[str, Strategy | type | None] = {
    "ib": ib,
    "confidence": confidence,
    "random": random,
    "surprisal": surprisal,
    "entropy_fork": entropy_fork,
    "segments": segments,
    "pivot": Pivot,
    "turn_entropy": turn_entropy,
    "contrast": contrast,
    "independent": None,
}


def rounds_of(name: str) -> Literal["tree", "rollout", "levels"]:
    """What a round belongs to: the whole tree, one initial rollout and its branches, or a level of the tree."""
    return getattr(STRATEGIES.get(name), "rounds", "tree")


def make_strategy(name: str) -> Strategy | None:
    """The strategy of this name, with nothing learned yet."""
    found = STRATEGIES[name]
    return found() if isinstance(found, type) else found


def uses_entropies(strategy: Strategy | None) -> bool:
    """Whether a strategy looks at the entropies of tokens."""
    return getattr(strategy, "uses_entropies", False)


def top_share(priority: np.ndarray, eligible: np.ndarray, share: float) -> np.ndarray:
    """The eligible ones of highest priority, that share of them and at least one, ties broken by the earlier one.

    Args:
        priority, eligible: as for `select_steps`.
        share: in (0, 1], rounded up to a whole number of them.
    """
    places = np.flatnonzero(eligible)
    count = math.ceil(share * len(places) - 1e-9)
    found = np.zeros(len(eligible), dtype=bool)
    found[places[np.argsort(-priority[places], kind="stable")[:count]]] = True
    return found


def select_steps(
    priority: np.ndarray, eligible: np.ndarray, count: int, deferred: np.ndarray | None = None
) -> list[int]:
    """The `count` eligible steps of highest priority, ties broken by the earlier step.

    Where fewer steps are eligible than asked for, they are taken again in the same order, so a tree always reaches
    its number of leaves.

    Args:
        priority: `(N,)`.
        eligible: boolean, `(N,)`, true somewhere.
        count: the paper's K.
        deferred: boolean, `(N,)`: steps taken only after all others.
    """
    ranked: list[int] = []
    for allowed in (eligible,) if deferred is None else (eligible & ~deferred, eligible & deferred):
        steps = np.flatnonzero(allowed)
        values = priority[steps]
        if len(ranked) + 1 == count and len(steps):
            best = values.argmax()  # the first of equal ones, or of those without a score
            if not np.isnan(values[best]):  # as with the paper's K = 1: nothing needs to be sorted
                return [*ranked, int(steps[best])]
        ranked += steps[np.argsort(-values, kind="stable")][: count - len(ranked)].tolist()
    return [ranked[index % len(ranked)] for index in range(count)]
