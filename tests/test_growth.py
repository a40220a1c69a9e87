"""Growing trees over a scripted engine and a scripted scorer, which finish what they were given in any order."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ibtpo.advantages import GradedTree, ibtpo, per_token
from trl_ibtpo.branching import STRATEGIES, make_strategy, uses_rewards, without_rewards
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.grown_tree import CANDIDATES_KEPT, GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.scores import score_tree
from trl_ibtpo.segments import make_grower
from trl_ibtpo.tree import RolloutTree
from trl_ibtpo.tree_grower import TreeGrower

PROMPTS = [[901], [902, 903], [904, 905, 906]]


class Splitter:
    """A step ends with every token id that is a multiple of 4."""

    def ends(self, token_ids):
        ends = [position for position, token_id in enumerate(token_ids, 1) if token_id % 4 == 0]
        return ends if ends and ends[-1] == len(token_ids) else [*ends, len(token_ids)]


def sample(prefix_ids: list[int], max_tokens: int, seed: int) -> tuple[list[int], list[float]]:
    """The continuation: any length up to the budget, and nothing but prefix and seed decide it."""
    rng = random.Random(repr((prefix_ids, seed)))
    length = rng.randint(1, min(max_tokens, rng.choice([1, 6, 40])))
    return [rng.randint(1, 12) for _ in range(length)], [-2 * rng.random() for _ in range(length)]


def success_of(completion_ids: list[int]) -> float:
    return random.Random(repr(completion_ids)).choice([0.0, 0.0, 1.0, 1.0, 0.5, math.nan])


class Engine:
    """Finishes requests in an order and in batches of its own."""

    def __init__(self, order: int = 0, sample=sample):
        self.rng = random.Random(order)
        self.in_flight = {}
        self.submissions = []  # what each call of `submit` got
        self.rollouts = []
        self.said = {}  # tokens that a request in flight admitted to have
        self._sample = sample

    @property
    def requests(self):
        return [request for requests in self.submissions for request in requests]

    def submit(self, requests):
        assert requests
        for request in requests:
            assert request.request_id not in self.in_flight
            self.in_flight[request.request_id] = request
        self.submissions.append(list(requests))

    def choose(self):
        return self.rng.sample(sorted(self.in_flight), self.rng.randint(0, len(self.in_flight)))

    def poll(self):
        assert self.in_flight  # no empty polls
        requests = [self.in_flight.pop(request_id) for request_id in self.choose()]
        rollouts = [self._rollout(request) for request in requests]
        self.rollouts += rollouts
        return rollouts

    def _rollout(self, request):
        token_ids, logprobs = self._sample(request.prefix_ids, request.max_tokens, request.seed)
        rng = random.Random(request.seed)
        entropies = [rng.random() for _ in token_ids] if request.entropies else None
        return Rollout(request.request_id, token_ids, logprobs, entropies=entropies)

    def generated(self, request_id):
        """Some tokens fewer than it will have."""
        if request_id not in self.in_flight:
            return 0
        said = self.rng.randint(0, len(self._sampled(request_id)[0]) - 1)
        self.said[request_id] = max(said, self.said.get(request_id, 0))
        return said

    def partial(self, request_id, start, stop):
        """What it will have, as far as it said that it has it."""
        assert start < stop <= self.said[request_id]
        token_ids, logprobs = self._sampled(request_id)
        return token_ids[start:stop], logprobs[start:stop]

    def _sampled(self, request_id):
        request = self.in_flight[request_id]
        return self._sample(request.prefix_ids, request.max_tokens, request.seed)

    def abort(self):
        self.in_flight.clear()


class Scorer:
    """Hands successes back late and in any order."""

    def __init__(self, engine: Engine, order: int = 0, success_of=success_of):
        self.engine = engine
        self.rng = random.Random(order)
        self.pending = []
        self.seen = set()
        self.cancelled = False
        self._success_of = success_of

    def submit(self, leaves):
        for tree, number, completion_ids in leaves:
            assert (tree, number) not in self.seen
            self.seen.add((tree, number))
            self.pending.append((tree, number, self._success_of(completion_ids)))

    def collect(self, wait):
        assert not (wait and self.engine.in_flight)  # never hold up an engine that has work
        assert not wait or self.pending, "growth is stuck: nothing is under way"
        least = 1 if wait else 0
        count = self.rng.randint(least, len(self.pending))
        self.rng.shuffle(self.pending)
        self.pending, scored = self.pending[count:], self.pending[:count]
        return scored

    def cancel(self):
        self.cancelled = True


def grow(growth: GrowthSettings, prompts=PROMPTS, seed=0, order=0) -> tuple[list[TreeGrower], Engine]:
    growers = [make_grower(prompt, growth, Splitter(), (seed, i)) for i, prompt in enumerate(prompts)]
    engine = Engine(order)
    scorer = Scorer(engine, order + 1)
    calls = []
    drive(growers, engine, scorer, on_rollout=lambda: calls.append(1))
    assert all(grower.done for grower in growers)
    assert len(calls) == len(engine.rollouts) == len(scorer.seen) == len(prompts) * growth.leaves
    return growers, engine


def snapshot(grower: TreeGrower):
    """Everything about a tree, with NaN made comparable."""
    steps = [(step.parent, step.token_ids, step.logprobs, step.end, step.children) for step in grower.tree.steps]
    return steps, grower.tree.leaves, grower.tree.branch_steps, repr(grower.tree.success)


SETTINGS = st.builds(
    GrowthSettings,
    tree_initial_rollouts=st.integers(1, 4),
    tree_levels=st.integers(1, 6),
    tree_nodes_per_level=st.integers(1, 3),
    tree_branches_per_node=st.integers(1, 2),
    branching=st.sampled_from(list(STRATEGIES)),
    allow_root_branching=st.booleans(),
    allow_repeated_branching=st.booleans(),
    ib_beta=st.sampled_from([1.0, 5.0]),
    step_confidence=st.sampled_from(["geometric_mean", "joint"]),
    max_completion_length=st.sampled_from([1, 2, 7, 40]),
    branch_lookahead=st.integers(0, 5),
    fork_keeps_token=st.booleans(),
)
ANY = {"deadline": None, "database": None}


@settings(max_examples=120, **ANY)
@given(SETTINGS, st.integers(0, 1000), st.integers(0, 1000))
def test_rules_of_every_tree(growth, seed, order):
    growers, engine = grow(growth, seed=seed, order=order)
    for prompt, grower in zip(PROMPTS, growers, strict=True):
        tree = grower.tree
        requests = [request for request in engine.requests if request.prefix_ids[: len(prompt)] == prompt]
        rollouts = {rollout.request_id: rollout for rollout in engine.rollouts}
        assert growth.leaves == len(requests) == len(tree.leaves) == len(set(tree.leaves)) == len(grower.tree.success)
        more = (growth.tree_levels - 1) * growth.branches_per_round
        if growth.branching in (
            "surprisal",
            "entropy_fork",
        ):  # M (1 + L N T): each initial rollout has rounds of its own
            assert growth.leaves == growth.tree_initial_rollouts * (1 + more)
        else:
            assert growth.leaves == growth.tree_initial_rollouts + more
        for number, request in enumerate(requests):  # leaves are in the order they were asked for
            rollout, after = rollouts[request.request_id], tree.branch_steps[number]
            assert request.prefix_ids == prompt + tree.prefix(after)
            assert request.max_tokens == growth.max_completion_length - len(tree.prefix(after)) >= 1
            token_ids, logprobs = tree.trajectory(number)
            assert token_ids == tree.prefix(after) + rollout.token_ids
            assert logprobs == [value for index in tree.path(after) for value in tree.steps[index].logprobs] + list(
                rollout.logprobs
            )
            assert len(token_ids) == tree.steps[tree.leaves[number]].end <= growth.max_completion_length
            assert repr(grower.tree.success[number]) == repr(success_of(token_ids))
            path, shared = tree.path(tree.leaves[number]), tree.path(after)
            assert path[: len(shared)] == shared and len(path) > len(shared)
        for index, step in enumerate(tree.steps[1:], 1):
            assert step.parent < index and index in tree.steps[step.parent].children
            assert step.end == tree.steps[step.parent].end + len(step.token_ids)
            assert bool(step.children) != (index in tree.leaves)
        lengths = [len(rollouts[request.request_id].token_ids) for request in requests]
        assert tree.generated_tokens == sum(lengths)
        assert tree.trajectory_tokens == sum(len(tree.trajectory(leaf)[0]) for leaf in range(growth.leaves))
        assert len({request.seed for request in requests}) == len(requests)
    assert not engine.in_flight
    assert len({request.seed for request in engine.requests}) == len(engine.requests)


@settings(max_examples=80, **ANY)
@given(SETTINGS, st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_a_tree_does_not_depend_on_the_order_of_completion(growth, seed, order, other_order):
    first, _ = grow(growth, seed=seed, order=order)
    again, _ = grow(growth, seed=seed, order=other_order)
    assert [snapshot(grower) for grower in first] == [snapshot(grower) for grower in again]
    # ... nor on the trees that grow beside it.
    alone = make_grower(PROMPTS[1], growth, Splitter(), (seed, 1))
    engine = Engine(order)
    drive([alone], engine, Scorer(engine, order))
    assert snapshot(alone) == snapshot(first[1])


def test_another_seed_grows_another_tree():
    growth = GrowthSettings(max_completion_length=40)
    (first, *_), _ = grow(growth, seed=0)
    (other, *_), _ = grow(growth, seed=1)
    assert snapshot(first) != snapshot(other)


@settings(max_examples=150, **ANY)
@given(
    SETTINGS.filter(lambda growth: growth.branching in ("ib", "confidence", "random", "pivot")).map(
        lambda growth: replace(growth, branch_lookahead=0)
    ),
    st.integers(0, 1000),
)
def test_which_steps_may_be_branched(growth, seed):
    """The root only if allowed or where nothing else may be; no step in two rounds unless repeats are allowed."""
    for grower in grow(growth, seed=seed)[0]:
        tree = grower.tree
        rollout_of = {0: -1}  # the rollout that made each step
        for number, leaf in enumerate(tree.leaves):
            for step in tree.path(leaf):
                rollout_of.setdefault(step, number)
        branched = set()
        for submitted in range(growth.tree_initial_rollouts, growth.leaves, growth.branches_per_round):
            inner = {
                index
                for index, step in enumerate(tree.steps)
                if index and any(rollout_of[child] < submitted for child in step.children)
            }
            assert all(tree.steps[index].end < growth.max_completion_length for index in inner)
            open_steps = inner if growth.allow_repeated_branching else inner - branched
            chosen = tree.branch_steps[submitted : submitted + growth.branches_per_round]
            for step in chosen:
                assert step == 0 or step in open_steps
                if step == 0 and not growth.allow_root_branching:
                    assert not open_steps
                if step in branched and not growth.allow_repeated_branching:
                    assert step == 0 and not open_steps
            # B rollouts each; K different steps where there are as many.
            width = growth.tree_branches_per_node
            assert chosen[::width] == chosen[width - 1 :: width]
            root_open = growth.allow_root_branching and (growth.allow_repeated_branching or 0 not in branched)
            eligible = (open_steps | {0} if root_open else open_steps) or {0}
            assert len(set(chosen)) == min(growth.tree_nodes_per_level, len(eligible))
            assert set(chosen) <= eligible
            branched.update(chosen)


# ----- reference -----------------------------------------------------------------------------------------------------


def reference(prompt: list[int], growth: GrowthSettings, seeds: list[int]):
    """The tree on an ideal engine that gives every rollout a token a tick, IB-Scores by recursion.

    Without lookahead this is the paper in lock-step: all rollouts of a round are known before the next. With it, a
    round sees of a running rollout the steps that it has completed, whose answer is not known.
    """
    parent, tokens, logprobs, children, success = [None], [[]], [[]], [[]], {}
    seeds = list(seeds)
    running, number_of, launched, clock = [], {}, 0, 0
    starts, after, seen = {}, {}, {}  # of each rollout: the node it continues, its last node, its tokens in the tree

    def prefix(node):
        return [] if parent[node] is None else prefix(parent[node]) + tokens[node]

    def launch(node):
        nonlocal launched
        head = prefix(node)
        ids, values = sample(prompt + head, growth.max_completion_length - len(head), seeds[launched])
        end = clock + len(ids) if growth.branch_lookahead else clock + 1
        running.append((end, launched, clock, ids, values))
        after[launched], seen[launched], starts[launched] = node, [], node
        launched += 1

    def see(number, ids, values, stop):
        """Append the steps that end by `stop` to those seen of this rollout."""
        for start, end in itertools.pairwise([0, *Splitter().ends(ids)]):
            if start < len(seen[number]) or end > stop:
                continue
            parent.append(after[number])
            tokens.append(ids[start:end])
            logprobs.append(values[start:end])
            children.append([])
            children[after[number]].append(len(parent) - 1)
            after[number] = len(parent) - 1
            seen[number] = ids[:end]

    def join(number, _, ids, values):
        see(number, ids, values, len(ids))
        success[after[number]] = success_of(prefix(starts[number]) + ids)
        number_of[after[number]] = number

    def leaves(node):
        return [success[node]] if node in success else [leaf for child in children[node] for leaf in leaves(child)]

    def sight(number, start, ids, values):
        # A step that ends now is complete only if something follows it, or it would be the end.
        see(number, ids[: clock - start], values, clock - start - 1)

    def density(node):
        known = [value for value in leaves(node) if not math.isnan(value)]
        return sum(known) / len(known) if known else None

    def answers(node):
        if growth.branching == "confidence":  # which never sees one: what its children are is all it waits for
            return len(children[node])
        return sum(density(child) is not None for child in children[node])

    def eta2(node):
        mean = sum(logprobs[node]) / (len(logprobs[node]) if growth.step_confidence == "geometric_mean" else 1)
        return math.exp(mean)

    def priority(node):
        if growth.branching == "confidence":
            return -sum(eta2(child) for child in children[node]) / len(children[node])
        known = [child for child in children[node] if density(child) is not None]
        terms = []
        for child in known or children[node]:
            rho = density(child) / density(node) if known and density(node) else 1
            terms.append((rho - 1 - 1 / growth.ib_beta) * eta2(child))
        return (1 + growth.ib_beta) * sum(terms) / len(terms)

    branched = set()
    for _ in range(growth.tree_initial_rollouts):
        launch(0)
    while running:
        running.sort()
        clock, *ended = running.pop(0)
        join(*ended)
        for _, number, *rest in sorted(running, key=lambda each: each[1]):
            if growth.branch_lookahead and launched < growth.leaves and len(running) <= growth.branch_lookahead:
                sight(number, *rest)
        more = growth.branch_lookahead + 1 if len(running) <= growth.branch_lookahead else 0
        while launched < growth.leaves and more > 0:
            nodes = [node for node in range(1, len(parent)) if children[node]]
            nodes = [0, *nodes] if growth.allow_root_branching else nodes
            if not growth.allow_repeated_branching:
                nodes = [node for node in nodes if node not in branched]
            under_way = {starts[number] for _, number, *_ in running}
            # A stable sort: the earlier node first, those that wait for a second answer after all others.
            ranked = sorted(nodes or [0], key=lambda node: (node in under_way and answers(node) < 2, -priority(node)))
            chosen = [ranked[index % len(ranked)] for index in range(growth.tree_nodes_per_level)]
            for node in chosen:
                for _ in range(growth.tree_branches_per_node):
                    launch(node)
                    more -= 1
            branched.update(chosen)
    by_number = sorted(success, key=number_of.get)
    return [-1 if node is None else node for node in parent], tokens, logprobs, [success[node] for node in by_number]


@settings(max_examples=200, **ANY)
@given(SETTINGS.filter(lambda growth: growth.branching in ("ib", "confidence")), st.integers(0, 10000))
def test_trees_are_those_of_an_ideal_engine(growth, seed):
    growers, engine = grow(growth, seed=seed, order=seed)
    for prompt, grower in zip(PROMPTS, growers, strict=True):
        seeds = [request.seed for request in engine.requests if request.prefix_ids[: len(prompt)] == prompt]
        parents, tokens, logprobs, success = reference(prompt, growth, seeds)
        assert [step.parent for step in grower.tree.steps] == parents
        assert [step.token_ids for step in grower.tree.steps] == tokens
        assert [step.logprobs for step in grower.tree.steps] == logprobs
        assert repr(grower.tree.success) == repr(success)


# ----- one tree, move by move ----------------------------------------------------------------------------------------


def finish(grower: TreeGrower, number: int, token_ids: list[int], logprob: float = -1.0, success: float = 1.0) -> None:
    grower.add_rollout(number, Rollout((0, number), token_ids, [logprob] * len(token_ids)))
    grower.add_reward(number, success)


def test_a_round_waits_for_all_earlier_rollouts():
    growth = GrowthSettings(tree_initial_rollouts=2, tree_levels=3, max_completion_length=8)
    grower = TreeGrower([9], growth, Splitter())
    assert [request.prefix_ids for request in grower.next_requests()] == [[9], [9]]
    finish(grower, 1, [4, 1])
    assert grower.next_requests() == []
    grower.add_rollout(0, Rollout((0, 0), [8, 1], [-3.0, -3.0]))
    assert grower.next_requests() == []  # sampled, but not scored
    grower.add_reward(0, 0.0)
    # Both first steps have a single child: p(c)/p(s) = 1 (or 0/0 := 1), so the less confident child wins.
    (request,) = grower.next_requests()
    assert (request.request_id, request.prefix_ids, request.max_tokens) == ((0, 2), [9, 8], 7)
    assert grower.next_requests() == []
    finish(grower, 2, [1])
    # Step "8" has two wrong children now, of confidence exp(-3) and exp(-1): mean .209 < .368 of step "4".
    (request,) = grower.next_requests()
    assert request.prefix_ids == [9, 8]
    finish(grower, 3, [1])
    assert not grower.done
    assert grower.next_requests() == [] and grower.done


class Running:
    """Rollouts of which some tokens are known."""

    def __init__(self, **tokens: list[int]):
        self.tokens = {(0, int(name.removeprefix("rollout_"))): ids for name, ids in tokens.items()}

    def generated(self, request_id):
        return len(self.tokens.get(request_id, []))

    def partial(self, request_id, start, stop):
        return self.tokens[request_id][start:stop], [-2.0] * (stop - start)


@pytest.mark.parametrize(("success", "expected"), [(1.0, [9, 8]), (0.0, [9, 4])])
def test_lookahead_starts_rounds_early_with_what_is_then_known(success, expected):
    growth = GrowthSettings(tree_initial_rollouts=2, tree_levels=4, max_completion_length=8, branch_lookahead=1)
    grower = TreeGrower([9], growth, Splitter())
    assert len(grower.next_requests()) == 2  # nothing is known yet
    finish(grower, 1, [8, 1], logprob=-3.0)  # ends at tick 2
    assert grower.next_requests() == []  # rollout 0 may end before that
    assert grower.next_requests(Running(rollout_0=[4])) == []  # or at that tick, and then it comes first
    # Now it cannot: it will end at tick 3 or later. None of its steps is known to be followed by another, so the round
    # and the one that lookahead adds to it both go to "8".
    requests = grower.next_requests(Running(rollout_0=[4, 4]))
    assert [request.prefix_ids for request in requests] == [[9, 8], [9, 8]]
    finish(grower, 0, [4, 4, 1])  # ends at tick 3, as the branches might, which started at tick 2
    assert grower.next_requests() == []
    finish(grower, 2, [1], success=success)  # at tick 3; rollout 3 has not said that it is past it
    assert grower.next_requests() == []
    # "8" has two scored children, of confidence exp(-3) and exp(-1), so it may be chosen while a third is under way:
    # it scores -1.2 * .21 where both are right, 3 * (.8 * .05 - 1.2 * .37) where the second is wrong; "4" -1.2 * .37.
    (third,) = grower.next_requests(Running(rollout_3=[1]))
    assert third.prefix_ids == expected
    finish(grower, 3, [1, 1])
    finish(grower, 4, [1])
    assert grower.next_requests() == [] and grower.done
    assert grower.tree.branch_steps[:2] == [0, 0]  # leaves are in the order of submission
    assert [len(grower.tree.trajectory(leaf)[0]) for leaf in range(5)] == [3, 2, 2, 3, 2]


def test_lookahead_branches_a_rollout_that_is_still_running():
    growth = GrowthSettings(tree_initial_rollouts=2, tree_levels=3, max_completion_length=16, branch_lookahead=2)
    grower = TreeGrower([9], growth, Splitter())
    grower.next_requests()
    finish(grower, 1, [8, 1, 1, 4, 1], logprob=-1.0, success=0.0)  # ends at tick 5
    # By then rollout 0 has completed "3 4" and "4", and no answer is known: "3 4" has a child of confidence exp(-2).
    first, second = grower.next_requests(Running(rollout_0=[3, 4, 4, 1, 1, 4, 1, 1, 4]))
    assert first.prefix_ids == [9, 3, 4] and first.max_tokens == 14
    assert second.prefix_ids == [9, 8]  # the answers under "3 4" are under way, so another step comes first
    assert len(grower.tree.steps) == 1 + 3 + 2  # tokens after tick 5 are not looked at, nor the step they are in
    # The branch ends before the rollout it continues; the tree is the same as if both had ended in order.
    finish(grower, 2, [12])
    finish(grower, 3, [1])
    assert grower.next_requests(Running(rollout_0=[3, 4, 4, 1, 1, 4, 1, 1, 4])) == [] and not grower.done
    finish(grower, 0, [3, 4, 4, 1, 1, 4, 1, 1, 4, 1], logprob=-2.0)
    assert grower.next_requests() == [] and grower.done
    assert [grower.tree.trajectory(leaf)[0] for leaf in range(4)] == [
        [3, 4, 4, 1, 1, 4, 1, 1, 4, 1],
        [8, 1, 1, 4, 1],
        [3, 4, 12],
        [8, 1],
    ]
    assert grower.tree.branch_steps == [0, 0, grower.tree.path(grower.tree.leaves[0])[0], 1]


def test_a_step_with_a_branch_under_way_is_chosen_where_no_other_may_be():
    growth = GrowthSettings(tree_initial_rollouts=1, tree_levels=4, max_completion_length=8, branch_lookahead=5)
    grower = TreeGrower([9], growth, Splitter())
    grower.next_requests()
    finish(grower, 0, [4, 1])
    assert [request.prefix_ids for request in grower.next_requests()] == [[9, 4]] * 3


@pytest.mark.parametrize(
    ("token_ids", "budget", "allow_repeated", "expected"),
    [
        ([1, 2, 3], 8, True, [[], [], []]),  # one step per rollout: only the root has children
        ([4, 8, 1], 8, False, [[4], [4, 8], []]),  # every step once, then the root
        ([4, 8, 1], 2, True, None),  # more tokens than asked for
        ([4, 8], 2, True, [[4], [4], [4]]),
        ([4], 1, True, [[], [], []]),  # no budget left anywhere but at the root
    ],
)
def test_the_root_is_the_last_resort(token_ids, budget, allow_repeated, expected):
    growth = GrowthSettings(
        tree_initial_rollouts=1, tree_levels=4, max_completion_length=budget, allow_repeated_branching=allow_repeated
    )
    grower = TreeGrower([9], growth, Splitter())
    grower.next_requests()
    if expected is None:
        with pytest.raises(RuntimeError, match="returned 3 tokens for a rollout that asked for 1 to 2"):
            finish(grower, 0, token_ids)
        return
    finish(grower, 0, token_ids)
    found = []
    for number in (1, 2, 3):
        (request,) = grower.next_requests()
        found.append(request.prefix_ids[1:])
        finish(grower, number, [1], logprob=-0.5)
    grower.next_requests()
    assert sorted(found) == sorted(expected) and grower.done


# ----- many trees ----------------------------------------------------------------------------------------------------


def test_no_tree_waits_for_another():
    """All of the second tree is grown before the first tree's first rollouts finish."""

    class SecondTreeFirst(Engine):
        def choose(self):
            second = [key for key, request in self.in_flight.items() if request.prefix_ids[0] == PROMPTS[1][0]]
            return second or sorted(self.in_flight)

    growth = GrowthSettings(max_completion_length=40)
    growers = [TreeGrower(prompt, growth, Splitter(), (0, i)) for i, prompt in enumerate(PROMPTS[:2])]
    engine = SecondTreeFirst()
    steps_of_first_tree = []
    scorer = Scorer(engine)
    scorer.collect = lambda wait: [scorer.pending.pop() for _ in range(len(scorer.pending))]
    drive(growers, engine, scorer, on_rollout=lambda: steps_of_first_tree.append(len(growers[0].tree.steps)))
    assert steps_of_first_tree[: growth.leaves] == [1] * growth.leaves  # the root alone
    assert growers[0].done and growers[1].done


