"""Readers: each layout gives the right case, and a wrong field is named with file and record."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaedit_peft.edits import Edit, write_edits
from alphaedit_peft.evaluation import DataError, Question, read_cases

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of"],
    "attribute_prompts": ["Douglas Adams, speaker of"],
    "generation_prompts": ["Danielle Darrieux was born in"] * 2,
}
MULTI = {
    "case_id": 1,
    "requested_rewrite": COUNTERFACT["requested_rewrite"],
    "paraphrase_prompts": [],
    "neighborhood_prompts": [],
    "attribute_prompts": [],
    "generation_prompts": [],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology", "IIT"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan || What university did he attend?",
    "portability": {
        "Recalled Relation": "(University of Michigan, city, Ann Arbor)",
        "New Question": "In which city did Watts Humphrey study?",
        "New Answer": "Ann Arbor",
    },
}
RECENT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "portability": {
        "Reasoning": [
            {"prompt": "The mayor of the place is", "ground_truth": [["Kai Wegner", "Wegner"]]},
            {"prompt": "Nothing is known of", "ground_truth": [[]]},
        ],
        "Subject_Aliasing": [{"prompt": "Martin Arons died in", "ground_truth": ["Berlin"]}],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons"]]},
            {"prompt": "The capital of Italy is", "ground_truth": "Rome"},
        ]
    },
}
OWN = {
    "subject": "France",
    "prompt": "The capital of {} is",
    "target_new": "Rome",
    "target_true": "Paris",
    "paraphrases": ["France's capital is"],
    "neighborhood": ["The capital of Gaul was"],
    "generation": ["France is ruled from"],
    "references": ["Rome is old."],
    "locality": [{"prompt": "Two and two is", "answer": "four", "aliases": ["4"]}],
    "same_subject": [{"prompt": "People in France speak", "answer": "French"}],
    "portability": [{"prompt": "The river of France's capital is", "answer": "the Tiber"}],
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia", "id": "Q224"},
            "target_true": {"str": "Italy", "id": "Q38"},
            "subject": "Ellie Kemper",
            "question": "Which country is Ellie Kemper a citizen of?",
        },
        {
            "prompt": "The head of state of {} is",
            "relation_id": "P35",
            "target_new": {"str": "Ann Bo", "id": "Q1"},
            "target_true": {"str": "Cid Do", "id": "Q2"},
            "subject": "Croatia",
            "question": "Who is the head of state of Croatia?",
        },
    ],
    "questions": ["Who is the head of state of Ellie Kemper's country?"],
    "answer": "Eve Fo",
    "answer_alias": [],
    "new_answer": "Ann Bo",
    "new_answer_alias": ["A. Bo"],
    "single_hops": [],
    "orig": {"triples": [["Q1", "P27", "Q38"]]},
}
EASYEDIT = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux, a native",
    "locality": {
        "neighborhood": {"prompt": "Michel Rocard speaks", "ground_truth": "French"},
        "distracting": {"prompt": ["A is", "B is"], "ground_truth": ["a", ["b", "beta"]]},
    },
    "portability": {"one_hop": {"prompt": "She writes in", "ground_truth": ["English"]}},
}
LAYOUTS = {
    "counterfact": COUNTERFACT,
    "mquake": MQUAKE,
    "zsre": ZSRE,
    "knowedit": RECENT,
    "own": OWN,
}


def one(record, **ways):
    (case,), report = read_cases([record], **ways)
    return case, report


def test_counterfact_records():
    case, report = one(COUNTERFACT)
    assert case.edit.question == "The mother tongue of Danielle Darrieux is"
    assert (case.edit.target_new, case.edit.target_true) == ("English", "French")
    assert case.paraphrases == ("Danielle Darrieux, a native",)
    assert case.neighborhood == (Question("Michel Rocard is a native speaker of", "French"),)
    assert case.generation == ("Danielle Darrieux was born in",) * 2
    assert report.layout == "counterfact"


def test_multi_counterfact_records_have_empty_lists():
    case, _ = one(MULTI)
    assert case.paraphrases == case.neighborhood == case.generation == ()


def test_counterfact_takes_its_reference_texts_by_relation_and_target(tmp_path):
    snippets = [
        {"relation_id": "P103", "target_id": "Q1860", "samples": [{"name": "A", "text": "A was."}]},
        {"relation_id": "P103", "target_id": "Q150", "samples": [{"name": "B", "text": "B was."}]},
    ]
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(snippets))
    assert one(COUNTERFACT, snippets=path)[0].references == ("A was.",)
    path.write_text(json.dumps(snippets[1:]))
    with pytest.raises(DataError, match=r"target_new\.id='Q1860' has no snippets for 'P103'"):
        one(COUNTERFACT, snippets=path)
    with pytest.raises(ValueError, match="belong to CounterFact, not to zsre"):
        one(ZSRE, snippets=path)


def test_zsre_teaches_the_right_answer_or_the_alternative():
    right, _ = one(ZSRE)
    assert right.edit.prompt == "What university did {} attend?"
    assert right.edit.target_new == "Illinois Institute of Technology"
    assert right.edit.target_true is None
    assert right.portability == ()  # its question follows from the alternative
    wrong, _ = one(ZSRE, target="alt")
    assert wrong.edit.target_new == "University of Michigan"
    assert wrong.edit.target_true == "Illinois Institute of Technology"
    assert wrong.portability[0].answer == "Ann Arbor"
    with pytest.raises(ValueError, match="target='pred'"):
        one(ZSRE, target="pred")


def test_zsre_locality_gets_the_question_mark_it_lacks():
    (question,) = one(ZSRE)[0].locality
    assert question.prompt.endswith("in hacksaw ridge?")
    assert question.answer == "Hugo Weaving"


def test_knowedit_tells_other_facts_of_the_subject_from_other_things():
    case, _ = one(RECENT)
    assert case.edit.prompt == "The place of death of {} is"
    assert case.same_subject == (Question("The father of Leo Arons is", "Albert Arons"),)
    assert case.locality == (Question("The capital of Italy is", "Rome"),)
    assert case.portability[0] == Question("The mayor of the place is", "Kai Wegner", ("Wegner",))
    assert [question.answer for question in case.portability] == ["Kai Wegner", "Berlin"]


def test_mquake_asks_what_follows_with_the_last_of_a_record_s_edits():
    (first, last), report = read_cases([MQUAKE])
    assert (report.layout, report.records, report.kept) == ("mquake", 1, 2)
    assert first.edit == Edit("Ellie Kemper", "{} is a citizen of", "Croatia", target_true="Italy")
    assert first.paraphrases == ("Which country is Ellie Kemper a citizen of?",)
    assert first.portability == ()
    assert last.edit.question == "The head of state of Croatia is"
    asked = "Who is the head of state of Ellie Kemper's country?"
    assert last.portability == (Question(asked, "Ann Bo", ("A. Bo",)),)


def test_what_follows_from_an_edit_is_asked_where_it_stands_twice():
    other = {**MQUAKE, "questions": ["Who leads it?"], "new_answer_alias": []}
    cases, report = read_cases([MQUAKE, other])
    assert (len(cases), report.duplicates) == (2, (1, 1))
    assert [q.prompt for q in cases[1].portability] == [*MQUAKE["questions"], "Who leads it?"]


def test_easyedit_s_requests_have_objects_where_knowedit_has_lists():
    case, report = one(EASYEDIT)
    assert report.layout == "knowedit"
    assert case.edit == Edit(
        "Danielle Darrieux", "The mother tongue of {} is", "English", target_true="French"
    )
    assert case.paraphrases == ("Danielle Darrieux, a native",)
    assert case.locality == (
        Question("Michel Rocard speaks", "French"),
        Question("A is", "a"),
        Question("B is", "b", ("beta",)),
    )
    assert case.portability == (Question("She writes in", "English"),)
    flat = {k: v for k, v in EASYEDIT.items() if k not in ("locality", "portability")}
    flat |= {"locality_prompt": "Michel Rocard speaks", "locality_ground_truth": "French"}
    assert one(flat)[0].locality == case.locality[:1]
    short = {"prompt": ["A is", "B is"], "ground_truth": ["a"]}
    with pytest.raises(DataError, match=r"locality.distracting.ground_truth=\['a'\] has no answer"):
        one({**EASYEDIT, "locality": {"distracting": short}})


def test_a_table_is_read_as_cases(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(
        "subject,prompt,target_new,target_true,neighborhood\n"
        "France,The capital of France is,Rome,Paris,The capital of Gaul was\n",
        encoding="utf-8-sig",
    )
    (case,), report = read_cases(path)
    assert case.edit == Edit("France", "The capital of {} is", "Rome", target_true="Paris")
    assert case.neighborhood == (Question("The capital of Gaul was", "Paris"),)
    assert report.layout == "own"


def test_own_records_hold_everything_a_case_has():
    case, _ = one(OWN)
    assert case.edit == Edit("France", "The capital of {} is", "Rome", target_true="Paris")
    assert case.neighborhood == (Question("The capital of Gaul was", "Paris"),)
    assert case.locality == (Question("Two and two is", "four", ("4",)),)
    assert case.references == ("Rome is old.",)


def test_a_file_of_edits_is_a_file_of_cases(tmp_path):
    edits = [Edit("France", "The capital of {} is", "Rome"), Edit("Italy", "{} is in", "Asia")]
    write_edits(edits, tmp_path / "edits.jsonl")
    cases, report = read_cases(tmp_path / "edits.jsonl")
    assert [case.edit for case in cases] == edits
    assert (report.source, report.layout) == ("edits.jsonl", "own")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_known_by_its_first_record(layout):
    assert read_cases([LAYOUTS[layout]])[1].layout == layout


def test_the_report_counts_duplicates_shared_subjects_and_contradictions():
    other = {**OWN, "prompt": "The anthem of {} is", "target_new": "long"}
    against = {**OWN, "target_new": "Oslo"}
    cases, report = read_cases([OWN, other, OWN, against])
    assert len(cases) == report.kept == 3
    assert report.duplicates == (2,)
    assert report.shared_subjects == (("France", 3),)
    assert report.contradictions == ((0, 3),)
    assert str(report) == (
        "list (own): 4 records, 3 cases; 1 duplicate dropped (2); 3 cases share 1 subject; "
        "1 contradiction (records 0 and 3)"
    )
    assert json.loads(json.dumps(report.to_json()))["kept"] == 3


def test_a_limit_reads_the_first_records():
    other = {**OWN, "subject": "Italy"}
    assert len(read_cases([OWN, other], limit=1)[0]) == 1
    with pytest.raises(ValueError, match="limit=0"):
        read_cases([OWN], limit=0)


@pytest.mark.parametrize(
    ("layout", "path", "value", "message"),
    [
        ("counterfact", ("requested_rewrite", "subject"), 3, "rewrite.subject=3 is a int"),
        ("counterfact", ("requested_rewrite", "target_new"), "x", "target_new='x' is a str"),
        ("counterfact", ("requested_rewrite", "target_new", "str"), " ", "target_new.str=' '"),
        ("counterfact", ("requested_rewrite", "prompt"), "no slot", "holds 0 times"),
        ("counterfact", ("paraphrase_prompts",), "text", "paraphrase_prompts='text' is a str"),
        ("counterfact", ("neighborhood_prompts", 0), None, r"neighborhood_prompts\[0\]=None"),
        ("zsre", ("src",), "Who is it?", "src='Who is it\\?' does not hold the subject"),
        ("zsre", ("src",), "Is {} Watts Humphrey?", "but should be a whole prompt"),
        ("zsre", ("answers",), [], r"answers=\[\] holds no answer"),
        ("zsre", ("loc_ans",), 1848, "loc_ans=1848 is a int"),
        ("knowedit", ("locality", "Relation_Specificity", 0), "x", r"ficity\[0\]='x' is a str"),
        ("knowedit", ("portability", "Reasoning", 0, "ground_truth"), [[5]], "holds 5"),
        ("knowedit", ("target_new",), {"a": 1}, "target_new holds {'a': 1}"),
        ("own", ("localty",), [], "localty is unknown"),
        ("own", ("locality", 0, "answr"), "x", r"locality\[0\].answr is unknown"),
        ("own", ("same_subject", 0, "answer"), "", r"same_subject\[0\].answer='' is empty"),
        ("own", ("target_new",), 5, "target_new=5 is a int"),
        ("own", ("paraphrases", 0), "", r"paraphrases\[0\]='' is empty"),
        ("own", ("target_true",), None, "target_true=None"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_file_and_record(layout, path, value, message, tmp_path):
    record = copy.deepcopy(LAYOUTS[layout])
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([LAYOUTS[layout], record]))
    with pytest.raises(DataError, match=rf"facts.json, record 1(, field .*|: ){message}"):
        read_cases(file)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mutated_record_is_read_or_refused_with_a_sentence(layout, data):
    record = copy.deepcopy(LAYOUTS[layout])
    place, key = record, data.draw(st.sampled_from(sorted(record)))
    while data.draw(st.booleans()) and isinstance(place[key], (dict, list)) and place[key]:
        place = place[key]
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
    junk = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.floats()
    junk = (
        junk | st.lists(junk, max_size=2) | st.dictionaries(st.text(max_size=3), junk, max_size=2)
    )
    if data.draw(st.booleans()):
        place[key] = data.draw(junk)
    elif isinstance(place, dict):
        del place[key]
    try:
        cases, _ = read_cases([record], layout)
    except DataError as error:
        told = str(error)
    else:
        told = f"record 0 is a case, {cases[0].digest}"
    assert "record 0" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bad.json, line 1: the text ends in the middle"),
        ('{"a": 1}', r"line 1: the fields \['a'\] fit no layout of .*; say which it is"),
        ("[]", "bad.json: there is no record in it; give at least one"),
        ("[3]", "record 0: 3 is a int, no JSON object"),
        ('[{"a": 1}]', r"record 0: the fields \['a'\] fit no layout"),
    ],
)
def test_files_of_something_else_are_refused(text, message, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_cases(tmp_path / "bad.json")


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(OWN) + "\n\n{oops\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: '{oops' is no JSON"):
        read_cases(tmp_path / "bad.jsonl")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    for name in ("bad.json", "bad.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match=f"{name}, line 1: byte 0x00 after '' is not UTF-16-LE"):
            read_cases(tmp_path / name)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is no file"):
        read_cases(tmp_path / "nowhere.json")
    (tmp_path / "own.json").write_text(json.dumps([OWN]))
    with pytest.raises(DataError, match="split='train' is for datasets"):
        read_cases(tmp_path / "own.json", split="train")
    with pytest.raises(DataError, match="not a list of records"):
        read_cases(OWN)
    with pytest.raises(ValueError, match="layout='csv' is unknown"):
        read_cases([OWN], "csv")


def test_a_dataset_is_read_by_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "facts"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(COUNTERFACT))
    cases, report = read_cases(str(folder), split="train")
    assert cases == read_cases([COUNTERFACT])[0]
    assert report.source == f"{folder}:train"
