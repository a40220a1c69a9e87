"""Where steps end: tokens are never divided, nothing is lost, and the cut does not depend on what comes later."""

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from trl_ibtpo.steps import StepSplitter, limited_ends, special_ids, step_ends

TOKENIZERS = {"byte_level": tiny.byte_level_tokenizer(), "sentencepiece": tiny.sentencepiece_tokenizer()}
DELIMITERS = ["\n\n", "\n", "###", " then ", "。", "---"]

# Text with many delimiters, blank lines and characters of several bytes.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["\n", "\n\n", "\n\n\n", "\r\n", " ", "\t", "#", "##", "###", "-", "。", " then ", "3 + 4", "π"]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


def completed(pieces: list[bytes], delimiter: bytes) -> bool:
    """Whether the pieces, read as the whole step so far, hold a delimiter after white space and delimiters."""
    text = b"".join(pieces)
    while text != (stripped := text.lstrip().removeprefix(delimiter)):
        text = stripped
    return delimiter in text


# ----- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "delimiter", "ends"),
    [
        ("", "\n\n", []),
        ("a", "\n\n", [1]),
        ("a|\n\n|b", "\n\n", [2, 3]),  # a token of its own
        ("a|.\n\n|b", "\n\n", [2, 3]),  # at the end of a token
        ("a|.\n\nb|c", "\n\n", [2, 3]),  # inside a token, which is not divided
        ("a|\n|\n|b", "\n\n", [3, 4]),  # split across tokens
        ("a|\n|b|\n|c", "\n\n", [5]),  # single line feeds do not add up
        ("a|.\n|\nb|c", "\n\n", [3, 4]),
        ("a\n\nb\n\nc|d", "\n\n", [1, 2]),  # two in one token are one end
        ("a|\n\n", "\n\n", [2]),  # the completion ends with a delimiter: no empty step
        ("a|\n\n|\n\n|\n|b|\n\n|c", "\n\n", [2, 6, 7]),  # a run of blank lines belongs to the step after it
        ("a|\n|\n|\n|b|\n\n", "\n\n", [3, 6]),  # ... also token by token
        ("\n\n|\n|a|\n\n|b", "\n\n", [4, 5]),  # leading blank lines do not end a step
        ("\n\n|\n\n|  \n\n", "\n\n", [3]),  # nothing is said at all
        ("\n\na\n\n|b", "\n\n", [1, 2]),  # blank head and delimiter in the same token
        ("a|\r\n|\r\n|b", "\n\n", [4]),  # the delimiter is taken literally
        ("a|\n|b", "\n", [2, 3]),
        ("a|\n\n\n|b|\n", "\n", [2, 4]),
        ("x|#|##|y|###|z", "###", [3, 5, 6]),
        ("#|##| x|###|y", "###", [4, 5]),  # a delimiter at the head, split across tokens
        ("##|##|##|#x|###|y", "###", [5, 6]),  # ... and running on
        ("### ### a|###b|c", "###", [2, 3]),
        ("数|学|。|π", "。", [3, 4]),
        ("a|aa|b|aa|b", "aa", [4, 5]),  # the head "aaa" is a delimiter and an "a"
        ("aa|a|b|aa|b", "aa", [4, 5]),  # ... however it is cut into tokens
        ("a| th|en |b", " then ", [3, 4]),
    ],
)
def test_step_ends(tokens, delimiter, ends):
    texts = [token.encode() for token in tokens.split("|")] if tokens else []
    assert step_ends(texts, delimiter.encode()) == ends


def test_a_character_split_across_tokens():
    # "。" is three bytes; byte-level vocabularies sample them one by one.
    delimiter = "。".encode()
    texts = [b"a", delimiter[:1], delimiter[1:2], delimiter[2:], b"b"]
    assert step_ends(texts, delimiter) == [4, 5]
    assert step_ends([delimiter[:2], delimiter[2:], *texts], delimiter) == [6, 7]  # at the head it ends nothing


def test_a_delimiter_behind_the_end_of_another_at_the_head():
    """In one token, of delimiters that differ in length; however that text is cut, the step ends with it."""
    delimiters = (b"</think>", b"\n\n")
    assert step_ends([b"</thin", b"k>Q\n\n", b"rest"], *delimiters) == [2, 3]
    assert step_ends([b"</think>Q\n\n", b"rest"], *delimiters) == [1, 2]


