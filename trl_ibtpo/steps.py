"""Cut a completion into steps: the text between blank lines.

A step is a run of token ids that ends with the token that completes a delimiter (``"\\n\\n"`` in the paper), or with
the completion. Three rules make the cut independent of what is sampled later, so that the steps of a prefix followed
by the steps of its continuation are the steps of the whole:

1. tokens are never divided: a delimiter inside a token, or split across tokens, ends the step at the end of the token
   that completes it, and the delimiter belongs to the step it ends;
2. the search starts afresh after every step;
3. a step must say something: white space and delimiters at its head do not end it.

Where a completion has several turns, the end of a turn ends a step too, and what follows it that nobody sampled (the
observation, such as the result of a tool) belongs to that step: `turn_ends`.

Steps may also be limited in tokens, or their ends moved at random: `limited_ends`.

Pure Python: the tokenizer is only asked for the text of single tokens.
"""

import random
from collections.abc import Callable, Sequence
from zlib import crc32


def step_ends(token_texts: Sequence[bytes], *delimiters: bytes) -> list[int]:
    """End positions of the steps of one completion.

    Args:
        token_texts: UTF-8 bytes of each token, `b""` for special tokens. Shape `(T,)`.
        delimiters: bytes that end a step; whichever comes first.

    Returns:
        Increasing exclusive ends; the last is `T`. Empty for an empty completion.
    """
    ends: list[int] = []
    text = b""
    for position, token_text in enumerate(token_texts):
        # At every token, since a delimiter at the head may itself be split across tokens.
        text = _skip_blank_head(text + token_text, delimiters)
        # Only the tail can hold a delimiter that was not there before this token.
        if any(text.find(each, max(0, len(text) - len(token_text) - len(each) + 1)) != -1 for each in delimiters):
            ends.append(position + 1)
            text = b""
    if len(token_texts) and (not ends or ends[-1] != len(token_texts)):
        ends.append(len(token_texts))
    return ends


def _skip_blank_head(text: bytes, delimiters: Sequence[bytes]) -> bytes:
    """Drop white space and whole delimiters from the head of a step."""
    while True:
        stripped = text.lstrip()
        for delimiter in delimiters:
            stripped = stripped.removeprefix(delimiter)
        if stripped == text:
            return text
        text = stripped


def limited_ends(
    ends: Callable[[int], list[int]],
    token_ids: Sequence[int],
    min_tokens: int = 1,
    max_tokens: int | None = None,
    noise: float = 0.0,
) -> list[int]:
    """End positions of steps of `min_tokens` to `max_tokens` tokens, some of them moved at random.

    A step ends with the first delimiter that is complete when it has `min_tokens`, and after `max_tokens` without
    one. A share `noise` of those ends come later, by 1 token up to the length of the step, drawn uniformly. The draw
    depends on the tokens of the step alone, so that a step ends in one place however often it is looked at.

    Args:
        ends: of the tokens from a place on, ends of their steps by delimiter alone, counted from there.
        token_ids: `(T,)`.
        min_tokens, max_tokens, noise: see above. Only the last step may be shorter.
    """
    found: list[int] = []
    start, total = 0, len(token_ids)
    fixed = min_tokens == max_tokens  # then no delimiter has a say
    delimited = [total] if fixed else ends(0)
    while start < total:
        end = next(end for end in delimited if end - start >= min_tokens or end == total)
        if max_tokens is not None:
            end = min(end, start + max_tokens)
        if noise and end < total:
            draw = random.Random(crc32(repr(list(token_ids[start:end])).encode()))
            if draw.random() < noise:
                end = min(total, end + draw.randint(1, end - start))
        found.append(end)
        start = end
        if not fixed and end not in delimited:
            delimited = [start + each for each in ends(start)]
        delimited = [each for each in delimited if each > start]
    return found


def turn_ends(
    ends: Callable[[Sequence[int]], list[int]], token_ids: Sequence[int], logprobs: Sequence[float | None]
) -> list[int]:
    """End positions of the steps of a completion that may have several turns.

    Args:
        ends: cuts the text of one turn, such as `StepSplitter.ends`.
        token_ids: `(T,)`; the first was sampled.
        logprobs: `(T,)`; None for the tokens of observations.

    Returns:
        Increasing exclusive ends; the last is `T`. None of them is inside an observation or at its head.
    """
    if _all_sampled(logprobs):
        return ends(token_ids)
    found, start = [], 0
    while start < len(token_ids):
        stop = _find(logprobs, start, observed=True)
        after = _find(logprobs, stop, observed=False)
        turn = ends(token_ids[start:stop])
        found += [start + end for end in turn[:-1]] + [after]
        start = after
    return found


def _all_sampled(logprobs: Sequence[float | None]) -> bool:
    try:
        sum(logprobs)  # five times as fast as looking for a None
    except TypeError:
        return False
    return True


