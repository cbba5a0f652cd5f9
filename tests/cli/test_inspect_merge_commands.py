"""``inspect --html``, and null spaces that are chosen by the model's fingerprint."""

from __future__ import annotations

import pytest

from alphaedit_peft import NullSpace, embedded
from alphaedit_peft.cli.arguments import fingerprint_of
from alphaedit_peft.nullspace.sharing import folder_name
from tests.pack.conftest import make_pack


@pytest.fixture
def saved(tmp_path):
    make_pack().save_pretrained(tmp_path / "pack")
    return tmp_path / "pack"


def test_a_page_is_written_and_says_where(saved, run, run_json, tmp_path):
    page = tmp_path / "page.html"
    assert f"Written to {page}: 3 edits" in run("inspect", saved, "--html", page).stdout
    text = page.read_text(encoding="utf-8")
    assert "<title>Edit pack pack</title>" in text
    assert "Subject 2" in text
    told = run_json("inspect", saved, "--html", page)
    assert told["html"] == str(page)
    assert told["parents"] == [{"digest": "cd"}]
    assert told["compression"] is None


def test_a_page_with_the_null_space_of_the_pack(shown, run, tmp_path):
    folder, findings = shown
    page = tmp_path / "page.html"
    run("inspect", folder / "pack", "--html", page, "--null-space", folder / "null_space")
    text = page.read_text(encoding="utf-8")
    assert "of 1,024 kept" in text
    assert all(edit.id in text for edit in findings.edits)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--html", "page.txt"], 2, "'page.txt' must be a file's name in .html"),
        (["--html", "."], 2, "is a folder; name a file"),
        (["--html", "nowhere/page.html"], 1, "there is no folder nowhere"),
        (["--null-space", "ns"], 2, "give --html too"),
        (["--html", "page.html", "--null-space", "nowhere/else"], 1, "nowhere/else"),
    ],
)
def test_nonsense_is_refused_and_nothing_written(
    saved, run, tmp_path, monkeypatch, words, code, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("inspect", saved, *words, code=code)
    told = " ".join((result.output + result.stderr).replace("│", " ").split())
    assert message in told
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_a_null_space_has_no_page(shown, run, tmp_path):
    folder, _ = shown
    result = run("inspect", folder / "null_space", "--html", tmp_path / "p.html", code=1)
    assert "--html shows packs" in result.stderr


def test_another_null_space_is_refused(saved, shown, run, tmp_path):
    folder, _ = shown
    words = ["--html", tmp_path / "p.html", "--null-space", folder / "null_space"]
    result = run("inspect", saved, *words, code=1)
    assert "has no eigenvectors" in result.stderr or "the pack was made with ab" in result.stderr
    assert not (tmp_path / "p.html").exists()


@pytest.mark.slow
def test_a_null_space_is_chosen_by_the_models_fingerprint(
    shown, run, run_json, edits_file, tmp_path
):
    folder, _ = shown
    space = NullSpace.from_pretrained(folder / "null_space")
    base, _ = embedded.load()
    made_for = fingerprint_of(base)
    assert made_for == space.fingerprint
    several = tmp_path / "several"
    space.save_pretrained(several / folder_name(made_for))
    NullSpace.identity({0: 8}, None).save_pretrained(several)  # at the root: fits no model here
    words = ["edit", "embedded", edits_file, "--null-space", several, "--set", "steps=2"]
    told = run_json(*words, "--out", tmp_path / "pack")
    assert told["edits_in_pack"] == 2
    pack = run_json("inspect", tmp_path / "pack")
    assert pack["null_space"]["tokens"] == space.tokens > 0
    words = ["rollback", "embedded", tmp_path / "pack", "--null-space", several]
    assert run_json(*words, "--out", tmp_path / "less")["remaining"] == []


def test_a_null_space_that_is_not_there_is_told_before_the_model_is_loaded(
    run, edits_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["edit", "no/such-model", edits_file, "--null-space", "no/such-space"]
    result = run(*words, "--out", tmp_path / "pack", code=1)
    assert "no/such-space" in result.stderr
    assert "no/such-model" not in result.stderr