def test_special_tokens_add_no_text():
    # The end-of-sequence token after a delimiter is a step; between two line feeds it does not part them.
    assert step_ends([b"a", b"\n\n", b""], b"\n\n") == [2, 3]
    assert step_ends([b"a", b"\n", b"", b"\n", b"b"], b"\n\n") == [4, 5]
    assert step_ends([b""], b"\n\n") == [1]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_splits_a_chain_of_thought(family):
    tokenizer = TOKENIZERS[family]
    text = "First add 3 and 4.\n\nThat gives 7.\n\n\nThe answer is 7."
    token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    ends = StepSplitter(tokenizer).ends(token_ids)
    steps = [tokenizer.decode(token_ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    assert len(steps) == 3
    assert steps[0] == "First add 3 and 4.\n\n"
    assert steps[1].strip() == "That gives 7." and steps[2].strip() == "The answer is 7.<eos>"


@pytest.mark.parametrize("family", TOKENIZERS)
def test_special_and_unknown_ids_have_no_text(family):
    tokenizer = TOKENIZERS[family]
    splitter = StepSplitter(tokenizer)
    dropped = [token_id for token_id in range(len(tokenizer)) if not tokenizer.decode([token_id], True)]
    assert tokenizer.eos_token_id in dropped and tokenizer.convert_tokens_to_ids("<assistant>") in dropped
    for token_id in [*dropped, len(tokenizer), len(tokenizer) + 5000]:  # beyond the vocabulary: a padded embedding
        assert splitter.text(token_id) == b""
    assert splitter.ends([len(tokenizer) + 1, tokenizer.eos_token_id]) == [2]
    assert splitter.ends([]) == []


def test_added_tokens_are_read_as_they_are_decoded():
    tokenizer = tiny.byte_level_tokenizer()
    contents = ["<think>", "数\n\n", "é é", "\n\n\n\n"]
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in contents])
    splitter = StepSplitter(tokenizer)
    for content in contents:
        token_id = tokenizer.convert_tokens_to_ids(content)
        assert splitter.text(token_id).decode() == content == tokenizer.decode([token_id])
    token_ids = tokenizer.encode("So", add_special_tokens=False) + tokenizer.convert_tokens_to_ids(contents)
    # "So", "<think>" and "数" with its blank line are a step; a run of line feeds after "é é" ends the next.
    assert splitter.ends(token_ids) == [len(token_ids) - 2, len(token_ids)]


def test_a_special_token_that_was_never_added_has_no_id():
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.pad_token = "<|not there|>"
    assert None in tokenizer.all_special_ids
    assert all(isinstance(token_id, int) for token_id in special_ids(tokenizer))


def test_line_feeds_as_pieces_of_their_own():
    # Gemma's vocabulary has plain "\n" and "\n\n" pieces beside byte tokens.
    vocabulary = {"<unk>": 0, "\n": 1, "\n\n": 2, "▁a": 3, "b": 4, "<0x0A>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    splitter = StepSplitter(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert [splitter.text(token_id) for token_id in (1, 2, 3, 4, 5)] == [b"\n", b"\n\n", b" a", b"b", b"\n"]
    assert splitter.ends([3, 2, 4, 1, 5, 4]) == [2, 5, 6]


def test_empty_delimiter_is_an_error():
    with pytest.raises(ValueError, match="`step_delimiter` is empty"):
        StepSplitter(TOKENIZERS["byte_level"], "")


def test_texts_are_looked_up_once():
    tokenizer = tiny.byte_level_tokenizer()
    splitter = StepSplitter(tokenizer)
    token_ids = tokenizer.encode("a\n\nb", add_special_tokens=False)
    ends = splitter.ends(token_ids)
    splitter.tokenizer = None  # any further look-up would fail
    assert splitter.ends(token_ids) == ends


# ----- any text, any ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=150, deadline=None, database=None)
@given(text=TEXTS, delimiter=st.sampled_from(DELIMITERS))
def test_steps_join_back_and_end_where_a_delimiter_is_completed(family, text, delimiter):
    tokenizer = TOKENIZERS[family]
    splitter = StepSplitter(tokenizer, delimiter)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    ends = splitter.ends(token_ids)
    steps = [token_ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert all(steps) and [token_id for step in steps for token_id in step] == token_ids
    for number, step in enumerate(steps):
        pieces = [splitter.text(token_id) for token_id in step]
        assert not completed(pieces[:-1], delimiter.encode())
        assert completed(pieces, delimiter.encode()) or number == len(steps) - 1


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data(), delimiter=st.sampled_from(DELIMITERS))
def test_steps_of_prefix_and_continuation_are_those_of_the_whole(family, data, delimiter):
    """For any ids a model may sample, not only those the tokenizer would write."""
    tokenizer = TOKENIZERS[family]
    splitter = StepSplitter(tokenizer, delimiter)
    prompt = tokenizer.encode(data.draw(TEXTS), add_special_tokens=False)
    sampled = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=20))
    token_ids = prompt + sampled + tokenizer.encode(data.draw(TEXTS), add_special_tokens=False)
    ends = splitter.ends(token_ids)
    for cut in ends:
        assert splitter.ends(token_ids[:cut]) == [end for end in ends if end <= cut]
        assert [cut + end for end in splitter.ends(token_ids[cut:])] == [end for end in ends if end > cut]


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=150, deadline=None, database=None)
@given(text=TEXTS)
@example(text="Naïve café, 数学 and π.\r\n\r\n- item one\n")
@example(text=" leading space and \U0001f600")
def test_token_texts_agree_with_the_tokenizer(family, text):
    tokenizer = TOKENIZERS[family]
    splitter = StepSplitter(tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    text = b"".join(splitter.text(token_id) for token_id in token_ids).decode(errors="replace")
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data(), delimiter=st.sampled_from([*DELIMITERS, "x", "a\nb"]))
def test_plain_tokens_are_skipped_without_a_difference(family, data, delimiter):
    """Any tokens, read twice, so that all of them are known the second time: the cut of reading every token."""
    splitter = StepSplitter(TOKENIZERS[family], delimiter)
    ids = TOKENIZERS[family](data.draw(TEXTS), add_special_tokens=False)["input_ids"]
    ids += data.draw(st.lists(st.integers(0, len(TOKENIZERS[family]) - 1), max_size=30))
    expected = step_ends([splitter.text(token_id) for token_id in ids], delimiter.encode())
    fresh = StepSplitter(TOKENIZERS[family], delimiter)
    assert splitter.ends(ids) == fresh.ends(ids) == fresh.ends(ids) == expected


