"""avg@k and pass@k on a JSONL of questions and answers.

`evaluate` samples n completions per question with vLLM or transformers and grades them with math-verify. What a
question was given depends on the settings and its own number alone, so a run that was cut short and goes on from its
samples file ends with the numbers of one that was not.

Figures, for a question with c right of n completions:

    avg@n    c / n
    pass@k   1 - C(n - c, k) / C(n, k)     unbiased, for k <= n (Chen et al. 2021, arXiv 2107.03374)

each averaged over questions, with the normal interval of that mean: mean +- 1.96 standard errors over questions.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import load_tokenizer, model_stamp
from .estimates import pass_at_k, summarise
from .samples import ENGINES, SamplesFile, SamplingSettings, as_applied, encode_prompts, sample

QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "solution")

# A word, also "ln" and "pi" without a backslash. Two letters, as in 2xy, are a product, but alone may be "no".
WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|(?:ln|lg|pi)(?![A-Za-z]))|^[A-Za-z]{2}$")
# 1e-3 is read with Euler's number, 2023-01-01 and 1/2/2023 are calculated, and 10:30 equals 9:27.
MISREAD_NUMBERS = re.compile(r"\de[+-]?\d|\b\d{4}-\d\d?-\d\d?\b|\b\d\d?/\d\d?/\d{4}\b|\b\d\d?:\d\d\b")


@dataclass(frozen=True)
class Question:
    """A row of the JSONL: text or a list of chat messages, and the right answer."""

    prompt: str | list[dict[str, str]]
    answer: str


def read_questions(path: str | Path) -> list[Question]:
    """Read a JSONL; every error names the line."""
    questions = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, is a {type(row).__name__}; it must be an object.")
            prompt, answer = (
                _field(row, names, f"{path}, line {number}") for names in (QUESTION_FIELDS, ANSWER_FIELDS)
            )
            if not (isinstance(prompt, list) or (isinstance(prompt, str) and prompt.strip())):
                raise ValueError(f"{path}, line {number}: the question is {prompt!r}; it must be text or messages.")
            questions.append(Question(prompt, str(answer)))
    if not questions:
        raise ValueError(f"{path} holds no questions.")
    return questions


def _field(row: dict[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}, has none of the fields {', '.join(names)} (it has: {', '.join(row) or 'none'}).")


class Grader:
    """math-verify's verdict on completions of one question.

    An answer may be bare LaTeX, a worked solution with `\\boxed{}` or `$...$`, or end with GSM8K's `#### 72`.
    """

    def __init__(self, answer: str):
        from math_verify import parse

        text = answer.rsplit("####", 1)[-1].strip()
        bare = "\\boxed" not in text and "$" not in text
        forms = [f"\\boxed{{{text}}}", text] if bare else [text]
        self._gold = next((parsed for form in forms if (parsed := parse(form))), [])
        remedy = "give a number or a LaTeX expression, with words in \\text{...}."
        if not self._gold or isinstance(self._gold[0], str):
            raise ValueError(f"math-verify cannot read the answer {answer!r}; {remedy}")
        if bare and _is_spelled(text, self._gold[0]):
            raise ValueError(
                f"math-verify cannot read the answer {answer!r} other than as the product {self._gold[0]}; {remedy}"
            )
        if bare and MISREAD_NUMBERS.search(text):
            raise ValueError(
                f"math-verify cannot read the answer {answer!r} other than as {self._gold[0]}; write a number in "
                "full, a ratio as \\frac{1}{20}, and leave out questions about dates and times, which fail."
            )

    def __call__(self, completion: str) -> int:
        return self.grade(completion)[0]

    def grade(self, completion: str) -> tuple[int, str | None]:
        """The verdict, and what was read as the answer of a completion; `None` where there was nothing to read."""
        from math_verify import parse, verify

        parsed = parse(completion)
        return int(verify(self._gold, parsed)), str(parsed[0]) if parsed else None


def _is_spelled(text: str, parsed: Any) -> bool:
    """Whether a word was read as a product of its letters."""
    spelled = WORD.search(re.sub(r"\\(?:text|mathrm|operatorname)\*?{[^}]*}", "", text))
    return spelled is not None and len(getattr(parsed, "free_symbols", ())) > 1


# ----- the whole -----------------------------------------------------------------------------------------------------


def evaluate(
    settings: SamplingSettings,
    data: str | Path,
    ks: Sequence[int] = (),
    samples: str | Path | None = None,
    engine_arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Sample, grade and summarise.

    Args:
        settings: model and sampling.
        data: JSONL of questions and answers.
        ks: for pass@k; none above `settings.num_samples`.
        samples: JSONL to which every question's graded completions are appended; questions already there are not
            sampled again. Written with other settings, weights or data, it is an error.
        engine_arguments: passed on to vLLM's `LLM` or transformers' `from_pretrained`.

    Returns:
        A JSON-ready dict: `settings` (`chat_template` says whether one was applied), `questions`, `cut` (share of
        completions that reached `max_new_tokens`), `unread` (share in which math-verify found no answer) and
        `metrics`, a list of `Estimate` as dicts.
    """
    from tqdm.auto import tqdm

    for k in ks:
        pass_at_k(settings.num_samples, 0, k)
    questions = read_questions(data)
    graders = []
    for number, question in enumerate(questions, start=1):  # an unreadable answer is found before sampling
        try:
            graders.append(Grader(question.answer))
        except ValueError as error:
            raise ValueError(f"{data}, question {number}: {error}") from error
    settings = as_applied(settings)
    digest = hashlib.sha256(Path(data).read_bytes()).hexdigest()
    fingerprint = {**asdict(settings), "model_files": model_stamp(settings.model), "data_sha256": digest}
    records = SamplesFile(samples, fingerprint)
    records.say_found(len(questions), "questions")
    prompt_ids = encode_prompts(settings, [question.prompt for question in questions])
    missing = {index: ids for index, ids in enumerate(prompt_ids) if index not in records}
    if missing:
        longest = max(map(len, prompt_ids)) + settings.max_new_tokens
        tqdm.write(f"Loading {settings.model} with {settings.engine}", file=sys.stderr)
        engine = ENGINES[settings.engine](settings, longest, engine_arguments or {})
        decode = load_tokenizer(settings.model).batch_decode
        progress = tqdm(desc="Evaluating", unit="question", total=len(questions), initial=len(records))
        for index, token_ids in sample(settings, missing, engine):
            completions = decode(token_ids, skip_special_tokens=True)
            verdicts = [graders[index].grade(completion) for completion in completions]
            records.append(
                {
                    "index": index,
                    "question": questions[index].prompt,
                    "answer": questions[index].answer,
                    "completions": completions,
                    "tokens": [len(ids) for ids in token_ids],
                    "parsed": [parsed for _, parsed in verdicts],
                    "correct": [correct for correct, _ in verdicts],
                }
            )
            progress.update()
        progress.close()
    rows = [records[index] for index in range(len(questions))]
    lengths = np.array([row["tokens"] for row in rows])
    return {
        "settings": fingerprint,
        "questions": len(questions),
        "cut": float((lengths >= settings.max_new_tokens).mean()),
        "unread": float(np.mean([[parsed is None for parsed in row["parsed"]] for row in rows])),
        "metrics": [asdict(each) for each in summarise([row["correct"] for row in rows], ks)],
    }