class SlowScorer(Scorer):
    """Has no reward for anybody before somebody waits for one; notes how many leaves it had by then."""

    def __init__(self, engine):
        super().__init__(engine)
        self.waits = []

    def collect(self, wait):
        assert not (wait and self.engine.in_flight)
        if not wait:
            return []
        self.waits.append(len(self.seen))
        done, self.pending = self.pending, []
        return done


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("branching", list(STRATEGIES))
def test_a_tree_waits_for_rewards_only_where_its_strategy_looks_at_them(branching, lookahead):
    growth = GrowthSettings(branching=branching, branch_lookahead=lookahead, max_completion_length=40)
    growers = [make_grower(prompt, growth, Splitter(), (i,)) for i, prompt in enumerate(PROMPTS)]
    engine = Engine(order=1)
    scorer = SlowScorer(engine)
    drive(growers, engine, scorer)
    if uses_rewards(make_strategy(branching)):
        assert scorer.waits[0] < len(PROMPTS) * growth.leaves
    else:
        assert scorer.waits == [len(PROMPTS) * growth.leaves]  # once, at the very end
    again = [make_grower(prompt, growth, Splitter(), (i,)) for i, prompt in enumerate(PROMPTS)]
    drive(again, other := Engine(order=2), Scorer(other, order=3))
    assert [snapshot(grower) for grower in growers] == [snapshot(grower) for grower in again]


