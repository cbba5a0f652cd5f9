from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub import ModelCard

from alphaedit_peft import embedded
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.pack import EditRecord
from alphaedit_peft.pack.card import card


def with_base(pack, base):
    return dataclasses.replace(pack, config=AlphaEditConfig(base_model_name_or_path=base))


def test_metadata(pack):
    data = ModelCard(card(pack)).data
    assert data.base_model == "a/base"
    assert data.library_name == "peft"
    assert data.tags == ["alphaedit", "knowledge-editing", "lora"]
    assert data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(
    "base", [None, "/home/me/models/base", "C:\\models\\base", "../base", "a/b/c", 'x"\n- y: z']
)
def test_a_base_that_is_no_repository_stays_out(pack, base):
    text = card(with_base(pack, base))
    assert ModelCard(text).data.base_model is None
    assert "path/of/the/base/model" in text
    assert base is None or base not in text


def test_a_local_folder_named_like_a_repository_stays_out(pack, tmp_path, monkeypatch):
    (tmp_path / "models/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelCard(card(with_base(pack, "models/base"))).data.base_model is None


def test_edits_cannot_break_the_table(new_pack):
    hostile = Edit("a|b\n\n# c", "{} `x` <img src=x> [l](u)", "\x1b[31m|---|\r\n---\n")
    text = card(new_pack(records=[EditRecord(hostile, 0, probability_after=1e-5)]))
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert row == (
        r"| a\|b \# c | \{\} \`x\` \<img src=x\> \[l\]\(u\) | \[31m\|---\| --- |  | 1e-05 |"
    )


def test_long_texts_and_long_lists_are_cut(new_pack):
    records = [EditRecord(Edit("s" * 999, "{} is", "t", id=str(i)), 0) for i in range(103)]
    text = card(new_pack(records=records))
    assert "and 3 more" in text
    assert text.count("\n| sss") == 100
    assert max(map(len, text.splitlines())) < 300


def test_summary_says_what_there_is(pack):
    text = pack.summary()
    for fact in ("3 own, 0 other, in 2 batches", "2, 10", "float32", "a/base", "tokens 1000"):
        assert fact in text
    assert f"{pack.factors[pack.modules[0]].norm():.4g}" in text
    assert "not recorded" in dataclasses.replace(pack, null_space=None, base=None).summary()


def test_the_embedded_model_is_loaded_from_the_package(pack):
    text = card(with_base(pack, embedded.NAME))
    assert "from alphaedit_peft import embedded\n\nbase, tokenizer = embedded.load()\n" in text
    assert "AutoModelForCausalLM" not in text
    assert ModelCard(text).data.base_model is None
    assert f"base: {embedded.NAME}" in text
