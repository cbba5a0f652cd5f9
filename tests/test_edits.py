"""Edits as values: what is refused, what an id is, and JSON Lines there and back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaedit_peft.edits import Edit, as_edits, read_edits, write_edits
from alphaedit_peft.text_files import DataError

FULL = Edit(
    "Marie Curie",
    "{} was born in",
    "Rome",
    target_true="Warsaw",
    id="curie",
    paraphrases=("Where was Marie Curie born?",),
    neighborhood=("Albert Einstein was born in",),
)


def edit(**changes) -> Edit:
    return Edit(**({"subject": "France", "prompt": "{} is", "target_new": "far"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": ""}, "subject='' is empty; an edit needs a subject"),
        ({"subject": " \n"}, r"subject=' \\n' is empty"),
        ({"target_new": "  "}, "target_new='  ' is empty; an edit needs a target_new"),
        ({"prompt": "is"}, r"prompt='is' holds 0 times '\{\}'.*subject 'France' goes"),
        ({"prompt": ""}, "prompt='' holds 0 times"),
        ({"prompt": "{} and {}"}, r"prompt='\{\} and \{\}' holds 2 times"),
        ({"prompt": "{0} is"}, r"prompt='\{0\} is' holds 0 times"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        edit(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": 3}, "subject=3 is a int; it must be text"),
        ({"prompt": None}, "prompt=None is a NoneType"),
        ({"target_new": ["a"]}, r"target_new=\['a'\] is a list"),
        ({"target_true": 1.5}, "target_true=1.5 is a float"),
        ({"id": 7}, "id=7 is a int"),
        ({"paraphrases": "one text"}, "paraphrases='one text' must be a list of texts"),
        ({"paraphrases": None}, "paraphrases=None must be a list of texts"),
        ({"neighborhood": [1]}, "neighborhood=1 is a int"),
    ],
)
def test_fields_that_are_no_text(changes, message):
    with pytest.raises(TypeError, match=message):
        edit(**changes)


@pytest.mark.parametrize(
    ("subject", "prompt", "question"),
    [
        ("France", "In {x} or {{ }, {} is", "In {x} or {{ }, France is"),
        ("{}", "{} is", "{} is"),
        ("a {b} {0.__class__}", "set {}", "set a {b} {0.__class__}"),
        ("%s", "{} of 100 %d", "%s of 100 %d"),
    ],
)
def test_other_braces_stay_as_they_are(subject, prompt, question):
    found = edit(subject=subject, prompt=prompt)
    assert found.question == question
    start, end = found.subject_span
    assert question[start:end] == subject


def test_the_span_is_of_the_slot_where_the_text_names_the_subject_twice():
    found = edit(subject="France", prompt="France, say France: {} is France")
    assert found.question == "France, say France: France is France"
    assert found.subject_span == (20, 26)


def test_lists_become_tuples_and_the_value_is_hashable():
    found = edit(paraphrases=["a", "b"])
    assert found.paraphrases == ("a", "b")
    assert len({found, edit(paraphrases=("a", "b"))}) == 1


def test_an_edit_does_not_change():
    with pytest.raises(AttributeError, match="subject"):
        edit().subject = "Italy"  # type: ignore[misc]


def test_ids_stay_the_same_from_release_to_release():
    assert edit().id == "b1e69d24d811"


def test_ids_are_by_content():
    assert edit().id == edit(target_true="near", paraphrases=["x"]).id
    variants = [
        edit(),
        edit(subject="Italy"),
        edit(prompt="{} was"),
        edit(target_new="near"),
        edit(subject="F", prompt="{}rance is"),  # the same question
        edit(target_new=" far"),
    ]
    assert len({each.id for each in variants}) == len(variants)
    assert edit(id="mine").id == "mine"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    subject=TEXT, target=TEXT, paraphrases=st.lists(TEXT, max_size=2), true=st.none() | st.text("a")
)
def test_dict_and_back(subject, target, paraphrases, true):
    found = edit(subject=subject, target_new=target, paraphrases=paraphrases, target_true=true)
    assert Edit.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_optional_fields_that_are_not_set_are_not_written():
    assert set(edit().to_dict()) == {"subject", "prompt", "target_new", "id"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"subject": "a", "prompt": "{}"}, r"missing fields \['target_new'\]"),
        ({"subject": "a", "prompt": "{}", "target_new": "b", "x": 1}, r"unknown fields \['x'\]"),
    ],
)
def test_dicts_with_wrong_fields(values, message):
    with pytest.raises(ValueError, match=message):
        Edit.from_dict(values)


def test_as_edits_takes_edits_and_dicts():
    assert as_edits([FULL, FULL.to_dict()]) == (FULL, FULL)
    assert as_edits(each for each in [FULL]) == (FULL,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FULL, "is a single Edit; pass a list of edits"),
        (FULL.to_dict(), "is a single dict; pass a list of edits"),
        ("edits.jsonl", "edits='edits.jsonl' is a single str; pass a list of edits"),
        ([FULL, "Rome"], "'Rome' is a str; an edit is an Edit or a dict"),
        ([None], "None is a NoneType"),
    ],
)
def test_as_edits_refuses(given, message):
    with pytest.raises(TypeError, match=message):
        as_edits(given)


def test_no_edit_at_all_is_refused():
    with pytest.raises(ValueError, match=r"edits=\[\] is empty"):
        as_edits([])


def test_file_and_back(tmp_path):
    # str.splitlines, and many editors, also cut lines at these
    odd = edit(subject="a\u2028b\u2029c\x85d\x0b\x0c\x1e", target_new="naïve 漢字 😀\n\r\ttwo")
    write_edits([FULL, odd], tmp_path / "edits.jsonl")
    assert read_edits(tmp_path / "edits.jsonl") == (FULL, odd)
    assert (tmp_path / "edits.jsonl").read_bytes().count(b"\n") == 2


def test_files_from_elsewhere(tmp_path):
    line = json.dumps({"subject": "a\u2028", "prompt": "{} is", "target_new": "b"})
    path = tmp_path / "edits.jsonl"
    path.write_bytes(f"\ufeff{line}\r\n\r\n   \n{line}".encode())  # byte order mark, CRLF, no end
    assert [each.subject for each in read_edits(path)] == ["a\u2028", "a\u2028"]


GOOD = json.dumps(FULL.to_dict())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "", "{bad"], r"edits.jsonl, line 3: '{bad' is no JSON .*; write one edit a line"),
        ([GOOD, "[1]"], r"edits.jsonl, line 2: \[1\] is a list, no JSON object"),
        (["{}"], r"line 1: edit \{\}: missing fields \['prompt', 'subject', 'target_new'\]"),
        (
            [GOOD, GOOD.replace("{}", "x")],
            r"line 2, field prompt='x was born in' does not hold the subject 'Marie Curie'; write",
        ),
        (['{"subject": 1, "prompt": "{}", "target_new": "b"}'], r"line 1: subject=1 is a int"),
        ([GOOD, GOOD.replace("{}", "Marie Curie", 1) + "}"], "line 2: '.*}' is no JSON"),
        ([], r"edits.jsonl: there is no edit in it; write one edit a line"),
        ([GOOD.replace("Marie Curie", "")], "line 1: subject='' is empty"),
        ([GOOD.replace("Marie Curie", "").replace("{}", "x")], "line 1: subject='' is empty"),
        (["", "  "], r"edits.jsonl: there is no edit in it"),
    ],
)
def test_errors_name_file_and_line(tmp_path, lines, message):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_edits(path)


def ask(**more) -> dict:
    return {"subject": "Ada", "prompt": "Ada was born in", "target_new": "Rome", **more}


REWRITE = {
    "prompt": "{} was born in",
    "relation_id": "P19",
    "target_new": {"str": "Rome", "id": "Q220"},
    "target_true": {"str": "London", "id": "Q84"},
    "subject": "Ada",
}
FIRST = Edit("Ada", "{} was born in", "Rome", target_true="London")
BOTH = replace(FIRST, paraphrases=("Where was Ada born?",), neighborhood=("Bob was born in",))
LAYOUTS = {
    "own": (ask(prompt="{} was born in", neighborhood=[{"prompt": "Bob", "answer": "Oslo"}]),),
    "whole prompt": (ask(anchors=["{} lives in"], portability=[], generation=["Ada"]),),
    "counterfact": (
        {
            "case_id": 0,
            "pararel_idx": 1,
            "requested_rewrite": REWRITE,
            "paraphrase_prompts": ["Where was Ada born?"],
            "neighborhood_prompts": ["Bob was born in"],
            "attribute_prompts": [],
            "generation_prompts": [],
        },
    ),
    "mquake": (
        {
            "case_id": 1,
            "requested_rewrite": [
                {**REWRITE, "question": "Where was Ada born?"},
                {**REWRITE, "subject": "Rome", "prompt": "{} lies in"},
            ],
            "questions": ["In which land was Ada born?"],
            "answer": "England",
            "answer_alias": [],
            "new_answer": "Spain",
            "new_answer_alias": ["España"],
        },
    ),
    "zsre": (
        {
            "subject": "Ada",
            "src": "Where was Ada born?",
            "rephrase": "Ada's birthplace?",
            "alt": "Oslo",
            "answers": ["Rome", "Roma"],
            "loc": "nq question: who",
            "loc_ans": "me",
        },
    ),
    "knowedit": (ask(target_new=[["Rome", "Roma"]], ground_truth=["London"], portability={}),),
    "easyedit": (ask(ground_truth="<|endoftext|>", rephrase_prompt="Ada's birthplace is"),),
    "slot": (ask(prompt="{} was born in", ground_truth="London"),),
}
MADE = {
    "own": (replace(FIRST, target_true=None, neighborhood=("Bob",)),),
    "whole prompt": (replace(FIRST, target_true=None, anchors=("{} lives in",)),),
    "counterfact": (BOTH,),
    "mquake": (
        replace(BOTH, neighborhood=()),
        Edit("Rome", "{} lies in", "Rome", target_true="London"),
    ),
    "zsre": (Edit("Ada", "Where was {} born?", "Rome", paraphrases=["Ada's birthplace?"]),),
    "knowedit": (FIRST,),
    "easyedit": (replace(FIRST, target_true=None, paraphrases=("Ada's birthplace is",)),),
    "slot": (FIRST,),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_as_edits(tmp_path, layout):
    path = tmp_path / "requests"
    path.write_text(json.dumps(LAYOUTS[layout]))
    assert read_edits(path) == MADE[layout]
    path.write_text("\n".join(json.dumps(record) for record in LAYOUTS[layout]))
    assert read_edits(path) == MADE[layout]


def test_tables_are_read_as_edits(tmp_path):
    path = tmp_path / "edits.csv"
    path.write_text(
        "subject;prompt;target_new;target_true;paraphrases\n"
        "Ada;{} was born in;Rome;London;\n"
        'Rome;Rome lies in; Asia;;"[""Where is Rome?""]"\n',
        encoding="utf-16",
    )
    second = Edit("Rome", "{} lies in", " Asia", paraphrases=("Where is Rome?",))
    assert read_edits(path) == (FIRST, second)
    path.write_text("subject,prompt,target_new,ground_truth\nAda,Ada was born in,Rome,London\n")
    assert read_edits(path) == (FIRST,)
    path.write_text("subject,target_new\nAda,Rome\n")
    with pytest.raises(ValueError, match=r"edits.csv, line 2: .*missing fields \['prompt'\]"):
        read_edits(path)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("mquake", {"requested_rewrite": []}, "field requested_rewrite holds no edit"),
        ("mquake", {"requested_rewrite": [5]}, r"requested_rewrite\[0\]=5 is a int, not an object"),
        ("counterfact", {"requested_rewrite": 5}, "requested_rewrite=5 is a int, not an object"),
        ("zsre", {"src": "Where was she born?"}, "src='Where was she born?' does not hold the sub"),
        ("zsre", {"answers": []}, r"answers=\[\] holds no answer"),
        ("knowedit", {"target_new": {}}, "target_new holds {}, which is not text"),
        ("slot", {"paraphrases": ["x"]}, r"unknown fields \['ground_truth'\]; an edit has subject"),
        ("own", {"neighborhood": [{}]}, "neighborhood=None is a NoneType"),
    ],
)
def test_a_wrong_request_is_named(tmp_path, layout, change, message):
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([LAYOUTS[layout][0] | change]))
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        read_edits(path)
    assert "requests.json, record 0" in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_long_values_are_cut_in_every_error(tmp_path):
    path = tmp_path / "edits.jsonl"
    for change in ({"x": "y" * 999}, {"prompt": "p" * 999}, {"subject": [["s"] * 999]}):
        path.write_text(json.dumps(ask(prompt="{} is") | change))
        with pytest.raises(ValueError, match="line 1") as caught:
            read_edits(path)
        assert len(str(caught.value)) <= 400


def test_an_edit_that_no_pack_could_hold_is_refused_before_it_is_made(tmp_path):
    path = tmp_path / "edits.jsonl"
    for change in ({"target_new": "x" * 2**19}, {"id": "x" * 201}):
        path.write_text(json.dumps(ask() | change))
        with pytest.raises(
            ValueError, match=r"line 1: the edit takes .*; the limits are 524,288 and"
        ):
            read_edits(path)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match=r"subject='\\ud800' holds half a surrogate pair"):
        edit(subject="\ud800", id="x")


@pytest.mark.shared_data
def test_data_sets_as_they_are(shared_data):
    assert len(read_edits(shared_data / "counterfact_original_7.json")) == 7
    found = read_edits(shared_data / "zsre_eval_700.json")
    assert len(found) == 700
    assert all(edit.subject in edit.question for edit in found)


JUNK = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=4) | st.just("{}"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_a_mutated_request_is_an_edit_that_can_be_kept_or_a_sentence(
    tmp_path_factory, data, layout
):
    folder = tmp_path_factory.mktemp("mutated")
    record = copy.deepcopy(LAYOUTS[layout][0])
    place, key = record, data.draw(st.sampled_from(sorted(record)))
    while data.draw(st.booleans()) and isinstance(place[key], (dict, list)) and place[key]:
        place = place[key]
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
    place[key] = data.draw(JUNK)
    (folder / "given").write_text(json.dumps([record]))
    told = "given, record 0"
    try:
        found = read_edits(folder / "given")
    except DataError as error:
        told = str(error)
    else:
        write_edits(found, folder / "kept")
        assert read_edits(folder / "kept") == found
    assert "given, record 0" in told
    assert len(told) <= 400