def test_a_strategy_without_rewards_sees_none():
    """Whatever has been rewarded by then: what it chooses must not depend on how fast a grader is."""
    seen = []

    @without_rewards
    def looks(tree, scores, rng):
        seen.append([*tree.rewards, *tree.success, *scores.density])
        return rng.random(len(tree))

    growers = [TreeGrower([9], GrowthSettings(max_completion_length=40), Splitter(), strategy=looks)]
    drive(growers, engine := Engine(), Scorer(engine, success_of=lambda ids: 1.0))
    assert len(seen) == 8 and np.isnan(np.concatenate(seen)).all()
    assert growers[0].tree.rewards == [1.0] * 12


def test_a_function_of_ones_own_chooses_steps():
    def longest_step(tree, scores, rng):
        lengths = tree.ends() - tree.ends()[tree.parents()]
        lengths[0] = 0
        return lengths

    growth = GrowthSettings(tree_initial_rollouts=2, tree_levels=2, max_completion_length=8, branching="longest_step")
    grower = TreeGrower([9], growth, Splitter(), strategy=longest_step)
    grower.next_requests()
    grower.add_rollout(0, Rollout((0, 0), [4, 1, 1, 4, 8, 1], [-1.0] * 6))
    grower.add_rollout(1, Rollout((0, 1), [1, 4, 1, 1, 1, 4, 1], [-1.0] * 7))
    assert grower.next_requests() == []  # it may look at rewards, as far as anybody knows
    grower.add_reward(0, 1.0)
    grower.add_reward(1, 0.0)
    (request,) = grower.next_requests()
    assert request.prefix_ids == [9, 1, 4, 1, 1, 1, 4]  # four tokens, where the others have one to three


