"""A metric that the package does not have takes one class: here softer than a projector.

M = Q diag(f) Q^T + c (I - Q Q^T) over the eigenvectors Q that a null space stores, with
f(s) = 1 / (w s + r) and c the mean of f over the rest of the spectrum; D = 1. r is relative to the
mean |k|^2, the sum of the spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from alphaedit_peft import AlphaEditModel, Edit, get_alphaedit_model, solve_metric
from alphaedit_peft.editing.keys import take_keys
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.settings import EditOptions, Settings
from alphaedit_peft.solve_metric import Given, Metric, products
from tests import oracle
from tests.conftest import tiny_model
from tests.editing.test_batch import CONTEXTS, EDITS, key_moment, settings

WEIGHT, SOFTNESS = 30.0, 0.02


@dataclass(frozen=True)
class Blend(Metric):
    null_space: NullSpace
    weight: float
    softness: float

    @classmethod
    def needs(cls, settings: EditOptions) -> tuple[str, ...]:
        return ("null_space",)

    @classmethod
    def of(cls, settings: Settings, given: Given) -> Blend:
        return cls(given.null_space, settings.moment_weight, settings.ridge)

    @property
    def statistics(self) -> tuple[NullSpace, ...]:
        return (self.null_space,)

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        return self._times(layer, keys, 1.0)

    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        prior, *halves = (self._times(layer, part.double(), -0.5) for part in (prior, *batches))
        return products(prior, halves)

    def ridge(self, squares: Tensor) -> float:
        return 1.0

    @property
    def held_bytes(self) -> int:
        return sum(part.basis.nbytes for part in self.null_space.parts.values())

    def advice(self, settings: Settings) -> str:
        return f"lower moment_weight (now {settings.moment_weight:g})"

    def _times(self, layer: int, rows: Tensor, power: float) -> Tensor:
        """Rows times M to a power."""
        part = self.null_space.parts[layer]
        basis, values = part.basis.to(rows), part.values.to(rows)
        f = 1 / (self.weight * values + self.softness * values.sum())
        stored = (
            slice(len(values) - basis.shape[1], None) if part.complement else slice(basis.shape[1])
        )
        rest = torch.ones_like(f, dtype=torch.bool)
        rest[stored] = False
        mean = f[rest].mean() if rest.any() else f.mean()
        inner = (rows @ basis) * (f[stored] ** power - mean**power)
        return rows * mean**power + inner @ basis.T


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(solve_metric.KINDS, "blend", Blend)


def space() -> NullSpace:
    moments = {layer: key_moment(layer) for layer in (0, 1)}
    found = KeyMoments(moments, 10_000, dict.fromkeys(moments, "mlp")).null_space(0.5, "absolute")
    assert all(0 < part.basis.shape[1] < 96 for part in found.parts.values())
    return found


def dense_metric(space: NullSpace) -> Tensor:
    """M of layer 1, (d_in, d_in), in float64, term by term."""
    part = space.parts[1]
    s, stored = part.values.double(), part.basis.shape[1]
    f = 1 / (WEIGHT * s + SOFTNESS * s.sum())
    known = range(96 - stored, 96) if part.complement else range(stored)
    c = f[[i for i in range(96) if i not in known]].mean()
    M = c * torch.eye(96, dtype=torch.float64)
    for column, i in enumerate(known):
        q = part.basis[:, column].double()
        M += (f[i] - c) * torch.outer(q, q)
    return M


def edited(tokenizer, space: NullSpace) -> AlphaEditModel:
    config = settings(
        objective="blend", rewrite_layers=[1], moment_weight=WEIGHT, ridge=SOFTNESS, steps=3
    )
    base = tiny_model("gpt2", torch.float64)
    return get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)


def keys_and_hidden(model: AlphaEditModel, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """K (u, d_in) at layer 1 and h (u, d) after it, of the model as it is."""
    base, held = model.get_base_model(), Settings.of(model.alphaedit_config)
    runner = Runner(base, model.resources.tokenizer, held, model.architecture, CONTEXTS)
    rows = [runner.renderer.edit_rows(edit, CONTEXTS) for edit in edits]
    module = model.architecture.rewrite_name(1)
    keys = torch.stack([oracle.mean_key(base, module, row) for row in rows])
    return keys, take_keys(runner, rows).hidden


def test_a_sequence_is_the_dense_formula(tokenizer):
    made_with = space()
    model, M = edited(tokenizer, made_with), dense_metric(made_with)
    K, wanted = torch.zeros(0, 96).double(), torch.zeros(32, 96).double()
    for batch in (EDITS[:2], EDITS[2:]):
        keys, hidden = keys_and_hidden(model, batch)
        report = model.edit(batch, progress=False)
        assert len(report.made) == len(batch)
        K = torch.cat([K, keys])
        R = model.to_pack().targets[-len(batch) :].double() - hidden  # (u, d)
        solved = torch.linalg.inv(K @ M @ K.T + torch.eye(len(K)).double())
        wanted = wanted + R.T @ solved[-len(batch) :] @ K @ M
        found = model.factors[1].dense().double()
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_is_asked_of_a_metric_is_answered(tokenizer, tmp_path):
    made_with = space()
    model = edited(tokenizer, made_with)
    model.alphaedit_config.memory_budget = "1GiB"
    report = model.edit(EDITS, progress=False)
    assert report.capacity.layers[0].room is None  # its rows are no projected keys
    assert report.layers[0].preserved_change is None
    assert model.resources.provenance()["digest"] != made_with.digest()  # no other metric's rows
    model.save_pretrained(tmp_path)
    pack = model.to_pack()
    with pytest.raises(ValueError, match="objective='blend', whose rows are not projected keys"):
        pack.without([pack.edits[0].id])
    again = AlphaEditModel.from_pretrained(
        tiny_model("gpt2", torch.float64), tmp_path, tokenizer=tokenizer, null_space=made_with
    )
    again.repour()
    assert (again.factors[1].dense() - model.factors[1].dense()).norm() <= 1e-6


def test_without_its_statistics_it_says_what_is_missing(tokenizer):
    with pytest.raises(ValueError, match="no null space was given"):
        edited(tokenizer, None).edit(EDITS, progress=False)


def test_a_metric_is_made_anew_when_any_setting_changes(tokenizer):
    model = edited(tokenizer, space())
    config, base = model.alphaedit_config, model.base_fingerprint
    first = model.resources.find_metric(config, base)
    assert model.resources.find_metric(config, base) is first
    config.kl_factor = 0.5
    assert model.resources.find_metric(config, base) is not first


def test_rows_of_two_metrics_on_one_null_space_do_not_go_together(tokenizer):
    model = edited(tokenizer, space())
    model.edit(EDITS[:1], progress=False)
    model.alphaedit_config.objective = "alphaedit"
    with pytest.raises(ValueError, match="rows of two projectors do not go together"):
        model.edit(EDITS[1:], progress=False)
    assert model.edits == EDITS[:1]
