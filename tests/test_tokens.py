"""The law of rows and of subjects, for every make of tokenizer; limits, batches."""

from __future__ import annotations

import itertools
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alphaedit_peft import tokens
from alphaedit_peft.edits import filled
from tests.built_tokenizers import MAKES, build

PIECES = (
    "The capital of|France|is|Paris|Zoë|Müller|(née|a|Σ|Inc.|42|東京|北京|は|日本|🙂|👩\u200d👩|𐍈|"
    "cafe\u0301|\u0301|ﬁne|①|½|שלום|مرحبا|{x}|{0}|\n|\n\n|\t|\u00a0|\u3000| |?|.,|'s|<x>|<end>|</s>"
).split("|")
JOINED = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(["", " "])), max_size=5).map(
    lambda parts: "".join(map("".join, parts))
)
TEXTS = st.one_of(JOINED, st.text(max_size=8)).filter(lambda text: "{}" not in text)
PHRASES = TEXTS.filter(str.strip)
SEPARATORS = st.sampled_from([" ", ""])
LAWFUL = settings(deadline=None, derandomize=True, max_examples=40)
# characters that they do not know are one token, which may hold both sides of a border; WordPiece
# and words have no token that goes on within a word
LOSSY = ("unigram", "WordPiece", "words", "byte-level, added", "bytes, added")
REAL = ("gpt2-tokenizer-hf", "stories260K-hf")


def typed(tokenizer, text: str, special: bool = True) -> tuple[int, ...]:
    """What a user gets by hand, but for a closing token."""
    ids = tokenizer(text, add_special_tokens=special).input_ids
    closing = tokenizer("a", add_special_tokens=special).input_ids[-1] == tokenizer.eos_token_id
    return tuple(ids[:-1] if closing else ids)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def tried(make):
    """What a call gives, or None and its sentence."""
    try:
        return make(), ""
    except ValueError as error:
        refusal = str(error)
    assert len(refusal) < 400
    return None, refusal


def require_law_of_rows(tokenizer, prompt: str, target: str, separator: str, lossy: bool) -> None:
    suffix = tokens.separator_between(prompt, target, separator) + target
    own, whole = typed(tokenizer, prompt), typed(tokenizer, prompt + suffix)
    found, refusal = tried(lambda: tokens.followed(tokenizer, prompt, target, separator))
    if found is None and "has no token;" in refusal:
        assert not decoded(tokenizer, typed(tokenizer, suffix, False)).strip()
        return
    if found is None:
        assert lossy
        assert whole[: len(own)] != own or own[-1] == tokenizer.unk_token_id
        return
    ids, offsets, following = found
    assert ids == own
    assert len(offsets) == len(ids)
    if whole[: len(own)] == own:
        assert following == whole[len(own) :]
    given_back = decoded(tokenizer, ids + following)
    assert given_back in (decoded(tokenizer, whole), decoded(tokenizer, ids) + suffix)


@pytest.mark.parametrize("make", MAKES)
@LAWFUL
@given(TEXTS, PHRASES, SEPARATORS, st.booleans(), st.sampled_from(["left", "right"]))
def test_a_prompt_has_its_own_ids_and_the_target_completes_them(
    make, prompt, target, separator, bos, side
):
    tokenizer = build(make, bos, side)
    require_law_of_rows(tokenizer, prompt, target, separator, make.startswith(LOSSY))


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL)
@LAWFUL
@given(TEXTS, PHRASES, SEPARATORS)
def test_real_tokenizers_keep_the_law_of_rows(shared_data, name, prompt, target, separator):
    require_law_of_rows(real(shared_data / name), prompt, target, separator, lossy=False)


@cache
def real(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "prompt", "target", "said"),
    [
        ("byte-level", "Italy is ", "Rome", "Rome"),
        ("byte-level", "Italy is", "Rome", " Rome"),
        ("byte-level, space before", "Italy is ", "Rome", "Rome"),
        ("byte-level, Strip", "Italy is ", "Rome", " Rome"),
        ("bytes, legacy", "Anna likes the ", "cat", "cat"),
        ("bytes", "Anna likes the ", "東京", "東京"),
        ("BPE, always", "Anna likes the ", "cat", "cat"),
        ("unigram, always", "Anna likes the ", "cat", "cat"),
        ("unigram, always", "likes", " the cat", " the cat"),
    ],
)
def test_a_space_is_on_the_side_where_it_was_typed(make, prompt, target, said):
    tokenizer = build(make)
    ids, _, following = tokens.followed(tokenizer, prompt, target)
    assert ids == tuple(tokenizer(prompt).input_ids)
    text = decoded(tokenizer, ids + following)
    assert text.strip() == prompt.rstrip() + " " + target.strip()
    assert text.removeprefix(decoded(tokenizer, ids)) == said