def test_independent_rollouts_are_submitted_at_once():
    growth = GrowthSettings(branching="independent", max_completion_length=40)
    growers, engine = grow(growth)
    (submission,) = engine.submissions
    assert [request.prefix_ids for request in submission] == [prompt for prompt in PROMPTS for _ in range(12)]
    for grower in growers:
        assert grower.tree.branch_steps == [0] * 12
        assert grower.tree.generated_tokens == grower.tree.trajectory_tokens


class FourSeats(Engine):
    """As vLLM: every poll gives requests one token, but no more than four at a time. Counts how often it is asked."""

    def __init__(self):
        super().__init__(sample=long_rollouts)
        self.polls, self.questions, self.tokens = 0, 0, Counter()

    def choose(self):
        self.polls += 1
        running = list(self.in_flight)[:4]
        self.tokens.update(running)
        return [key for key in running if self.tokens[key] == len(self._sampled(key)[0])]

    def generated(self, request_id):
        self.questions += 1
        self.said[request_id] = self.tokens[request_id] if request_id in self.in_flight else 0
        return self.said[request_id]


def long_rollouts(prefix_ids, max_tokens, seed):
    length = min(max_tokens, random.Random(seed).randint(300, 900))
    return [4 if place % 20 == 19 else 1 for place in range(length)], [-0.5] * length


