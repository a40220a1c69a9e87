"""Text from models, users and errors, on one line."""


def one_line(text: str, longest: int | None = None) -> str:
    """`text` on one line of at most `longest` characters, without what a terminal would obey."""
    text = " ".join(text.split())
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "\u2026"
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
