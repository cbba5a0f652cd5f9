from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.pack import EditPack, EditRecord, PackError, read_plain_lora


def test_saved_then_loaded_is_the_same_bits(pack, saved):
    loaded = EditPack.from_pretrained(saved)
    assert loaded.digest() == pack.digest()
    for name in pack.modules:
        assert torch.equal(loaded.factors[name].A, pack.factors[name].A)
        assert torch.equal(loaded.factors[name].B, pack.factors[name].B)
    assert torch.equal(loaded.targets, pack.targets)
    for field in dataclasses.fields(EditPack):
        if field.name not in ("factors", "targets"):
            assert getattr(loaded, field.name) == getattr(pack, field.name), field.name


def test_two_saves_write_the_same_bytes(pack, saved, tmp_path, files_of):
    pack.save_pretrained(tmp_path / "again")
    EditPack.from_pretrained(saved).save_pretrained(tmp_path / "loaded")
    once = files_of(saved)
    pack.save_pretrained(saved)
    assert once == files_of(tmp_path / "again") == files_of(tmp_path / "loaded") == files_of(saved)


def test_empty_pack(new_pack, tmp_path):
    empty = new_pack(rows=0)
    assert empty.edits == []
    assert empty.rank == 0
    assert "None yet." in _card(empty, tmp_path)
    assert {tuple(t.shape) for t in empty.state_dict().values()} == {(1, 12), (6, 1)}
    loaded = EditPack.from_pretrained(tmp_path / "card")
    assert loaded.rank == 0
    assert loaded.digest() == empty.digest()
    assert {tuple(d.A.shape) for d in loaded.factors.values()} == {(0, 12)}
    assert {tuple(d.B.shape) for d in loaded.factors.values()} == {(6, 0)}
    assert "0 own" in loaded.summary()


def test_properties(new_pack, pack):
    records = (
        EditRecord(pack.edits[0], 0, "superseded", 0),
        EditRecord(pack.edits[0], 1, "own", 3),
        EditRecord(pack.edits[1], 1, "own", 3),
        EditRecord(pack.edits[2], 2, "protected", 1),
    )
    pack = new_pack(records=records)
    assert pack.edits == [records[1].edit, records[2].edit]
    assert pack.rank == 3
    assert pack.active_rows() == (1, 2)
    assert pack.batches == (0, 1, 3)
    assert pack.layers == (2, 10)
    assert pack.dtype == torch.float32
    assert pack.modules == ("model.layers.2.mlp.down_proj", "model.layers.10.mlp.down_proj")
    assert pack.size_bytes == 4 * (2 * 3 * (12 + 6) + 3 * 6)


def test_digest_tells_packs_apart(new_pack, pack):
    assert new_pack(seed=1).digest() != pack.digest()
    assert dataclasses.replace(pack, targets=None).digest() != pack.digest()
    assert dataclasses.replace(pack, records=pack.records[:2]).digest() != pack.digest()
    assert dataclasses.replace(pack, parents=()).digest() == pack.digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_dtypes_round_once(pack, tmp_path, dtype):
    pack.save_pretrained(tmp_path / "small", dtype=dtype)
    loaded = EditPack.from_pretrained(tmp_path / "small")
    for name, delta in pack.factors.items():
        assert torch.equal(loaded.factors[name].A, delta.A.to(dtype).float())
    assert torch.equal(loaded.targets, pack.targets)
    loaded.save_pretrained(tmp_path / "smaller", dtype=dtype)
    assert EditPack.from_pretrained(tmp_path / "smaller").digest() == loaded.digest()


