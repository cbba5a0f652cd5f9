"""Contradictions, repetitions and shared keys."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import Edit
from alphaedit_peft.editing.groups import group_by_key, sort_out

ROME = Edit("France", "The capital of {} is", "Rome", id="rome")
OSLO = Edit("France", "The capital of {} is", "Oslo", id="oslo")
BONN = Edit("France", "The capital of {} is", "Bonn", id="bonn")
BORN = Edit("Anna", "{} was born in", "Ulm", id="born")


def test_nothing_to_sort_out():
    plan = sort_out([ROME, BORN], [], "error")
    assert plan.to_make == (ROME, BORN)
    assert plan.set_aside == ()
    assert plan.replaced == {}


@pytest.mark.parametrize("rule", ["error", "replace", "keep"])
def test_an_edit_that_stands_is_set_aside(rule):
    again = Edit("France", "The capital of {} is", " Rome ", id="again")
    plan = sort_out([again, BORN, BORN], [ROME], rule)
    assert plan.to_make == (BORN,)
    assert [reason for _, reason in plan.set_aside] == [
        "edit rome already says so, in place",
        "edit born already says so, in this list",
    ]


@pytest.mark.parametrize(("new", "existing"), [([ROME, OSLO], []), ([OSLO], [ROME])])
def test_contradiction_is_an_error_by_default(new, existing):
    with pytest.raises(ValueError, match=r"edits rome and oslo contradict each other: .*'Oslo'"):
        sort_out(new, existing, "error")


def test_keep_lets_the_earlier_one_stand():
    plan = sort_out([OSLO, BONN], [], "keep")
    assert plan.to_make == (OSLO,)
    assert "contradicts edit oslo" in plan.set_aside[0][1]


def test_replace_lets_the_last_one_win_over_list_and_place():
    plan = sort_out([OSLO, BONN], [ROME], "replace")
    assert plan.to_make == (BONN,)
    assert [edit.id for edit, _ in plan.set_aside] == ["oslo"]
    assert plan.replaced == {"bonn": "rome"}


def test_one_id_for_two_edits_is_refused():
    other = Edit("Anna", "{} was born in", "Ulm", id="rome")
    with pytest.raises(ValueError, match="id 'rome' names two edits"):
        sort_out([ROME, other], [], "error")


def test_groups_by_prefix_by_cosine_and_over_rows_in_place():
    keys = torch.eye(4)[[0, 1, 2, 3]]
    keys[3] = torch.tensor([0.0, 1.0, 1e-3, 0.0])  # nearly keys[1]
    prefixes = ["a", "b", "a", "c"]
    old = torch.stack([torch.tensor([0.0, 0, 0, 1]), 5 * keys[1]])
    groups = group_by_key(prefixes, keys, [(0, "a"), (1, "z")], old, 0.999)
    assert groups == [([0, 2], [0]), ([1, 3], [1])]


def test_keys_apart_stay_apart():
    keys = torch.eye(3)
    groups = group_by_key(["a", "b", "c"], keys, [], torch.zeros(0, 3), 0.999)
    assert groups == [([0], []), ([1], []), ([2], [])]


@pytest.mark.parametrize("prompt", ["The capital  of {} is", "The capital of {}\n is "])
def test_white_space_hides_no_contradiction(prompt):
    spaced = Edit("France", prompt, "Oslo", id="spaced")
    with pytest.raises(ValueError, match="edits rome and spaced contradict"):
        sort_out([spaced], [ROME], "error")
    with pytest.raises(ValueError, match="edits spaced and rome contradict"):
        sort_out([spaced, ROME], [], "error")
    assert sort_out([Edit("France", prompt, "Rome")], [ROME], "error").to_make == ()


def test_alike_rows_that_are_not_in_force_are_not_taken():
    keys = torch.eye(3)
    assert group_by_key(["a", "b"], keys[:2], [(1, "z")], keys, 0.999) == [([0], []), ([1], [1])]
