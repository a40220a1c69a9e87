"""The tasks of `benchmarks.learning`: chains of modular arithmetic, and sums by columns from `reasoning_gym`.

**Chains.** A question is a first number and a chain of operations, in arithmetic modulo a prime: `n5 s1 + n3 s2 * n4`.
An answer works through it, one labelled step after the other, with blank lines between them: `s1 n5 + n3 n8`, `s2 n8 *
n4 n32`. The label and the operation can be looked up in the question; the result is a fact. A mistake changes the
facts of all steps after it.

**Columns.** A question is a sum or difference of two numbers, written column by column from the right: `c1 7 - 9 c2 4
- 1`. An answer goes through the columns, with the digit and the carry of each: `c1 7 - 9 k0 8 k1`, `c2 4 - 1 k1 2 k0`.
A mistake changes the next column at most, so steps are nearly independent.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from random import Random
from typing import Any

import reasoning_gym

from benchmarks.facts import FactTask

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Chain(FactTask):
    """Arithmetic modulo a prime, step after step."""

    _: KW_ONLY
    steps: int
    modulus: int

    def result(self, a: int, op: str, b: int) -> int:
        return OPERATIONS[op](a, b) % self.modulus

    def all_facts(self) -> Iterator[tuple[tuple[int, str, int], int, list[int]]]:
        for a in range(self.modulus):
            for op in OPERATIONS:
                for b in range(1, self.modulus):
                    yield (a, op, b), self.result(a, op, b), list(range(self.modulus))

    def words(self) -> list[str]:
        labels = [f"s{number}" for number in range(1, self.steps + 1)]
        return [*OPERATIONS, *labels, *(f"n{value}" for value in range(self.modulus))]

    def questions(self, count: int, seed: int) -> list[dict[str, Any]]:
        rng, rows = Random(f"{self.name} {seed}"), []
        for _ in range(count):
            first = rng.randrange(self.modulus)
            operations = [(rng.choice(list(OPERATIONS)), rng.randrange(1, self.modulus)) for _ in range(self.steps)]
            steps = [f"s{number} {op} n{b}" for number, (op, b) in enumerate(operations, 1)]
            row = {"prompt": " ".join([f"n{first}", *steps, ":"]), "first": first, "operations": operations}
            rows.append({**row, "solution": self.solution(row)})
        return rows

    def solution(self, row: dict[str, Any], rng: Random | None = None) -> str:
        value, lines = row["first"], []
        for number, (op, b) in enumerate(row["operations"], 1):
            outcome = self.recalled((value, op, b), self.result(value, op, b), rng)
            lines.append(f"s{number} n{value} {op} n{b} n{outcome}")
            value = outcome
        return " \n\n ".join(lines)

    def reward(self, completions: list[str], solution: list[str], **kwargs) -> list[float]:
        """1 where every step is right, as a proof checker would have it; a wrong chain may not end well by luck."""
        return [float(text.split() == right.split()) for text, right in zip(completions, solution, strict=True)]

    @property
    def max_completion_length(self) -> int:
        return 6 * self.steps + 4  # a solution is six tokens a step, the stop token in place of the last blank line


@dataclass(frozen=True)
class Columns(FactTask):
    """`chain_sum` of `reasoning_gym` with two numbers of as many digits, on paper."""

    _: KW_ONLY
    digits: int

    COLUMNS = ("solution", "answer")

    @staticmethod
    def result(op: str, a: int, b: int, carry: int) -> tuple[int, int]:
        """Digit and carry of a column."""
        value = a + b + carry if op == "+" else a - b - carry
        return value % 10, int(not 0 <= value < 10)

    def all_facts(self) -> Iterator[tuple[tuple, tuple[int, int], list[tuple[int, int]]]]:
        possible = [(digit, carry) for digit in range(10) for carry in range(2)]
        for op in "+-":
            for a in range(10):
                for b in range(10):
                    for carry in range(2):
                        yield (op, a, b, carry), self.result(op, a, b, carry), possible

    def words(self) -> list[str]:
        return [*"+-", *map(str, range(10)), "k0", "k1", *(f"c{column}" for column in range(1, self.digits + 1))]

    def questions(self, count: int, seed: int) -> list[dict[str, Any]]:
        # The library's questions of neighbouring seeds are the same ones, shifted by one, and -2 is to it what 2 is.
        source = reasoning_gym.create_dataset(
            "chain_sum",
            seed=(seed + 1000) * 1_000_000,
            size=count,
            min_terms=2,
            max_terms=2,
            min_digits=self.digits,
            max_digits=self.digits,
        )
        rows = []
        for entry in source:
            first, op, second = entry["metadata"]["expression"].split()
            columns = [(int(a), op, int(b)) for a, b in zip(reversed(first), reversed(second), strict=True)]
            written = " ".join(f"c{number} {a} {op} {b}" for number, (a, op, b) in enumerate(columns, 1))
            row = {"prompt": f"{written} :", "answer": entry["answer"], "columns": columns}
            rows.append({**row, "solution": self.solution(row)})
        return rows

    def solution(self, row: dict[str, Any], rng: Random | None = None) -> str:
        carry, lines = 0, []
        for number, (a, op, b) in enumerate(row["columns"], 1):
            digit, after = self.recalled((op, a, b, carry), self.result(op, a, b, carry), rng)
            lines.append(f"c{number} {a} {op} {b} k{carry} {digit} k{after}")
            carry = after
        return " \n\n ".join(lines)

    def answer(self, completion: str) -> str:
        """The number that is read off the columns; empty where they are not what they should be."""
        lines = [line.split() for line in completion.split("\n\n")]
        if len(lines) != self.digits or any(len(line) != 7 for line in lines):
            return ""
        digits, carry, op = "".join(line[5] for line in reversed(lines)), lines[-1][6], lines[-1][2]
        if not (digits.isdecimal() and len(digits) == self.digits and carry in ("k0", "k1") and op in "+-"):
            return ""
        beyond = int(carry[1]) * 10**self.digits
        return str(int(digits) + beyond if op == "+" else int(digits) - beyond)

    def reward(self, completions: list[str], solution: list[str], answer: list[str], **kwargs) -> list[float]:
        """1 where the library scores the answer as right, in full, and every column shows how it came about.

        For the answer alone a policy learns to write right digits behind wrong columns.
        """
        scorer = reasoning_gym.create_dataset("chain_sum", size=1)
        return [
            float(text.split() == work.split() and scorer.score_answer(self.answer(text), {"answer": right}) == 1)
            for text, work, right in zip(completions, solution, answer, strict=True)
        ]

    @property
    def max_completion_length(self) -> int:
        return 8 * self.digits + 4


CHAIN10 = Chain("chain10", steps=10, modulus=23)
TASKS: dict[str, FactTask] = {
    task.name: task
    for task in (
        Chain("chain3", steps=3, modulus=23, warm_steps=(250,), warm_learning_rate=1e-3, base=CHAIN10),
        Chain("chain7", steps=7, modulus=23, warm_steps=(250,), warm_learning_rate=1e-3, base=CHAIN10),
        CHAIN10,
        Chain("chain8", steps=8, modulus=17),
        Chain("chain12", steps=12, modulus=37, warm_steps=(1200, 1200), hidden=96, layers=3),
        Columns("sums", digits=7),
    )
}
