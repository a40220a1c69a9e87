"""Do the completions have steps? What to say where they do not."""

import textwrap
from collections.abc import Sequence

FEW = 0.05  # share of completions with a second step, up to which almost none has one
# What people and models put between steps, and how it is called.
USUAL_DELIMITERS = {
    "\n\n": "a blank line",
    "\n": "a single line feed",
    "\r\n": "a Windows line feed",
    ". ": "a full stop and a space",
    "</think>": "the end of thinking",
    ";": "a semicolon",
}


def describe_missing_steps(completions: Sequence[str], with_steps: int, delimiters: Sequence[str]) -> str | None:
    """What a user should know where almost no completion has a second step.

    Args:
        completions: their texts.
        with_steps: how many of them have more than one step.
        delimiters: that were looked for.
    """
    if not completions or with_steps > FEW * len(completions):
        return None
    inner = [text.strip() for text in completions]
    found = {
        delimiter: sum(delimiter in text for text in inner) / len(inner)
        for delimiter in USUAL_DELIMITERS
        if delimiter not in delimiters
    }
    usual = [
        f"{USUAL_DELIMITERS[delimiter]} ({delimiter!r}) stands in {share:.0%}"
        for delimiter, share in sorted(found.items(), key=lambda each: -each[1])
        if share >= 0.2
    ]
    words = f"Of these completions, {'; '.join(usual)}" if usual else "None of the usual delimiters stands in many"
    longest = textwrap.shorten(repr(max(inner, key=len)), 300)
    return (
        f"Almost no completion has steps: `step_delimiter` ({', '.join(map(repr, delimiters))}) stands between two "
        f"steps in {with_steps} of {len(completions)} completions of this batch, so there is nothing to branch, and "
        f"these trees are ordinary groups. {words}. The longest: {longest}. Set `step_delimiter` to a text that the "
        "model writes between steps, or ask for blank lines between steps in the prompt. Said once."
    )


def describe_escapes(delimiters: Sequence[str]) -> str | None:
    """What a user should know where a delimiter holds a backslash and a letter in place of a line feed."""
    literal = [delimiter for delimiter in delimiters if "\\n" in delimiter or "\\r" in delimiter]
    if not literal:
        return None
    return (
        f"`step_delimiter` is {literal[0]!r}: a backslash and the letter n, not a line feed. A line feed is written "
        "\"\\n\" with double quotes in YAML, $'\\n' in a shell, '\\n' in Python."
    )