def _find(logprobs: Sequence[float | None], start: int, observed: bool) -> int:
    """The first position from `start` that is observed or sampled; the length where there is none."""
    return next((at for at in range(start, len(logprobs)) if (logprobs[at] is None) == observed), len(logprobs))


class StepSplitter:
    """Cuts token ids into steps for one tokenizer.

    Works for byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-style vocabularies (Llama 2, Gemma, Mistral).
    The text of each token id is looked up once and kept, so memory is bounded by the vocabulary.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
        delimiter: text that ends a step, not empty, or several.
        min_tokens, max_tokens, noise: see `limited_ends`.
    """

    def __init__(
        self,
        tokenizer,
        delimiter: str | Sequence[str] = "\n\n",
        min_tokens: int = 1,
        max_tokens: int | None = None,
        noise: float = 0.0,
    ):
        self.delimiters = [each.encode() for each in ([delimiter] if isinstance(delimiter, str) else delimiter)]
        if not all(self.delimiters) or not self.delimiters:
            raise ValueError("`step_delimiter` is empty; give the text that ends a step, for example '\\n\\n'.")
        self.tokenizer = tokenizer
        self._limits = (min_tokens, max_tokens, noise)
        self._delimiter_bytes = set(b"".join(self.delimiters))
        self._special_ids = special_ids(tokenizer)
        self._byte_level = _is_byte_level(tokenizer)
        self._texts: dict[int, bytes] = {}
        self._plain: set[int] = set()  # tokens that say something and hold no byte of the delimiter
        self._plain_text = next(bytes([byte]) for byte in range(0x21, 0x7F) if byte not in self._delimiter_bytes)

    def ends(self, token_ids: Sequence[int]) -> list[int]:
        """Exclusive end positions of the steps of `token_ids` (see `step_ends` and `limited_ends`)."""
        if self._limits == (1, None, 0.0):
            return self._ends_by_text(token_ids)
        return limited_ends(lambda start: self._ends_by_text(token_ids[start:]), token_ids, *self._limits)

    def first(self, token_ids: Sequence[int | None], texts: Sequence[str]) -> int | None:
        """Position after the first token that completes one of `texts`; None where none does.

        No text goes on over a None, which stands for a token that is not looked at.
        """
        whole, wanted = b"", [text.encode() for text in texts]
        longest = max(map(len, wanted))
        for position, token_id in enumerate(token_ids, 1):
            whole = b"" if token_id is None else whole[-longest:] + self.text(token_id)
            if any(each in whole for each in wanted):
                return position
        return None

    def _ends_by_text(self, token_ids: Sequence[int]) -> list[int]:
        # A run of plain tokens, which is most of a text, neither ends a step nor is part of a delimiter: whatever it
        # says, it may stand for one plain token.
        texts, positions, read = [], [], 0
        plain = self._plain
        for position in [place for place, token_id in enumerate(token_ids) if token_id not in plain]:
            if position > read:
                texts.append(self._plain_text)
                positions.append(position)
            texts.append(self.text(token_ids[position]))
            positions.append(position + 1)
            read = position + 1
        if len(token_ids) > read:
            texts.append(self._plain_text)
            positions.append(len(token_ids))
        return [positions[end - 1] for end in step_ends(texts, *self.delimiters)]

    def text(self, token_id: int) -> bytes:
        """UTF-8 bytes that `token_id` adds to a text; `b""` for special tokens."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._look_up(token_id)
            if text.strip() and not set(text) & self._delimiter_bytes:
                self._plain.add(token_id)
        return text

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._special_ids:
            return b""
        piece = self.tokenizer.convert_ids_to_tokens(int(token_id))
        if piece is None:  # ids beyond the vocabulary, sampled from a padded embedding
            return b""
        if self._byte_level:
            # Added tokens are stored as plain text; as in decoding, one character outside the byte alphabet shows it.
            if not all(character in _BYTE_OF_CHARACTER for character in piece):
                return piece.encode()
            return b"".join(_BYTE_OF_CHARACTER[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def special_ids(tokenizer) -> frozenset[int]:
    """Ids of all special tokens, also of those without a role of their own, such as turn markers of chat templates."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    # A special token that was set but never added has no id, and nobody can sample it.
    return (frozenset(tokenizer.all_special_ids) | added) - {None}


def _is_byte_level(tokenizer) -> bool:
    """Whether the vocabulary writes bytes as printable characters, as GPT-2 does (a line feed is then U+010A)."""
    ids = tokenizer.encode("\n", add_special_tokens=False)
    return any("\u010a" in (piece or "") for piece in tokenizer.convert_ids_to_tokens(ids))


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's mapping: printable Latin-1 bytes stand for themselves, the rest are shifted to U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    alphabet.update({chr(0x100 + offset): bytes([byte]) for offset, byte in enumerate(shifted)})
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()
