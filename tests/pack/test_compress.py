"""Smaller packs: the best of their rank, with what was lost measured, and no way back to rows."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from alphaedit_peft.algebra import LowRankDelta, relative_error, singular_values, truncated
from alphaedit_peft.pack import EditPack, PackError
from alphaedit_peft.pack.contents import Compression, require_rows


@pytest.fixture
def large(new_pack):
    return new_pack(rows=5)


def errors(pack, small):
    """Relative Frobenius errors from dense matrices."""
    found = {}
    for name, delta in pack.factors.items():
        exact = delta.dense().double()
        found[name] = float((small.factors[name].dense().double() - exact).norm() / exact.norm())
    return found


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_it_is_the_best_update_of_its_rank(large, rank):
    small = large.compress(rank=rank)
    assert small.rank == rank
    for name, delta in large.factors.items():
        U, s, V = torch.linalg.svd(delta.dense().double())
        best = U[:, :rank] * s[:rank] @ V[:rank]
        torch.testing.assert_close(small.factors[name].dense().double(), best, rtol=0, atol=1e-5)


def test_what_was_lost_is_measured_and_saved(large, tmp_path):
    small = large.compress(rank=2)
    assert small.compression.rows == 5
    assert small.compression.delta_errors == pytest.approx(errors(large, small), rel=1e-4)
    for name, error in small.compression.output_errors.items():
        A = large.factors[name].A
        before, after = A @ large.factors[name].dense().T, A @ small.factors[name].dense().T
        assert error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    small.save_pretrained(tmp_path / "pack")
    loaded = EditPack.from_pretrained(tmp_path / "pack")
    assert loaded.compression == small.compression
    assert loaded.digest() == small.digest()
    assert loaded.edits == large.edits
    assert loaded.targets is None
    assert loaded.parents[-1] == {"operation": "compress", "digest": large.digest(), "edits": 5}


def test_keys_no_longer_in_force_do_not_count_for_outputs(large):
    gone = [
        dataclasses.replace(r, role="superseded" if r.row else "own", edit=r.edit)
        for r in large.records
    ]
    pack = dataclasses.replace(large, records=gone)
    small = pack.compress(rank=2)
    for name, error in small.compression.output_errors.items():
        key = large.factors[name].A[0]
        before, after = (p.factors[name].dense() @ key for p in (large, small))
        assert error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


@pytest.mark.parametrize("tolerance", [0.05, 0.2, 0.5, 0.9])
def test_a_tolerance_takes_the_least_rank_that_holds_it(large, tolerance):
    pack = dataclasses.replace(
        large,
        factors={
            n: LowRankDelta(d.A, d.B * 10.0 ** -torch.arange(5)) for n, d in large.factors.items()
        },
    )
    small = pack.compress(tolerance=tolerance)
    assert max(errors(pack, small).values()) <= tolerance
    if small.rank > 1:
        assert max(errors(pack, pack.compress(rank=small.rank - 1)).values()) > tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_keeps_the_rows_and_is_saved(large, tmp_path, dtype):
    small = large.compress(dtype=dtype)
    assert not small.compression.mixed
    assert torch.equal(small.targets, large.targets)
    assert small.compression.delta_errors == pytest.approx(errors(large, small), rel=1e-3)
    assert 0 < max(small.compression.delta_errors.values()) < 0.01
    small.save_pretrained(tmp_path / "small")
    stored = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    loaded = EditPack.from_pretrained(tmp_path / "small")
    assert loaded.digest() == small.digest()
    with pytest.warns(UserWarning, match=r"still in force"):
        left = loaded.without([large.edits[0].id], max_share=0)
    assert left.compression is None


def test_rank_and_dtype_together(large):
    both, rank = large.compress(rank=3, dtype=torch.bfloat16), large.compress(rank=3)
    assert (both.rank, both.compression.dtype, both.compression.mixed) == (3, "bfloat16", True)
    for name, error in both.compression.delta_errors.items():
        assert (
            rank.compression.delta_errors[name] < error < 0.02 + rank.compression.delta_errors[name]
        )


def test_what_needs_rows_is_refused_afterwards(large):
    small = large.compress(rank=2)
    message = r"compressed from 5 rows .* can no longer be told apart and one cannot {}; do it with"
    with pytest.raises(ValueError, match=message.format("remove edits from it")):
        small.without([large.edits[0].id])
    with pytest.raises(ValueError, match=message.format("join it with others")):
        EditPack.join([large, small])
    with pytest.raises(ValueError, match=message.format("compress it again")):
        small.compress(dtype=torch.bfloat16)
    require_rows(None, "do anything")
    require_rows(large.compress(dtype=torch.float16).compression, "do anything")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, r"nothing was asked for"),
        ({"rank": 2, "tolerance": 0.1}, r"rank=2 and tolerance=0.1 both set the rank"),
        ({"rank": 5}, r"rank=5 does not make this pack of rank 5 smaller; use 1..4"),
        ({"rank": 0}, r"rank=0 does not"),
        ({"rank": True}, r"rank=True does not"),
        ({"tolerance": 0.0}, r"tolerance=0.0 is a relative error"),
        ({"tolerance": 1e-12}, r"tolerance=1e-12 needs all 5 rows"),
        ({"dtype": torch.int8}, r"dtype=torch.int8 cannot be saved"),
    ],
)
def test_unusable_wishes(large, asked, message):
    with pytest.raises(ValueError, match=message):
        large.compress(**asked)


def test_values_that_a_dtype_cannot_hold(large):
    huge = {name: LowRankDelta(d.A * 1e6, d.B) for name, d in large.factors.items()}
    with pytest.raises(ValueError, match=r"do not fit torch.float16; use bfloat16"):
        dataclasses.replace(large, factors=huge).compress(dtype=torch.float16)


def test_truncation_needs_no_more_than_what_is_there():
    delta = LowRankDelta(torch.randn(9, 4), torch.randn(3, 9))  # more rows than dimensions
    assert len(singular_values(delta)) == 3
    small = truncated(delta, 6)
    assert small.rank == 6
    assert relative_error(delta, small) < 1e-6
    nothing = LowRankDelta(torch.zeros(2, 4), torch.zeros(3, 2))
    assert relative_error(nothing, nothing) == 0
    assert relative_error(nothing, small.first(2)) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, r"rows=-1"),
        ({"rows": 2}, r"rows=2 does not fit a pack of rank 2"),
        ({"mixed": 1}, r"mixed=1"),
        ({"mixed": False}, r"rows=5 does not fit a pack of rank 2"),
        ({"dtype": "int8"}, r"dtype='int8' is none of"),
        ({"dtype": []}, r"dtype=\[\] is not text"),
        ({"delta_errors": {"a": "x"}}, r"delta_errors\['a'\]='x' is not"),
        ({"output_errors": [1]}, r"output_errors=\[1\] is not an object"),
        ({"colour": 1}, r"fields of compression \['colour'\] are unknown"),
    ],
)
def test_a_damaged_record_of_it(large, tmp_path, changes, message):
    large.compress(rank=2).save_pretrained(tmp_path)
    path = tmp_path / "alphaedit" / "config.json"
    values = json.loads(path.read_text())
    values["compression"] |= changes
    path.write_text(json.dumps(values))
    with pytest.raises(PackError, match=message):
        EditPack.from_pretrained(tmp_path)


def test_packs_that_were_not_compressed_do_not_mention_it(large, tmp_path):
    large.save_pretrained(tmp_path / "pack")
    assert "compression" not in (tmp_path / "pack" / "alphaedit" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"compression\.rows=None"):
        Compression(None, True, "float32", {}, {})
