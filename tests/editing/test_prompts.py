"""Subject positions, target ids, separators, chat templates, padding."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from alphaedit_peft import AlphaEditConfig, Edit, tokens
from alphaedit_peft.editing.prompts import Renderer
from alphaedit_peft.tokens import batches, padded
from tests.built_tokenizers import MAKES, build
from tests.test_tokens import PHRASES, TEXTS, decoded, tried, typed

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def renderer(tokenizer, **changes) -> Renderer:
    return Renderer(tokenizer, AlphaEditConfig(kl_prompt="{} is", **changes))


def with_bos(tokenizer) -> PreTrainedTokenizerFast:
    """The fixture's tokenizer, but one that puts BOS first and EOS last by itself."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompt", ["The capital of {} is", "{} is", "In {}", "x{}y and more"])
@pytest.mark.parametrize("subject", ["France", "Anna Smith", "Zürich", "東京", "a"])
def test_subject_last_is_the_token_that_ends_the_subject(tokenizer, prompt, subject):
    edit = Edit(subject, prompt, "Rome")
    rows = renderer(tokenizer).edit_rows(edit, ["I think."])
    for row, context in zip(rows.rows, ("", "I think. "), strict=True):
        end = len(context) + edit.subject_span[1]
        offsets = tokenizer(context + edit.question, return_offsets_mapping=True).offset_mapping
        start, stop = offsets[row.subject_last]
        assert start < end <= stop or "東" in subject
        assert row.key_row.ids == row.ids[: row.subject_last + 1]


def test_prompt_and_target_join_to_the_whole_text(tokenizer):
    row = renderer(tokenizer).target_row("The capital of France is", "Paris")
    assert tokenizer.decode(row.ids + row.target) == "The capital of France is Paris"
    assert row.scoring_ids == row.ids + row.target[:-1]
    assert list(row.target_positions) == [len(row.ids) - 1 + i for i in range(len(row.target))]


@pytest.mark.parametrize(
    ("question", "target", "separator", "text"),
    [
        ("It is", "Paris", " ", "It is Paris"),
        ("It is", " Paris", " ", "It is Paris"),
        ("It is ", "Paris", " ", "It is Paris"),
        ("東京は", "日本", "", "東京は日本"),
    ],
)
def test_exactly_one_space_unless_the_language_has_none(
    tokenizer, question, target, separator, text
):
    row = renderer(tokenizer, separator=separator).target_row(question, target)
    assert tokenizer.decode(row.ids + row.target) == text
    assert row.target


def test_bos_once_and_no_closing_eos(tokenizer):
    row = renderer(with_bos(tokenizer)).target_row("The capital of France is", "Paris")
    assert row.ids[0] == 0
    assert 0 not in row.ids[1:]
    assert 1 not in row.ids + row.target


def test_chat_template_brings_its_own_bos_and_keeps_the_subject(tokenizer):
    chat = with_bos(tokenizer)
    chat.chat_template = TEMPLATE
    edit = Edit("France", "What is the capital of {}?", "Rome")
    rows = renderer(chat, chat_template=True).edit_rows(edit, ["I think."])
    text = chat.decode(rows.rows[0].ids)
    assert text == "<s>[user] What is the capital of France?\n[assistant] "
    assert rows.rows[0].ids.count(0) == 1
    assert chat.decode(rows.rows[0].key_row.ids).endswith("France")
    assert rows.prefix.endswith("capital of France")
    assert chat.decode(rows.rows[0].target) == "Rome"
    assert "I think. What is" in chat.decode(rows.rows[1].ids)


