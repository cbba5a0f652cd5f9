"""Records from files: what JSON, JSON Lines and tables give, and where they are wrong."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaedit_peft import records
from alphaedit_peft.records import (
    DataError,
    Record,
    json_kind,
    read_object,
    read_record,
    read_records,
)

ONE = '{"subject": "a\u2028", "n": 1}'


def read(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return [(record.place, record.values) for record in read_records(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "facts.data"  # the name says nothing


VALUE = {"subject": "a\u2028", "n": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("text", "places"),
    [
        (f"{ONE}\r\n\n  \n{ONE}", ["line 1", "line 4"]),
        (f"[{ONE},\n{ONE}]\n", ["record 0", "record 1"]),
        (f"\n\n{json.dumps(VALUE, indent=1)}\n", ["line 3"]),
        (json.dumps(VALUE, indent=1) + "\n" + ONE, ["line 1", "line 5"]),
        ("[]", []),
        ("  \n", []),
        ("", []),
    ],
)
def test_lists_lines_and_objects_over_several_lines(path, encoding, text, places):
    assert read(path, text, encoding) == [(place, VALUE) for place in places]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables(path, delimiter):
    rows = [
        ["Subject", "prompt", "Target New", "paraphrases", "portability", ""],
        ["a", '{} is, "so"; \t', "b", "one text", '[{"prompt": "p"}]', ""],
        ["", "", "", "", "", ""],
        ["two\nlines", "[{}]", "b", '["x", "y"]', "", ""],
        ["c", "{} is", "{d}", "", "", ""],
    ]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    first, second, third = read(path, text.getvalue())
    shared = {"subject": "a", "prompt": '{} is, "so"; \t', "target_new": "b"}
    more = {"paraphrases": ["one text"], "portability": [{"prompt": "p"}]}
    assert first == ("line 2", shared | more)
    wanted = {"subject": "two\nlines", "prompt": "[{}]", "target_new": "b"}
    assert second == ("line 4", wanted | {"paraphrases": ["x", "y"]})
    assert third == ("line 6", {"subject": "c", "prompt": "{} is", "target_new": "{d}"})


def test_tables_with_spaces_after_separators(path):
    assert read(path, 'subject, prompt\na, {} is\nb, " x"') == [
        ("line 2", {"subject": "a", "prompt": "{} is"}),
        ("line 3", {"subject": "b", "prompt": " x"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ONE}\n{{oops", "line 2: '{oops' is no JSON .*; write one edit a line"),
        (f"{ONE}\n[1]", r"line 2: \[1\] is a list, no JSON object; an edit or case is an object"),
        (f"{ONE}\nnull", "line 2: None is a NoneType"),
        (f"{ONE}\n1e2", "line 2: 100.0 is a float"),
        (f"{ONE} {ONE}", "line 1: .* is no JSON .something follows it"),
        (f"{ONE[:-1]}\n{ONE}", "line 1: .* is no JSON .Expecting ',' delimiter, 1 lines below"),
        (f"{ONE}\n{ONE[:-4]}", "line 2: the text ends in the middle .*; write or download"),
        ("{'subject': 'a'}", "line 1: .* it looks like Python, and JSON wants double quotes"),
        ('{"a": "b}', "line 1: the text ends within the string '\"b}'; close or download"),
        ('[{"a": "b', "record 0: the text ends within the string '\"b'; close or download"),
        (f"[{ONE}, {{]", "record 1: .* is no JSON"),
        (f"[{ONE} {ONE}]", "record 0: .*a comma or the list's end is due"),
        (f"[{ONE}] 1", "record 0: .*the list's end is due"),
        (f"[{ONE},", "record 1: the text ends in the middle"),
        (f"[{ONE}, 5]", "record 1: 5 is a int, no JSON object"),
        (f"[{ONE}, ]", "record 1: .* is no JSON .Expecting value"),
        ('{"a": NaN}', "line 1: NaN is no finite number; write one edit"),
        ('[{"a": -Infinity}]', "record 0: -Infinity is no finite number; mend"),
        ('{"a": 1e999}', "line 1: 1e999 is no finite number"),
        ('{"a": ' + "9" * 5000 + "}", "line 1: a number of 5000 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "line 1: the field 'a' is there twice in one object"),
        ('{"a": "\\ud800"}', r"line 1: '\\ud800' holds half a surrogate pair, which is no"),
        ('{"a": [{"b": "x\\u0000"}]}', r"line 1: 'x\\x00' holds a NUL character; mend or drop"),
        ("[" * 100_000, "record 0: lists or objects are nested too deeply"),
        ('{"a": ' * 100_000, "line 1: lists or objects are nested too deeply"),
        ('{"a": ' + "[" * 99 + "]" * 99 + "}", "line 1: .* are nested more than 32 deep"),
        ("<!DOCTYPE html>", "it is a web page, or XML; download the data"),
        ("- subject: a", "line 1: '- subject: a' is no JSON, nor the header of a table"),
        ("France,Rome\n", "line 1: 'France,Rome' is no JSON, nor the header of a table with a col"),
        (",subject\n0,a", "line 2: '0' stands in a column without a name; name it or take it out"),
        ("subject,prompt\na,b,c", "line 2: 3 cells in a table of 2 columns; put cells that hold"),
        ("subject,prompt,Subject\n", "line 1: the column 'subject' is there twice; name each once"),
        ('subject,x\n\na,"b', "line 3: the table cannot be read from here on: unexpected end"),
        ("subject,x\na,[1", "line 2, column x: the text ends in the middle"),
        ("subject,x\na,[1] b", "line 2, column x: .* .something follows it.; write a JSON"),
        (f'subject,x\na,{"b" * 200_000}', "line 2: .* field larger than field limit"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_in_a_sentence(path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read(path, text)
    assert len(str(caught.value)) <= 400
    assert str(caught.value).startswith(str(path))


def test_a_line_has_an_end(path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    whole = "[" + ",".join([ONE] * 100) + "]"
    assert len(read(path, whole)) == 100  # a list may be one line
    for first in (ONE, '{"b": "' + "x" * 2000 + '"}'):
        with pytest.raises(DataError, match=r"line \d: the line is longer than 1,000 characters"):
            read(path, first + '\n{"a": "' + "x" * 2000 + '"}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values=st.lists(JSON, max_size=3), indent=st.sampled_from([None, 1]), lines=st.booleans())
def test_any_json_is_read_as_it_is_or_refused(tmp_path_factory, values, indent, lines):
    path = tmp_path_factory.mktemp("records") / "file"
    values = [VALUE, *values]  # an object first: a list would be the list of records
    dumped = [json.dumps(value, indent=indent) for value in values]
    path.write_text("\n".join(dumped) if lines else f"[{','.join(dumped)}]")
    try:
        found = read_records(path)
    except DataError as error:
        told = str(error)
    else:
        told = str(path)
        assert [record.values for record in found] == values
    assert told.startswith(str(path))
    assert len(told) <= 400


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    data=st.binary(max_size=60) | st.text("subject,\n\"[]{}:1'x;\t", max_size=60).map(str.encode)
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("records") / "file"
    path.write_bytes(data)
    told = str(path)
    try:
        read_records(path)
    except DataError as error:
        told = str(error)
    assert told.startswith(str(path))
    assert len(told) <= 400


def test_one_line():
    assert json_kind(f" {ONE} \n") is dict
    assert json_kind("[1]") is list
    assert json_kind(f"{ONE} {ONE}") is None
    assert json_kind("{") is None
    assert read_record(ONE, "texts.jsonl", 7).place == "line 7"
    with pytest.raises(DataError, match=r"texts.jsonl, line 7: .* is no JSON"):
        read_record("oops", "texts.jsonl", 7)


def test_one_object_of_a_file(path):
    path.write_text(' {"a":\n1} \n', encoding="utf-16")
    assert read_object(path) == {"a": 1}
    for text, message in [
        ("[]", "facts.data: it holds a list, not an object; write one JSON object"),
        ("", "facts.data: the text ends in the middle"),
        ("{}{}", "facts.data: .*something follows it"),
        ("oops", "facts.data: 'oops' is no JSON"),
        ('{"a": "\\ud800"}', "facts.data: .* holds half a surrogate pair"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_object(path)


def test_fields_of_a_record():
    record = Record({"a": "x", "b": [["y"], "", "x"], "c": [{"d": 5}], "e": None}, "f", "line 2")
    assert record.text("a") == "x"
    assert record.alternatives("b") == ("y", "x")
    assert record.texts("e") == record.records("none") == ()
    for ask, message in [
        (lambda: record.text("z"), r"f, line 2, field z is missing; .* \['a', 'b', 'c', 'e'\]"),
        (lambda: record.text("b"), r"field b=\[\['y'\], '', 'x'\] is a list, not text"),
        (lambda: record.texts("b"), r"field b\[0\]=\['y'\] is a list, not text"),
        (lambda: record.record("a"), "field a='x' is a str, not an object"),
        (lambda: record.records("c")[0].text("d"), r"field c\[0\].d=5 is a int, not text"),
        (lambda: record.alternatives("e"), "field e holds None, which is not text"),
        (lambda: record.allow("a"), r"field b is unknown; this layout has \['a'\]"),
    ]:
        with pytest.raises(DataError, match=message):
            ask()


@pytest.mark.parametrize(
    ("prompt", "subject", "slot"),
    [
        ("In Iran, the Iranian president is", "Iran", "In {}, the Iranian president is"),
        ("Rome, say Rome: Rome is", "Rome", "Rome, say Rome: {} is"),
        ("中国的首都是", "中国", "{}的首都是"),
        ("Iranian", "Iran", "{}ian"),
        ("What is C++?", "C++", "What is {}?"),
        ("The place of Leo A is", "Leo A ", "The place of {}is"),
        ("{} is", "Rome", "{} is"),
        ("Was C++ in C++11?", "C++", "Was C++ in {}11?"),
    ],
)
def test_the_slot_is_where_the_subject_stands_as_a_word(prompt, subject, slot):
    record = Record({"prompt": prompt}, "f", "line 1")
    assert record.prompt_with_slot("prompt", subject) == slot


def test_a_record_s_values_are_cut():
    record = Record({"a" * 999: "b" * 999, "x": "c" * 999}, "/far" * 99 + "/file", "line 2")
    for ask in (lambda: record.text("y"), lambda: record.record("x"), lambda: record.allow("x")):
        with pytest.raises(DataError, match=r"^\.\.\..*/file, line 2, field ") as caught:
            ask()
        assert len(str(caught.value)) <= 400
