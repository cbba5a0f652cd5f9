"""Packs taken apart, joined, compressed and exported from the shell, with their figures."""

import dataclasses
import warnings

import pytest
import torch

from alphaedit_peft import AlphaEditModel
from alphaedit_peft.cli.arguments import load_pack
from alphaedit_peft.pack import EditPack, read_plain_lora
from alphaedit_peft.pack.parents import MissingParentError
from tests.pack.conftest import make_pack

COMMANDS = ("remove", "join", "compress", "export")


@pytest.fixture
def packs(tmp_path):
    """Two packs beside each other, of different edits."""
    for number, name in enumerate("ab"):
        pack = make_pack(rows=4, seed=number)
        records = [
            dataclasses.replace(
                r,
                prefix="",
                edit=dataclasses.replace(r.edit, subject=f"{name}{i}", id=f"{name}{i}"),
            )
            for i, r in enumerate(pack.records)
        ]
        dataclasses.replace(pack, records=records).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_each_explains_itself_with_an_example(run, command):
    text = run(command, "--help").stdout
    assert f"alphaedit {command}" in text.partition("Options")[0]
    assert "--json" in text


def test_remove_says_what_stays_in_force(packs, run, run_json):
    words = ["remove", packs / "a", "a1", "a3", "--out", packs / "out"]
    values = run_json(*words)
    left = EditPack.from_pretrained(packs / "out")
    assert [e.id for e in left.edits] == ["a0", "a2"] == [e["id"] for e in values["remaining"]]
    assert [e["id"] for e in values["removed"]] == ["a1", "a3"]
    pack = EditPack.from_pretrained(packs / "a")
    assert values["shares_in_force"] == pack.removal_shares(["a1", "a3"])
    result = run(*words, "--max-share", "0")
    assert "still in force" in result.stdout
    assert "2 edits remain" in result.stdout
    assert "2 of 2 removed edits are still in force by more than 0%" in result.stderr


def test_remove_refuses_unknown_ids(packs, run):
    result = run("remove", packs / "a", "b0", "--out", packs / "out", code=1)
    assert "edit ids ['b0'] are not in this pack" in result.stderr
    assert not (packs / "out").exists()


def test_join_names_the_packs_and_what_was_left_out(packs, run, run_json):
    values = run_json("join", packs / "a", packs / "b", "--out", packs / "out", "--norm-guard", "0")
    joined = EditPack.from_pretrained(packs / "out")
    assert (values["edits"], values["rank"], values["left_out"]) == (8, 8, [])
    assert [parent["name"] for parent in joined.parents] == ["a", "b"]
    assert all(figures["largest_drift"] < 1e-5 for figures in values["modules"].values())
    again = run("join", packs / "out", packs / "a", "--out", packs / "more", "--norm-guard", "0")
    assert "out has it too" in again.stdout
    assert "8 edits, rank 8" in again.stdout


def test_join_settles_contradictions_as_asked(packs, run):
    pack = EditPack.from_pretrained(packs / "a")
    edit = dataclasses.replace(pack.edits[0], target_new="other", id="new")
    record = dataclasses.replace(pack.records[0], edit=edit)
    b = EditPack.from_pretrained(packs / "b")
    dataclasses.replace(b, records=[record, *b.records[1:]]).save_pretrained(packs / "c")
    words = ["join", packs / "a", packs / "c", "--out", packs / "out", "--norm-guard", "0"]
    assert "contradict each other" in run(*words, code=1).stderr
    text = run(*words, "--on-conflict", "last").stdout
    assert "Left out" in text
    assert "new" in [e.id for e in EditPack.from_pretrained(packs / "out").edits]


def test_compress_reports_its_errors(packs, run, run_json):
    words = ["compress", packs / "a", "--out", packs / "out"]
    values = run_json(*words, "--rank", "2", "--dtype", "bfloat16")
    small = EditPack.from_pretrained(packs / "out")
    assert values["compression"] == small.compression.to_json()
    assert (values["rank"], values["rank_before"], small.rank) == (2, 4, 2)
    message = run(*words, "--tolerance", "0.9", "--rank", "2", code=1).stderr
    assert "both set the rank" in message
    text = run(*words, "--rank", "3").stdout
    assert "error of Delta" in text
    assert "rank 3 of 4, float32" in text
    assert run(*words, code=2)


def test_export_writes_a_plain_lora(packs, run, run_json):
    words = ["export", packs / "a", "--out", packs / "out"]
    values = run_json(*words, "--max-rank", "vllm", "--all-layers", "--dtype", "float16")
    assert (values["rank"], values["dtype"], len(values["modules"])) == (8, "float16", 12)
    found = read_plain_lora(packs / "out")
    pack = EditPack.from_pretrained(packs / "a")
    for name, delta in pack.factors.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=0, atol=2e-2)
    assert "2 modules of rank 16, float32" in run(*words, "--max-rank", "16").stdout
    assert "rank=3" in run(*words, "--max-rank", "3", code=1).stderr
    assert "is an edit pack" in run("export", packs / "a", "--out", packs / "b", code=1).stderr
    run(*words, "--max-rank", "many", code=2)


def test_nothing_warns_where_nothing_is_wrong(packs, run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("compress", packs / "a", "--dtype", "float16", "--out", packs / "out")


@pytest.fixture
def above(packs):
    """A pack that says it was edited on top of pack a."""
    pack, below = (EditPack.from_pretrained(packs / name) for name in "ba")
    parent = {"operation": "beside", "name": "a", "digest": below.digest(), "edits": 4}
    dataclasses.replace(pack, parents=(parent,)).save_pretrained(packs / "above")
    return packs / "above"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("export", "it cannot be exported alone"),
        ("merge embedded", "it cannot be merged alone"),
        ("rollback embedded", "its batches cannot be taken back alone"),
    ],
)
def test_a_pack_on_top_of_another_is_joined_before_it_stands_alone(above, run, command, what):
    out = above.parent / "out"
    told = run(*command.split(), above, "--out", out, code=1).stderr
    digest = EditPack.from_pretrained(above.parent / "a").digest()
    assert f"on top of a, 4 edits, digest {digest[:12]}" in told
    assert what in told
    assert f"alphaedit join PARENT {above} --out both" in told
    assert not out.exists()
    run("join", above.parent / "a", above, "--out", above.parent / "both", "--norm-guard", "0")
    if command == "export":
        run(command, above.parent / "both", "--out", out)


def test_what_cannot_be_loaded_alone_says_what_to_do_on_the_command_line(monkeypatch):
    def missing(*_, **__):
        raise MissingParentError("this pack stands on pack 'a'", "which is not loaded; load it")

    monkeypatch.setattr(AlphaEditModel, "from_pretrained", missing)
    told = r"^me/b: this pack stands on pack 'a'.*join PARENT me/b"
    with pytest.raises(ValueError, match=told):
        load_pack(None, "me/b")


def test_more_rows_than_vllm_takes_are_not_exported_for_it(packs, run):
    make_pack(rows=513).save_pretrained(packs / "large")
    told = run("export", packs / "large", "--max-rank", "vllm", "--out", packs / "out", code=1)
    assert "513" in told.stderr
    assert "512" in told.stderr
    assert "compress it to rank 512 first" in told.stderr
    assert not (packs / "out").exists()