def test_a_token_over_the_border_is_split_as_generation_would(tokenizer):
    ids, _, following = tokens.followed(tokenizer, "The cap", "ital of", "")
    assert ids == tokens.encode(tokenizer, "The cap")[0]
    assert following == tokens.encode(tokenizer, "ital of", special=False)[0]


@pytest.mark.parametrize(
    ("make", "prompt", "target"),
    [("WordPiece", "The cap", "ital"), ("WordPiece", "00", "a"), ("words", "Fr", "ance is")],
)
def test_a_target_that_no_ids_put_there_is_refused(make, prompt, target):
    with pytest.raises(ValueError, match=f"no tokens that put '{target}' right after '{prompt}'"):
        tokens.followed(build(make), prompt, target, "")


@pytest.mark.parametrize("make", [make for make in MAKES if make.startswith(("byte", "BPE"))])
def test_a_closing_token_is_left_off_and_one_that_is_typed_is_not(make):
    tokenizer = build(make, bos=True)
    assert tokens.encode(tokenizer, "Paris</s>")[0] == tuple(tokenizer("Paris</s>").input_ids[:-1])
    assert tokens.encode(tokenizer, "Paris</s>")[0][-1] == tokenizer.eos_token_id


def require_law_of_subjects(tokenizer, before: str, subject: str, after: str) -> None:
    text, span = filled(f"{before}{{}}{after}", subject)
    ids, offsets = tokens.encode(tokenizer, text)
    found, _ = tried(lambda: tokens.subject_tokens(tokenizer, text, span, (ids, offsets)))
    if found is None:
        return
    places, beyond = found
    own = subject.strip()
    left = subject[: subject.index(own)]
    right = subject[len(left) + len(own) :]
    assert (text, span) == filled(f"{before}{left}{{}}{right}{after}", own)
    upto = decoded(tokenizer, ids[: places[-1] + 1])
    alone = decoded(tokenizer, typed(tokenizer, text[: span[1]]))
    assert beyond or upto == alone
    assert not any(c.isalnum() for c in beyond)


@pytest.mark.parametrize("make", MAKES)
@LAWFUL
@given(TEXTS, PHRASES, TEXTS, st.booleans(), st.booleans())
def test_a_subjects_last_token_holds_nothing_else_or_it_is_said(
    make, before, subject, after, twice, bos
):
    after += subject if twice else ""
    require_law_of_subjects(build(make, bos), before, subject, after)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL)
@LAWFUL
@given(TEXTS, PHRASES, TEXTS)
def test_real_tokenizers_keep_the_law_of_subjects(shared_data, name, before, subject, after):
    require_law_of_subjects(real(shared_data / name), before, subject, after)


@pytest.mark.parametrize("make", [m for m in MAKES if not m.endswith("split") and "bytes" not in m])
@pytest.mark.parametrize(
    "prompt", ["The capital of {}is", "{}is", "Is Rome or France {}?", "In {}"]
)
@pytest.mark.parametrize("subject", ["France ", " France  "])
def test_white_space_around_a_subject_is_the_prompts(make, prompt, subject):
    tokenizer = build(make)
    text, span = filled(prompt, subject)
    ids, offsets = tokens.encode(tokenizer, text)
    places, beyond = tokens.subject_tokens(tokenizer, text, span, (ids, offsets))
    assert ids[: places[-1] + 1] == typed(tokenizer, text[: span[1]])
    assert beyond == ""


def test_a_subject_that_ends_within_a_word_is_refused_and_within_punctuation_said():
    tokenizer = build("byte-level")

    def find(prompt: str, subject: str):
        text, span = filled(prompt, subject)
        return tokens.subject_tokens(tokenizer, text, span, tokens.encode(tokenizer, text))[1]

    assert find("The capital of {} is", "France") == ""
    assert find("In {x}: France has {0} and {}? The", "more!") == "?"
    with pytest.raises(ValueError, match=r"'Fran' ends within a token .* ' France' holds more"):
        find("The capital of {}ce is", "Fran")