def test_a_tree_that_waits_is_asked_again_when_its_rollouts_can_have_got_there():
    growth = GrowthSettings(max_completion_length=1000, branch_lookahead=3)
    growers = [TreeGrower(prompt, growth, Splitter(), (i,)) for i, prompt in enumerate(PROMPTS)]
    engine = FourSeats()
    drive(growers, engine, Scorer(engine))
    assert engine.polls > 4000 and engine.questions < engine.polls / 4
    again = [TreeGrower(prompt, growth, Splitter(), (i,)) for i, prompt in enumerate(PROMPTS)]
    other = Engine(order=5, sample=long_rollouts)
    drive(again, other, Scorer(other))
    assert [snapshot(grower) for grower in growers] == [snapshot(grower) for grower in again]


def test_on_the_clock_of_arrival_nothing_is_asked_and_no_tree_waits():
    """A server does not say how far a rollout is: whatever has arrived decides."""

    class Silent(Engine):
        def generated(self, request_id):
            raise AssertionError("asked")

        partial = generated

    growth = GrowthSettings(max_completion_length=40, branch_lookahead=3)
    growers = [TreeGrower(prompt, growth, Splitter(), (i,), clock="arrival") for i, prompt in enumerate(PROMPTS)]
    engine = Silent(order=2)
    drive(growers, engine, Scorer(engine))
    assert all(grower.done for grower in growers)

    grower = TreeGrower([9], replace(growth, tree_initial_rollouts=4), Splitter(), clock="arrival")
    grower.next_requests()
    finish(grower, 3, [4, 1, 1, 1, 1, 1])  # one of four has arrived, the longest: three may still run
    assert [request.prefix_ids for request in grower.next_requests()] == [[9, 4]] * 4


