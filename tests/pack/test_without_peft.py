"""Packs are read, made of each other and written to the same bytes without PEFT, transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.compress import compress
from alphaedit_peft.pack.export import export
from alphaedit_peft.pack.files import StoredPack, read_pack, save_pack
from alphaedit_peft.pack.join import JoinOptions, join
from alphaedit_peft.pack.remove import remove

COMMANDS = """
import json, sys
from alphaedit_peft.cli import app
from alphaedit_peft.pack import files

files.push_folder = lambda folder, *_: f"{len(list(folder.rglob('*.*')))} files"
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
print(sorted({"accelerate", "peft", "transformers"} & set(sys.modules)))
"""


@pytest.fixture
def stored(saved):
    return read_pack(saved, StoredPack)


@pytest.fixture
def other(new_pack, tmp_path):
    records = tuple(
        type(r)(type(r.edit)(f"Other {r.row}", "{} works at", " x"), r.row, prefix=f"Other {r.row}")
        for r in new_pack(seed=1).records
    )
    new_pack(seed=1, records=records).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_commands_on_packs_leave_peft_and_transformers_alone(pack, saved, other, tmp_path):
    out = [str(tmp_path / f"out {i}") for i in range(6)]
    commands = [
        ["inspect", str(saved)],
        ["inspect", str(saved), "--json"],
        ["inspect", str(saved), "--html", str(tmp_path / "page.html")],
        ["remove", str(saved), pack.edits[0].id, "--out", out[0]],
        ["join", str(saved), str(other), "--out", out[1]],
        ["compress", str(saved), "--rank", "2", "--out", out[2]],
        ["export", str(saved), "--out", out[3]],
        ["push", str(saved), "me/pack"],
        ["pull", str(saved), "--out", out[4]],
    ]
    program = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert "Pushed 3 edits: 6 files" in done.stdout


def test_the_same_bytes_as_with_peft(pack, stored, saved, other, tmp_path, files_of):
    def same(value, wanted):
        save_pack(value, tmp_path / "value")
        wanted.save_pretrained(tmp_path / "wanted")
        assert files_of(tmp_path / "value") == files_of(tmp_path / "wanted")

    same(stored, pack)
    ids = [pack.edits[1].id]
    same(remove(stored, ids, max_share=1).pack, pack.without(ids, max_share=1))
    same(compress(stored, 2, None, None), pack.compress(rank=2))
    both = join(
        [stored, read_pack(other, StoredPack)], JoinOptions(norm_guard=0, key_cosine=1)
    ).pack
    same(both, EditPack.join([pack, other], norm_guard=0, key_cosine=1))
    export(stored, tmp_path / "lora", max_rank=8)
    pack.export(tmp_path / "lora again", max_rank=8)
    assert files_of(tmp_path / "lora") == files_of(tmp_path / "lora again")


def test_fields_of_another_peft_are_taken_over(saved, tmp_path):
    where = saved / "adapter_config.json"
    config = json.loads(where.read_text())
    del config["use_dora"]
    config |= {"a_later_field": None, "peft_version": "0.1", "lora_dropout": 0.5}
    where.write_text(json.dumps(config))
    small = compress(read_pack(saved, StoredPack), 2, None, None)
    save_pack(small, tmp_path / "small")
    found = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert set(found) == set(config)
    assert (found["peft_version"], found["a_later_field"]) == ("0.1", None)
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (2, 2, 0.0)


def test_a_scaling_that_is_one_by_chance_is_not_taken_over(saved, tmp_path):
    where = saved / "adapter_config.json"
    config = json.loads(where.read_text())
    one = read_pack(saved, StoredPack)
    one = remove(one, [e.id for e in one.edits[1:]], max_share=1).pack
    save_pack(one, saved)
    where.write_text(json.dumps(config | {"r": 1, "lora_alpha": 1, "use_rslora": True}))
    assert read_pack(saved, StoredPack).lora["use_rslora"] is True
    export(read_pack(saved, StoredPack), tmp_path / "out", max_rank=4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_rslora"] is False
