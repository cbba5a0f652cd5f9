from __future__ import annotations

import dataclasses

import pytest
import torch
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


def test_the_hub_learns_that_it_is_an_adapter_of_its_base(pack):
    assert ModelCard(card(pack)).data.to_dict()["base_model_relation"] == "adapter"
    assert "base_model_relation" not in card(with_base(pack, None))


def test_without_texts_the_card_says_where_they_are_and_what_was_measured(pack):
    text = card(pack, "me/pack", "a", texts=False)
    assert all(edit.subject not in text for edit in pack.edits)
    assert "[alphaedit/edits.jsonl](alphaedit/edits.jsonl)" in text
    assert "0.1 before, 0.9 right after (3 of 3 edits measured)" in text
    assert 'PeftModel.from_pretrained(base, "me/pack", subfolder="a")' in text


def test_unmeasured_and_empty_packs_claim_no_probability(new_pack):
    records = [EditRecord(Edit("s", "{} is", "t"), 0)]
    for made in (new_pack(records=records), new_pack(rows=0)):
        assert "Median probability" not in card(made)


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
    for fact in (
        "3 own, in 2 batches",
        "3, 3 in force",
        "2, 10",
        "float32",
        "a/base",
        "tokens 1000",
    ):
        assert fact in text
    assert f"{pack.factors[pack.modules[0]].norm():.4g}" in text
    assert "not recorded" in dataclasses.replace(pack, null_space=None, base=None).summary()


def test_summary_tells_protected_rows_from_superseded_ones(pack):
    roles = ("superseded", "own", "protected")
    records = [dataclasses.replace(r, role=n) for r, n in zip(pack.records, roles, strict=True)]
    text = dataclasses.replace(pack, records=records).summary()
    assert "1 own, 1 protected, 1 superseded" in text
    assert "3, 2 in force" in text


def test_summary_tells_of_compression_and_parents(pack):
    assert "compression" not in pack.summary()
    parent = {"operation": "beside", "name": "a\nb", "digest": "ef" * 20, "edits": 7}
    small = dataclasses.replace(pack, parents=(parent,)).compress(rank=2, dtype=torch.bfloat16)
    text = small.summary()
    worst = max(small.compression.delta_errors.values())
    assert f"from 3 rows, bfloat16; Delta off by {worst:.2g}" in text
    assert "on top of a b, 7 edits, digest efefefefefef" in text
    assert "compressed from, 3 edits" in text
    assert "in force" not in text


def test_the_embedded_model_is_loaded_from_the_package(pack):
    text = card(with_base(pack, embedded.NAME))
    assert "from alphaedit_peft import embedded\n\nbase, tokenizer = embedded.load()\n" in text
    assert "AutoModelForCausalLM" not in text
    assert ModelCard(text).data.base_model is None
    assert f"base: {embedded.NAME}" in text