@pytest.mark.parametrize(
    ("text", "target", "expected"), [("is", "a", "-"), ("is ", "a", ""), ("is", " a", "")]
)
def test_a_separator_stands_where_neither_side_brings_a_space(text, target, expected):
    assert tokens.separator_between(text, target, "-") == expected


def test_rows_the_model_cannot_take_are_refused():
    tokens.require_fit([1, 2, 3], 3, "text", (3, 4), "cut it")
    tokens.require_fit([1] * 99, 3, "text", (None, 4), "cut it")
    with pytest.raises(ValueError, match=r"'text' and its target have 4 tokens.* 3 positions; cut"):
        tokens.require_fit([1, 2, 3, 3], 3, "text", (3, 4), "cut it")
    with pytest.raises(ValueError, match=r"token id 4, the model has ids 0\.\.3"):
        tokens.require_fit([1], 4, "text", (3, 4), "cut it")


def test_every_row_is_in_one_batch_and_batches_stay_small():
    rows = [[1] * n for n in (5, 1, 9, 2, 3, 3)]
    found = list(tokens.batches(rows, 8, torch.device("cpu")))
    assert sorted(i for batch in found for i in batch.indices) == list(range(6))
    for batch in found:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.numel() <= 8 or len(ids) == 1
        assert mask.sum(1).tolist() == [len(rows[i]) for i in batch.indices]
        assert torch.equal(ids, mask)  # padded with 0


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer object gives no character offsets"):
        tokens.require_offsets(object())


CPU = torch.device("cpu")


def work(lengths: list[int], found: list[list[int]]) -> int:
    cost = tokens.PASS_COST["cpu"]
    return sum(cost + len(some) * max(lengths[i] for i in some) for some in found)


def test_rows_of_like_length_run_together_and_others_apart():
    lengths = [10] * 9 + [30] * 9 + [31]
    found = tokens.by_length(lengths, CPU)
    assert found == [list(range(9)), list(range(9, 19))]
    assert tokens.by_length([], CPU) == []
    assert tokens.by_length([4, 9], CPU) == [[0, 1]]  # padding five is cheaper than another pass


@pytest.mark.parametrize("seed", range(20))
def test_no_other_borders_cost_less(seed):
    make = random.Random(seed)
    lengths = [make.choice([1, 2, 5, 8, 20, 40]) for _ in range(make.randint(1, 9))]
    found = tokens.by_length(lengths, CPU)
    assert sorted(i for some in found for i in some) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    everyway = [
        [order[a:b] for a, b in itertools.pairwise([0, *cut, len(order)])]
        for k in range(len(order))
        for cut in itertools.combinations(range(1, len(order)), k)
    ]
    assert work(lengths, found) == min(work(lengths, way) for way in everyway)


def test_few_batches_are_made_where_a_pass_is_dearer_than_any_padding():
    lengths = [1] * 90 + [200] * 9
    assert tokens.by_length(lengths, CPU, few=True) == [list(range(99))]
    assert tokens.by_length([], CPU, few=True) == []
    rows = [[1] * n for n in lengths]
    assert len(list(tokens.batches(rows, 10**6, CPU, few=True))) == 1
    assert len(list(tokens.batches(rows, 10**6, CPU))) == 2


def test_no_batch_has_more_than_the_most():
    lengths = [7] * 10 + [8] * 10
    found = tokens.by_length(lengths, CPU, 30)
    assert all(len(some) * max(lengths[i] for i in some) <= 30 for some in found)
    assert sorted(i for some in found for i in some) == list(range(20))


@pytest.mark.parametrize("few", [True, False])
def test_rows_on_either_side_of_a_switch_share_no_batch(few):
    lengths, behind, switches = [3, 9, 4, 5, 8, 2], [0, 0, 5, 3, 0, 7], (8, 9)
    found = tokens.by_length(
        lengths, torch.device("cpu"), behind=behind, few=few, switches=switches
    )
    # whole: 3, 9, 9, 8, 8, 9
    assert sorted(map(sorted, found)) == [[0, 3, 4], [1, 2, 5]]