def test_no_trees_need_no_engine():
    drive([], None, None)


@settings(max_examples=60, **ANY)
@given(SETTINGS, st.integers(0, 1000))
def test_the_success_of_a_leaf_counts_at_all_its_steps(growth, seed):
    """Also where no tree waits for rewards, whichever comes last: a rollout or a reward."""
    for grower in grow(growth, prompts=PROMPTS[:1], seed=seed)[0]:
        np.testing.assert_allclose(grower.tree.density(), grower.tree.leaf_mean(grower.tree.success))


@settings(max_examples=60, **ANY)
@given(SETTINGS, st.integers(0, 1000))
def test_shared_tokens_have_one_advantage(growth, seed):
    """Inside a step the advantage is constant, and every trajectory through a step gives it the same."""
    for grower in grow(growth, prompts=PROMPTS[:1], seed=seed)[0]:
        tree = grower.tree
        terms = ibtpo(GradedTree(tree, grower.scores(), 2 * np.array(grower.tree.success) - 1))
        seen = {}  # (step, token of the step) to advantage
        for leaf in range(growth.leaves):
            values_T = per_token(tree, leaf, terms.global_terms[leaf] + terms.local_terms[leaf])
            assert len(values_T) == len(tree.trajectory(leaf)[0])
            places = [(step, token) for step in tree.path(tree.leaves[leaf]) for token in tree.steps[step].token_ids]
            for (step, _), value in zip(places, values_T, strict=True):
                assert seen.setdefault(step, value) == value
        assert np.isfinite(list(seen.values())).all() and len(seen) == len(tree.steps) - 1


