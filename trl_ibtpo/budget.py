"""Which questions get more rollouts, where a generation batch has a fixed number of leaves and its questions do not.

Every question has a share, the `G` leaves that it would have in a fixed group. It gives back what it does not need and
may be given what others did not need (`adaptive_budget` in `IBTPOConfig`):

    contrast(q)   the largest j for which j answers of the question are better than j others of it
    enough        contrast >= k: j right and j wrong answers, for success 0 or 1
    chance(q)     (contrast + 1) / (n + 2)            that the next answer, after n, brings the outcome that is rarer
    headroom(q)   (n - sum of success + 1) / (n + 2)  what there is to learn
    gain(q)       chance * headroom                   the next leaf goes where it is highest

`chance` and `headroom` are posterior means of uniform priors. A question stops when it has enough. One whose answers
are all right has its share, as others do, but gets of the rest only what nobody else needs; and so does one none of
whose answers could be scored.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


def contrast(success_L: Sequence[float]) -> int:
    """The largest j for which j answers are better than j others; NaN is left out. 0 where all are equal."""
    known = np.sort([success for success in success_L if not np.isnan(success)])
    half = len(known) // 2
    return int(np.count_nonzero(known[::-1][:half] > known[:half]))


def gain(success_L: Sequence[float], leaves: int) -> float:
    """What the next leaf of a question is worth: `chance * headroom`, in (0, 1).

    Args:
        success_L: of its answers; NaN where unknown, which counts as an answer that is not right.
        leaves: how many it will have before this one; those still to come count as no surprise.
    """
    headroom = (len(success_L) - np.nansum(success_L) + 1) / (len(success_L) + 2)
    return float((contrast(success_L) + 1) / (leaves + 2) * headroom)


def all_right(success_L: Sequence[float]) -> bool:
    """Whether every answer is; NaN is left out."""
    known = [success for success in success_L if not np.isnan(success)]
    return bool(known) and min(known) == 1


def unknown(success_L: Sequence[float]) -> bool:
    """Whether no answer could be scored."""
    return bool(np.isnan(success_L).all())


class Question(Protocol):
    """What the budget asks of a tree that grows."""

    done: bool  # it has all the leaves that it may have, or stopped before
    limit: int  # leaves that it may have, or has where it stopped
    success: Sequence[float]  # of its leaves

    def grant(self, leaves: int, to_the_last: bool = False) -> None:
        """Let it have more leaves; where it must, also if it does not need them."""


class LeafBudget:
    """The leaves of one generation batch.

    Args:
        total: leaves to share out, all of them.
        wanted: the outcomes of each kind that are enough: `k`.
        portion: leaves that a question is given at a time while others still grow.
        unit: leaves that no question can divide: a round.
        in_order: share out only when no question grows, so that nothing depends on which was first.
    """

    def __init__(self, total: int, wanted: int, portion: int, unit: int = 1, in_order: bool = False):
        self.total, self.wanted, self.unit, self.in_order = total, wanted, unit, in_order
        self.portion = -(-portion // unit) * unit

    def share_out(self, questions: Sequence[Question]) -> list[int]:
        """Give what was given back to those that need it; returns which of them have something to do now."""
        free = self.total - sum(question.limit for question in questions)
        growing = any(not question.done for question in questions)
        if not free or (growing and self.in_order):
            return []
        lacking = [
            i
            for i, each in enumerate(questions)
            if each.done and contrast(each.success) < self.wanted and not unknown(each.success)
        ]
        if growing:
            # Those whose answers are all right wait for what the others leave.
            return self._portions(questions, [i for i in lacking if not all_right(questions[i].success)], free)
        return self._all(questions, lacking, free)

    def _portions(self, questions: Sequence[Question], candidates: list[int], free: int) -> list[int]:
        given = []
        for i in sorted(candidates, key=lambda i: -gain(questions[i].success, questions[i].limit)):
            if not free:
                break
            leaves = min(self.portion, free)
            questions[i].grant(leaves)
            given, free = [*given, i], free - leaves
        return given

    def _all(self, questions: Sequence[Question], lacking: list[int], free: int) -> list[int]:
        """One leaf after the other, as if none of them brought an outcome; whoever has enough gives the rest back."""
        more = dict.fromkeys(lacking or range(len(questions)), 0)
        while free:

            def worth(i: int) -> float:
                leaves = questions[i].limit + more[i]
                return gain(questions[i].success, leaves) if lacking else -leaves

            more[max(more, key=worth)] += self.unit
            free -= self.unit
        for i, leaves in more.items():
            if leaves:
                questions[i].grant(leaves, to_the_last=not lacking)
        return [i for i, leaves in more.items() if leaves]
