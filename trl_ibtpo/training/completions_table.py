"""What TRL's table of completions says about trees: columns in the terminal, the parquet file and the trackers.

tree             number of the tree in the generation batch, over all processes
leaf             number of the trajectory in its tree
branched_after   how many of its first steps it shares with the trajectory that it branched from; 0: none
step_advantages  the completion with the advantage of each step before its text

In evaluation there are no trees, and the columns are empty.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..grown_tree import GrownTree

COLUMNS = ("tree", "leaf", "branched_after", "step_advantages")


def columns_of(grown: Sequence[GrownTree], first_tree: int) -> dict[str, list]:
    """The columns that are known before advantages are, one entry per trajectory, trees in order."""
    columns: dict[str, list] = {name: [] for name in COLUMNS[:-1]}
    for number, each in enumerate(grown, start=first_tree):
        for leaf, after in enumerate(each.tree.branch_steps):
            columns["tree"].append(number)
            columns["leaf"].append(leaf)
            columns["branched_after"].append(len(each.tree.path(after)))
    return columns


def mark_steps(grown: GrownTree, leaf: int, advantages_T: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    """A completion as text, each step with its advantage before it: `[+0.12] First add 3 and 4. ...`.

    Args:
        grown: the tree.
        leaf: which trajectory of it.
        advantages_T: of its tokens.
        decode: from token ids to text.
    """
    steps = [grown.tree.steps[step] for step in grown.tree.path(grown.tree.leaves[leaf])]
    # The last token that was sampled: an observation behind it has no advantage.
    marks = [advantages_T[step.end - step.observed - 1] for step in steps]
    return "".join(f"[{mark:+.2f}] {decode(step.token_ids)}" for mark, step in zip(marks, steps, strict=True))