# ----- what goes wrong -----------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["engine.submit", "engine.poll", "scorer.submit", "scorer.collect", "on_rollout"])
def test_an_exception_leaves_the_engine_empty(where, error):
    growth = GrowthSettings(max_completion_length=40)
    growers = [TreeGrower(prompt, growth, Splitter(), (i,)) for i, prompt in enumerate(PROMPTS)]
    engine = Engine(order=3)
    scorer = Scorer(engine)
    calls = []

    def fail_later(call):
        def wrapped(*args, **kwargs):
            result = call(*args, **kwargs)
            calls.append(1)
            if len(calls) >= 4 and engine.in_flight:
                raise error("told to")
            return result

        return wrapped

    on_rollout = fail_later(lambda: None) if where == "on_rollout" else lambda: None
    owner, _, name = where.partition(".")
    if name:
        target = {"engine": engine, "scorer": scorer}[owner]
        setattr(target, name, fail_later(getattr(target, name)))
    with pytest.raises(error, match="told to"):
        drive(growers, engine, scorer, on_rollout)
    assert not engine.in_flight and scorer.cancelled


@pytest.mark.parametrize(("extra", "found"), [(1, 41), (None, 0)])
def test_an_engine_that_breaks_its_promise_is_an_error(extra, found):
    def broken(prefix_ids, max_tokens, seed):
        length = 0 if extra is None else max_tokens + extra
        return [1] * length, [-1.0] * length

    engine = Engine(order=1, sample=broken)
    scorer = Scorer(engine)
    growers = [TreeGrower([9], GrowthSettings(max_completion_length=40), Splitter())]
    with pytest.raises(RuntimeError, match=f"returned {found} tokens for a rollout that asked for 1 to 40"):
        drive(growers, engine, scorer)
    assert not engine.in_flight and scorer.cancelled and not scorer.seen