# ----- several delimiters, limits in tokens, noise -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "delimiters", "ends"),
    [
        ("a|\n\n|b|###|c", ["\n\n", "###"], [2, 4, 5]),
        ("a|#|##|b|\n|\n|c", ["###", "\n\n"], [3, 6, 7]),
        ("a|\n\n|###|b|\n\n|c", ["\n\n", "###"], [2, 5, 6]),  # a delimiter at the head of a step ends nothing
        ("a|.\n\n|b", ["\n\n", ".\n"], [2, 3]),  # of two that overlap, whichever is complete first
    ],
)
def test_several_delimiters(tokens, delimiters, ends):
    assert step_ends([token.encode() for token in tokens.split("|")], *(each.encode() for each in delimiters)) == ends
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(tokens.replace("|", ""))
    assert len(StepSplitter(tokenizer, delimiters).ends(ids)) == len(ends)


def every(period: int):
    """Delimiters by position: the `period`-th token from where a step starts, and so on."""

    def ends_from(tokens):
        return lambda start: [*range(period, len(tokens) - start, period), len(tokens) - start]

    return ends_from


@pytest.mark.parametrize(
    ("period", "limits", "ends"),
    [
        (3, {}, [3, 6, 9, 10]),
        (3, {"min_tokens": 4}, [6, 10]),  # the delimiter at 3 comes too early, that at 9 as well
        (3, {"max_tokens": 2}, [2, 4, 6, 8, 10]),
        (4, {"max_tokens": 3}, [3, 6, 9, 10]),  # counted from the end of the step, not from the delimiter
        (3, {"min_tokens": 5, "max_tokens": 5}, [5, 10]),
        (2, {"min_tokens": 3, "max_tokens": 5}, [4, 8, 10]),
        (20, {"min_tokens": 3}, [10]),
    ],
)
def test_limits_in_tokens_by_hand(period, limits, ends):
    tokens = list(range(10))
    assert limited_ends(every(period)(tokens), tokens, **limits) == ends


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_limited_steps_do_not_depend_on_what_comes_later(tokens, least, room, noise):
    """What holds for steps without limits: a step ends in one place, however much of the completion is known."""

    def cut(tokens):
        def by_zero(start):
            found = [at + 1 for at, token in enumerate(tokens[start:]) if token == 0]
            return found if found and found[-1] == len(tokens) - start else [*found, len(tokens) - start]

        return limited_ends(by_zero, tokens, least, least + room, noise)

    ends = cut(tokens)
    assert ends[-1] == len(tokens) and ends == sorted(set(ends))
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert all(least <= length for length in lengths[:-1])
    assert all(length <= (least + room) * (2 if noise else 1) for length in lengths)
    for known in range(1, len(tokens)):
        partial = cut(tokens[:known])[:-1]  # the last is not complete, as far as one knows
        assert ends[: len(partial)] == partial
    for end in ends[:-1]:  # the steps of a continuation are those of the whole
        assert [end + each for each in cut(tokens[end:])] == [each for each in ends if each > end]


def test_noise_moves_its_share_of_the_ends():
    moved = total = 0
    for seed in range(300):
        tokens = [seed * 7 + place for place in range(40)]
        ends = limited_ends(every(10)(tokens), tokens, noise=0.3)
        total += 1
        moved += ends[0] != 10  # the first alone, since later ones start from where it went
        assert 10 <= ends[0] <= 20
    assert abs(moved / total - 0.3) < 3 * (0.3 * 0.7 / total) ** 0.5


def test_the_first_token_of_an_answer():
    tokenizer = TOKENIZERS["byte_level"]
    splitter = StepSplitter(tokenizer)
    ids = tokenizer.encode("3 + 4 is 7. The answer is 7.")
    place = splitter.first(ids, ["conclusion", "answer"])
    assert "answer" in tokenizer.decode(ids[:place]) and "answer" not in tokenizer.decode(ids[: place - 1])
    assert splitter.first(ids, ["conclusion"]) is None
