"""A policy whose probabilities are known exactly: chains of arithmetic, without a model.

A question is a first number and a chain of operations modulo a prime. Every step of an answer is three tokens that
are nearly certain, the result of one operation, and a blank line; a mistake is carried on. What the policy knows are
facts, `a op b`: most it gets right nearly always, some now and then, some seldom, and a mistake is one of two results
that go with the fact. The longer the chain, the rarer the right answer.

Sampling costs microseconds, so differences between rules can be seen that a trained model would take hours for. The
n-th continuation of a prefix is the same whenever it is asked for since `rewind`.
"""

import random
import zlib
from collections import Counter
from math import log

from trl_ibtpo.engines.base import Rollout, RolloutRequest

# Share of the facts, and the range from which their probability of being right is drawn.
RELIABILITY = [(0.6, (0.98, 0.98)), (0.3, (0.4, 0.8)), (0.1, (0.03, 0.2))]
MODULUS = 17
BLANK_LINE, END, FIRST_NUMBER = 1, 2, 10  # token ids; numbers come last
HEAD = [(3, -0.01), (4, -0.01), (5, -0.01)]  # what a step begins with, and its log-probabilities


class BlankLines:
    """Cuts answers into steps."""

    def ends(self, token_ids):
        ends = [end for end, token_id in enumerate(token_ids, 1) if token_id == BLANK_LINE]
        return ends if ends[-1:] == [len(token_ids)] else [*ends, len(token_ids)]


class SimulatedChains:
    """An engine, and the questions that it answers; a prompt is the number of its question.

    Args:
        steps: operations of a question.
        questions: how many.
        seed: of the questions; the facts are always the same.
    """

    max_length, clock = None, "polls"

    def __init__(self, steps: int, questions: int, seed: int = 0):
        facts, self._facts = random.Random(0), {}
        shares, ranges = zip(*RELIABILITY, strict=True)
        for a in range(MODULUS):
            for operation in range(3):
                for b in range(1, MODULUS):
                    right = [a + b, a - b, a * b][operation] % MODULUS
                    wrong = facts.sample([value for value in range(MODULUS) if value != right], 2)
                    (low, high) = facts.choices(ranges, shares)[0]
                    self._facts[a, operation, b] = facts.uniform(low, high), right, wrong
        rng = random.Random(f"{steps} {seed}")
        self._questions = [
            (rng.randrange(MODULUS), [(rng.randrange(3), rng.randrange(1, MODULUS)) for _ in range(steps)])
            for _ in range(questions)
        ]
        self._seed = seed
        self.rewind()

    def rewind(self) -> None:
        self._asked, self._queue = Counter(), []

    def prompt(self, question: int) -> list[int]:
        return [question]

    def answer(self, completion_ids: list[int]) -> int:
        return completion_ids[-2]

    def is_right(self, question: int, completion_ids: list[int]) -> bool:
        value, operations = self._questions[question]
        for operation, b in operations:
            value = self._facts[value, operation, b][1]
        return self.answer(completion_ids) == FIRST_NUMBER + value

    def submit(self, requests: list[RolloutRequest]) -> None:
        for request in requests:
            prefix = tuple(request.prefix_ids)
            self._queue.append((request.request_id, prefix, self._asked[prefix]))
            self._asked[prefix] += 1

    def poll(self) -> list[Rollout]:
        queue, self._queue = self._queue, []
        return [Rollout(name, *self._sample(prefix, number)) for name, prefix, number in queue]

    def _sample(self, prefix: tuple[int, ...], number: int) -> tuple[list[int], list[float]]:
        rng = random.Random(zlib.crc32(repr((self._seed, prefix, number)).encode()))
        value, operations = self._questions[prefix[0]]
        done = [place for place, token_id in enumerate(prefix) if place and token_id == BLANK_LINE]
        begun = len(prefix) - 1 - (done[-1] if done else 0)  # tokens of the step that the prefix ends in
        if done:
            value = prefix[done[-1] - 1] - FIRST_NUMBER
        token_ids, logprobs = [], []
        for step in range(len(done), len(operations)):
            reliability, right, wrong = self._facts[(value, *operations[step])]
            correct = rng.random() < reliability
            value = right if correct else rng.choice(wrong)
            if begun > len(HEAD):  # its result is in the prefix
                value = prefix[-1] - FIRST_NUMBER
            last = END if step == len(operations) - 1 else BLANK_LINE
            result = (FIRST_NUMBER + value, log(reliability if correct else (1 - reliability) / 2))
            for token_id, logprob in [*HEAD, result, (last, -0.005)][begun:]:
                token_ids.append(token_id)
                logprobs.append(logprob)
            begun = 0
        return token_ids, logprobs

    def generated(self, request_id) -> int:
        return 0  # all or nothing

    def abort(self) -> None:
        self._queue = []