@pytest.mark.parametrize("subject", ["assistant", "user", "</s>", "a"])
def test_a_chat_template_with_the_subjects_words_is_not_taken_for_it(tokenizer, subject):
    chat = with_bos(tokenizer)
    chat.chat_template = TEMPLATE
    row = renderer(chat, chat_template=True).edit_rows(Edit(subject, "{}", "Rome"), []).rows[0]
    ids = chat.apply_chat_template(
        [{"role": "user", "content": subject}], add_generation_prompt=True, return_dict=False
    )
    assert row.ids == tuple(ids)
    assert chat.decode(row.key_row.ids) == f"<s>[user] {subject}"


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{% for"])
def test_a_chat_template_that_fails_is_refused(tokenizer, template):
    chat = with_bos(tokenizer)
    chat.chat_template = template
    with pytest.raises(ValueError, match=r"does not take a user's message alone: .*; set another"):
        renderer(chat, chat_template=True).edit_rows(Edit("France", "Where is {}?", "here"), [])


def test_a_chat_template_that_changes_the_prompt_is_refused(tokenizer):
    chat = with_bos(tokenizer)
    chat.chat_template = TEMPLATE.replace("m['content']", "m['content'] | trim")
    renderer(chat, chat_template=True).edit_rows(Edit("France", "Where is {}?", "here"), [])
    with pytest.raises(ValueError, match=r"changes the prompt 'Where is France\? '; strip"):
        renderer(chat, chat_template=True).edit_rows(Edit("France", "Where is {}? ", "here"), [])


@pytest.mark.parametrize("context", ["So.", "So. "])
@pytest.mark.parametrize(("subject", "prompt"), [("France", "{} is"), ("France", "In {} it is")])
def test_one_space_stands_between_a_context_and_a_prompt(tokenizer, context, subject, prompt):
    text = f"So. {prompt.replace('{}', subject)}"
    spaced = [(subject, prompt)]
    if context == "So.":
        spaced += [(subject, f" {prompt}")] + [(f" {subject}", prompt)] * prompt.startswith("{}")
    for some, question in spaced:
        row = renderer(tokenizer).edit_rows(Edit(some, question, "hot"), [context]).rows[1]
        assert tokenizer.decode(row.ids) == text
        assert tokenizer.decode(row.key_row.ids).endswith(" France")


def test_white_space_around_a_subject_belongs_to_the_prompt(tokenizer):
    spaced = renderer(tokenizer).edit_rows(Edit("France ", "The capital of {}is", "Rome"), ["So."])
    plain = renderer(tokenizer).edit_rows(Edit("France", "The capital of {} is", "Rome"), ["So."])
    assert (spaced.rows, spaced.prefix) == (plain.rows, plain.prefix)
    assert spaced.prefix == "The capital of France"


@pytest.mark.parametrize("make", MAKES)
@settings(deadline=None, derandomize=True, max_examples=20)
@given(TEXTS, PHRASES, TEXTS, PHRASES, st.booleans(), st.booleans())
def test_rows_are_what_a_user_gets_by_hand_behind_any_context(
    make, before, subject, after, target, bos, twice
):
    tokenizer, edit = build(make, bos), Edit(subject, before + "{}" + after, target)
    if twice:
        edit = Edit(subject, subject + edit.prompt + subject, target)
    contexts = ["In short,", "Well. "]
    rows, refusal = tried(lambda: renderer(tokenizer).edit_rows(edit, contexts))
    if rows is None:
        assert re.search("has no token|ends within a token|has no tokens that put", refusal)
        return
    texts = [edit.question, *(f"{c.rstrip()} {edit.question.lstrip()}" for c in contexts)]
    for row, text, context in zip(rows.rows, texts, ["", *contexts], strict=True):
        if context and edit.question[:1].isspace():
            text = context + edit.question
        assert row.ids == typed(tokenizer, text)
        assert row.key_row.ids == row.ids[: row.subject_last + 1]
        assert tokens.followed(tokenizer, text, target)[2] == row.target
    end = edit.subject_span[1]
    assert rows.prefix == edit.question[:end] == edit.question[:end].rstrip()
    key = decoded(tokenizer, rows.rows[0].key_row.ids)
    assert rows.beyond or key == decoded(tokenizer, typed(tokenizer, rows.prefix))


def test_what_is_merged_into_the_subjects_end_is_said():
    make = renderer(build("byte-level"))
    edit = Edit("more!", "In {x}: France has {0} and {}? The", "end")
    assert make.edit_rows(edit, []).beyond == "?"
    assert make.edit_rows(Edit("France", "{} is", "end"), []).beyond == ""


def test_padding_side_and_padding_token_play_no_part(tokenizer):
    edit = Edit("France", "The capital of {} is", "Rome")
    plain = renderer(tokenizer).edit_rows(edit, [])
    tokenizer.padding_side = "left"
    try:
        assert renderer(tokenizer).edit_rows(edit, []) == plain
        assert tokenizer.padding_side == "left"
        assert tokenizer.pad_token is None
    finally:
        tokenizer.padding_side = "right"


def test_padded_rows_and_mask():
    inputs = padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batches_cover_all_rows_within_the_bound():
    rows = [[1] * n for n in (3, 9, 1, 4, 4, 30)]
    made = list(batches(rows, 12, torch.device("cpu")))
    assert sorted(i for batch in made for i in batch.indices) == list(range(6))
    for batch in made:
        shape = batch.inputs["input_ids"].shape
        assert len(batch.indices) == 1 or shape[0] * shape[1] <= 12


def test_braces_around_the_slot_are_text(tokenizer):
    edit = Edit("France", "In {x}: {} has {0} and", "Rome")
    row = renderer(tokenizer).edit_rows(edit, []).rows[0]
    assert tokenizer.decode(row.ids) == "In {x}: France has {0} and"


def test_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer Slow gives no character offsets"):
        renderer(Slow())


def test_chat_template_missing_is_refused(tokenizer):
    with pytest.raises(ValueError, match="chat_template=True, but tokenizer"):
        renderer(tokenizer, chat_template=True)


def test_target_without_tokens_is_refused():
    letters = Tokenizer(models.BPE(vocab={"I": 0, "t": 1, "i": 2, "s": 3}, merges=[]))
    deaf = PreTrainedTokenizerFast(tokenizer_object=letters)
    with pytest.raises(ValueError, match="target 'Bonn' has no token"):
        renderer(deaf).edit_rows(Edit("It", "{} is", "Bonn"), [])
    with pytest.raises(ValueError, match="subject 'Bonn' has no token"):
        renderer(deaf).edit_rows(Edit("Bonn", "It is {}", "It"), [])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((5, 320), r"have \d+ tokens, the model has 5 positions; shorten"),
        ((None, 40), r"has token id \d+, the model has ids 0\.\.39; use the tokenizer"),
    ],
)
def test_what_the_model_cannot_read_is_refused(tokenizer, limits, message):
    limited = Renderer(tokenizer, AlphaEditConfig(kl_prompt="{} is"), limits)
    with pytest.raises(ValueError, match=message):
        limited.edit_rows(Edit("France", "The capital of {} is", "Rome"), ["I think."])
    with pytest.raises(ValueError, match=message):
        limited.target_row("The capital of France is", "Paris")


def test_what_just_fits_is_read(tokenizer):
    row = renderer(tokenizer).target_row("The capital of France is", "Paris")
    limits = (len(row.scoring_ids), max(row.ids + row.target) + 1)
    limited = Renderer(tokenizer, AlphaEditConfig(), limits)
    assert limited.target_row("The capital of France is", "Paris") == row
