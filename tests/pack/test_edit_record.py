from __future__ import annotations

import json

import pytest

from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditRecord

EDIT = Edit("Paris", "{} is in", "Italy", paraphrases=("Where is Paris?",))


def test_json_round_trip():
    record = EditRecord(EDIT, 3, "protected", 2, "Paris", 0.25, None)
    assert EditRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": -1}, r"row=-1 must be a whole number"),
        ({"row": True}, r"row=True must"),
        ({"batch": 1.5}, r"batch=1.5 must"),
        ({"role": "mine"}, r"role='mine' is unknown"),
        ({"role": ["own"]}, r"role=\['own'\] is unknown"),
        ({"probability_before": 1.01}, r"probability_before=1.01 is outside 0..1"),
        ({"probability_after": float("nan")}, r"probability_after=nan"),
        ({"probability_after": True}, r"probability_after=True"),
    ],
)
def test_refuses_values(changes, message):
    with pytest.raises(ValueError, match=message):
        EditRecord(**({"edit": EDIT, "row": 0} | changes))


def test_refuses_types():
    with pytest.raises(TypeError, match=r"edit='x' is a str; pass an Edit"):
        EditRecord("x", 0)
    with pytest.raises(TypeError, match=r"prefix=None must be text"):
        EditRecord(EDIT, 0, prefix=None)


def test_from_json_refuses_other_fields():
    values = EditRecord(EDIT, 0).to_json()
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        EditRecord.from_json(values | {"colour": 1})
    with pytest.raises(ValueError, match=r"missing fields \['row'\]"):
        EditRecord.from_json({k: v for k, v in values.items() if k != "row"})
    with pytest.raises(TypeError, match=r"edit=5 must be a JSON object"):
        EditRecord.from_json(values | {"edit": 5})
