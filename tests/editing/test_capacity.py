"""How full a model is: figures against hand-made rows, drift, and the warning at the bound."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from alphaedit_peft import NullSpace, get_alphaedit_model
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.editing.capacity import (
    Capacity,
    LayerCapacity,
    measure_capacity,
    pack_capacity,
    prompt_drift,
)
from alphaedit_peft.log_probs import Reader
from tests.conftest import tiny_model
from tests.editing.test_batch import EDITS, settings

PROMPTS = ["The capital of France is", "Anna"]


def delta(rows) -> LowRankDelta:
    A = torch.tensor(rows, dtype=torch.float64)
    return LowRankDelta(A, torch.ones(3, len(A), dtype=torch.float64))


def only(rows, standing=None, **more) -> LayerCapacity:
    return measure_capacity({4: delta(rows)}, standing or [True] * len(rows), **more).layers[0]


def layer(rank: int, room: int | None) -> LayerCapacity:
    return LayerCapacity(4, rank, rank, room, 1.0, 0, 1.0, None)


def test_rows_of_the_unit_matrix_are_not_crowded():
    found = only([[1.0, 0, 0, 0], [0, 5.0, 0, 0]], weight_norms={4: 2.0})
    assert (found.rows, found.rank, found.condition, found.conflicts) == (2, 2, 1.0, 0)
    assert found.delta_norm == pytest.approx(math.sqrt(3 * 26))
    assert found.growth == pytest.approx(math.sqrt(3 * 26) / 2)
    assert found.used is None


def test_two_rows_at_a_known_angle_have_its_condition():
    for cosine, pairs in ((0.5, 0), (0.89, 0), (0.91, 1)):
        found = only([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
        assert found.condition == pytest.approx((1 + cosine) / (1 - cosine))
        assert found.conflicts == pairs


def test_equal_rows_are_one_direction():
    found = only([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    assert (found.rows, found.rank, found.condition, found.conflicts) == (3, 2, math.inf, 1)


def test_rows_without_a_standing_edit_and_rows_of_zeros_take_no_room():
    found = only([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [True, False, True])
    assert (found.rows, found.rank, found.condition) == (1, 1, 1.0)


def test_no_rows_take_nothing():
    empty = LowRankDelta(torch.zeros(0, 5), torch.zeros(3, 0))
    found = measure_capacity({0: empty}, [], null_space=NullSpace.identity({0: 5})).layers[0]
    assert (found.rank, found.room, found.used, found.condition) == (0, 5, 0.0, 1.0)


@pytest.mark.parametrize("width", [540, 700, 4000])
def test_many_rows_have_nearly_the_condition_of_all_their_eigenvalues(width):
    A = torch.randn(520, width, generator=torch.Generator().manual_seed(width))
    part = measure_capacity({0: LowRankDelta(A, torch.zeros(3, 520))}, [True] * 520).layers[0]
    unit = torch.nn.functional.normalize(A.double())
    values = torch.linalg.eigvalsh(unit @ unit.T)
    assert (part.rows, part.rank) == (520, 520)
    assert part.condition == pytest.approx(float(values[-1] / values[0]), rel=0.03)


def test_many_rows_that_depend_on_each_other_are_counted_exactly():
    A = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    part = measure_capacity({0: LowRankDelta(A, torch.zeros(3, 600))}, [True] * 600).layers[0]
    assert (part.rows, part.rank, part.conflicts) == (600, 300, 300)
    assert part.condition == float("inf")


def test_rows_and_what_stands_must_be_as_many():
    with pytest.raises(ValueError, match="standing has 1 entries for 2 rows of layer 4"):
        only([[1.0, 0.0], [0.0, 1.0]], [True])


@pytest.mark.parametrize(
    ("layers", "bound", "said"),
    [
        ([layer(32, 100)], 0.33, ""),
        ([layer(33, 100)], 0.33, "33 of the 100 directions"),
        ([layer(40, 100), layer(45, 100)], 0.33, "45 of the 100 directions"),
        ([layer(100, 100)], 0.0, ""),
        ([layer(100, None)], 0.33, ""),
        ([], 0.33, ""),
    ],
)
def test_the_warning_comes_at_the_bound_and_names_the_fullest_layer(layers, bound, said):
    warning = Capacity(tuple(layers), bound=bound).warning
    assert said in warning
    assert bool(warning) == bool(said)
    assert str(Capacity(tuple(layers), bound=bound)).endswith(warning)


def wrapped(tokenizer, room: int = 96, **changes):
    space = NullSpace.identity({0: room, 1: room})
    base = tiny_model("gpt2")
    return get_alphaedit_model(base, settings(**changes), tokenizer=tokenizer, null_space=space)


def test_a_model_tells_what_its_pack_tells_and_more(tokenizer):
    model = wrapped(tokenizer)
    report = model.edit(EDITS, progress=False)
    found = model.capacity(PROMPTS)
    assert [part.used for part in found.layers] == [4 / 96, 4 / 96]
    assert report.capacity == model.capacity()
    assert found.drift is not None
    assert found.drift > 0
    assert all(str(part) in str(report) for part in found.layers)
    assert report.to_json()["capacity"]["layers"][0]["used"] == 4 / 96
    alone = pack_capacity(model.to_pack(), model.resources.null_space)
    assert alone is not None
    for ours, packs in zip(found.layers, alone.layers, strict=True):
        assert (ours.rank, ours.room) == (packs.rank, packs.room)
        assert ours.condition == pytest.approx(packs.condition, rel=1e-9)
        assert packs.growth is None


def test_factors_that_something_else_changed_are_not_measured_as_if_they_were_the_edits(tokenizer):
    model = wrapped(tokenizer)
    model.edit(EDITS, progress=False)
    with torch.no_grad():
        model.edit_adapters["default"].layers[0].lora_A["default"].weight.mul_(3)
    with pytest.raises(RuntimeError, match="are not those its edits were written to"):
        model.capacity()


def test_growth_is_the_same_while_merged(tokenizer):
    model = wrapped(tokenizer)
    model.edit(EDITS, progress=False)
    before = model.capacity()
    model.merge()
    assert model.capacity() == before


def test_an_unedited_model_does_not_drift(tokenizer):
    assert wrapped(tokenizer).capacity(PROMPTS).drift == 0


def test_editing_warns_from_the_bound_on(tokenizer):
    model = wrapped(tokenizer, capacity_bound=0.03)
    model.edit(EDITS[:2], progress=False)
    with pytest.warns(UserWarning, match="3 of the 96 directions .* capacity_bound=0.03"):
        model.edit(EDITS[2:3], progress=False)


def test_drift_is_the_mean_over_prompts(tokenizer):
    reader = Reader(tiny_model("gpt2"), tokenizer, tokens_per_batch=1)
    other = tiny_model("gpt2", seed=1).state_dict()

    class Swapped(nullcontext):
        def __enter__(self):
            self.kept = {k: v.clone() for k, v in reader.model.state_dict().items()}
            reader.model.load_state_dict(other)

        def __exit__(self, *_):
            reader.model.load_state_dict(self.kept)

    each = [prompt_drift(reader, Swapped, [prompt]) for prompt in PROMPTS]
    assert prompt_drift(reader, Swapped, PROMPTS) == pytest.approx(sum(each) / 2)
    assert min(each) > 0


@pytest.mark.parametrize(
    ("prompts", "error", "said"),
    [("one text", TypeError, "'one text' is one text"), ([], ValueError, "give one or more")],
)
def test_prompts_that_cannot_be(tokenizer, prompts, error, said):
    reader = Reader(tiny_model("gpt2"), tokenizer)
    with pytest.raises(error, match=said):
        prompt_drift(reader, nullcontext, prompts)


@pytest.mark.parametrize("value", [-0.1, 1.5, "full"])
def test_bounds_that_cannot_be(value):
    with pytest.raises(ValueError, match=f"capacity_bound={value!r}"):
        settings(capacity_bound=value)