# ----- what each round chose from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ib", "confidence"])
def test_a_choice_keeps_the_scores_that_it_beat(strategy):
    """Those of the tree as it was then: grown again from the rollouts of the rounds before."""
    growers, _ = grow(GrowthSettings(branching=strategy, max_completion_length=40))
    for grown in (grower.grown() for grower in growers):
        assert [choice.round for choice in grown.choices] == list(range(1, 9))
        for choice in grown.choices:
            before = RolloutTree(grown.tree.prompt_ids)
            for leaf, round in enumerate(grown.tree.rounds):
                if round < choice.round:
                    after = grown.tree.branch_steps[leaf]
                    ids, logprobs = grown.tree.trajectory(leaf)
                    inherited = grown.tree.steps[after].end
                    own = ids[inherited:]
                    before.open(after, round)
                    before.extend(leaf, own, logprobs[inherited:], Splitter().ends(own))
                    before.add_reward(leaf, grown.tree.rewards[leaf])
            scores = score_tree(before, beta=5.0)
            expected = scores.ib_score if strategy == "ib" else -scores.mean_confidence
            np.testing.assert_allclose(choice.priorities, expected[choice.candidates])
            assert choice.steps == choice.candidates[:1] and choice.deferred == []
            assert choice.eligible == max(1, int((scores.children[1:] > 0).sum()))
            assert choice.steps == [grown.tree.branch_steps[grown.tree.rounds.index(choice.round)]]


def test_a_choice_is_bounded_however_many_steps_there_are():
    def sample_long(prefix_ids, max_tokens, seed):
        length = max_tokens - random.Random(seed).randint(0, 5)
        return [4] * length, [-0.1 * (position % 7) for position in range(length)]

    engine = Engine(sample=sample_long)
    grower = TreeGrower([1], GrowthSettings(branch_lookahead=3, max_completion_length=600), Splitter())
    drive([grower], engine, Scorer(engine))
    for choice in grower.grown().choices:
        assert len(choice.candidates) <= CANDIDATES_KEPT + 1 < 100 < choice.eligible
        assert set(choice.steps) <= set(choice.candidates) and set(choice.deferred) <= set(choice.candidates)


def test_independent_rollouts_chose_nothing():
    growers, _ = grow(GrowthSettings(branching="independent"))
    assert all(grower.grown().choices == [] for grower in growers)