def test_refuses_dtypes_that_do_not_hold_the_values(pack, tmp_path):
    huge = {name: LowRankDelta(d.A * 1e6, d.B) for name, d in pack.factors.items()}
    with pytest.raises(PackError, match=r"lora_A.weight does not fit torch.float16"):
        dataclasses.replace(pack, factors=huge).save_pretrained(tmp_path / "p", dtype=torch.float16)
    with pytest.raises(PackError, match=r"dtype=torch.int8 cannot be saved"):
        pack.save_pretrained(tmp_path / "p", dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_refuses_what_json_cannot_hold(pack, tmp_path):
    with pytest.raises(PackError, match=r"config.json: .*set is not JSON"):
        dataclasses.replace(pack, null_space={"a": {1}}).save_pretrained(tmp_path / "p")
    with pytest.raises(PackError, match=r"config.json: .*not JSON compliant"):
        dataclasses.replace(pack, versions={"a": float("nan")}).save_pretrained(tmp_path / "p")


def test_refuses_to_write_more_than_it_reads(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("alphaedit_peft.pack.format.MAX_LINE_BYTES", 50)
    with pytest.raises(PackError, match=r"edits.jsonl, a line: \d+ bytes .* limit of 50"):
        pack.save_pretrained(tmp_path / "p")


def test_refuses_parts_that_do_not_fit(new_pack, pack):
    first, second = pack.factors.items()
    other = LowRankDelta(torch.zeros(2, 12), torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"factors=\{\} names no module"):
        new_pack(factors={})
    with pytest.raises(ValueError, match=r"ranks \{.*: 3, .*: 2\} differ"):
        new_pack(factors={first[0]: first[1], second[0]: other})
    with pytest.raises(ValueError, match=r"A of x \(torch.float32\) must be finite"):
        new_pack(factors={"x": LowRankDelta(torch.full((3, 2), torch.nan), torch.zeros(6, 3))})
    with pytest.raises(ValueError, match=r"B of x \(torch.int64\) must be finite floats"):
        new_pack(factors={"x": LowRankDelta(torch.ones(3, 2), torch.ones(6, 3).long())})
    with pytest.raises(ValueError, match=r"rows \[3\] of the records are outside .* 3 rows"):
        new_pack(records=[EditRecord(pack.edits[0], 3)])
    with pytest.raises(ValueError, match=rf"edit ids \['{pack.edits[0].id}'\] occur twice"):
        new_pack(records=[EditRecord(pack.edits[0], 0), EditRecord(pack.edits[0], 1)])
    with pytest.raises(ValueError, match=r"targets \(3, 5\) do not fit .*: \(3, 6\) needed"):
        new_pack(targets=torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"targets \(torch.float64\) must be finite float32"):
        new_pack(targets=torch.zeros(3, 6).double())
    with pytest.raises(ValueError, match=r"contexts=\(1,\) must be texts"):
        new_pack(contexts=[1])
    with pytest.raises(ValueError, match=r"parents=\('x',\) must be dicts"):
        new_pack(parents=["x"])


def test_a_folder_without_sidecar_is_a_plain_lora(pack, saved):
    (saved / "alphaedit" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"alphaedit/config.json does not .*PeftModel"):
        EditPack.from_pretrained(saved)
    plain = read_plain_lora(saved)
    assert torch.equal(plain[pack.modules[0]].B, pack.factors[pack.modules[0]].B)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder here"):
        EditPack.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no/such/place is no folder here"):
        EditPack.from_pretrained("no/such/place")


def test_subfolder(saved, pack):
    assert EditPack.from_pretrained(saved.parent, subfolder="pack").digest() == pack.digest()


def test_the_hubs_cache_may_link_to_its_blobs(saved, pack, tmp_path):
    repository = tmp_path / "models--me--pack"
    blobs, snapshot = repository / "blobs", repository / "snapshots/abc/alphaedit"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(p for p in saved.rglob("*") if p.is_file()):
        path.rename(blobs / str(number))
        (snapshot.parent / path.relative_to(saved)).symlink_to(blobs / str(number))
    assert EditPack.from_pretrained(snapshot.parent).digest() == pack.digest()
    elsewhere = repository.rename(tmp_path / "mine")  # a folder of snapshots is no Hub cache
    for path in (elsewhere / "snapshots/abc").rglob("*"):
        if path.is_symlink():
            target = elsewhere / "blobs" / path.readlink().name
            path.unlink()
            path.symlink_to(target)
    with pytest.raises(PackError, match=r"a link leads out of the folder"):
        EditPack.from_pretrained(elsewhere / "snapshots/abc")


def _card(pack, tmp_path):
    pack.save_pretrained(tmp_path / "card")
    return (tmp_path / "card" / "README.md").read_text()


def test_provenance_is_plain_json(pack):
    found = pack.provenance
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"base", "null_space", "versions", "parents", "contexts"}
    assert found["null_space"] == pack.null_space
    assert found["parents"] == [{"digest": "cd"}]


def test_provenance_of_key_moments_is_saved(new_pack, tmp_path):
    facts = {"digest": "ab", "tokens": 1000, "threshold": None, "mode": None}
    new_pack(null_space=facts).save_pretrained(tmp_path / "pack")
    assert EditPack.from_pretrained(tmp_path / "pack").null_space == facts
