"""Causal tracing: its laws, and the plain way to do it, one run at a time in float64."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit, hooks
from alphaedit_peft.architecture import describe
from alphaedit_peft.studies.locate import (
    CLASSES,
    FactTrace,
    Located,
    fact_row,
    known,
    locate,
    token_classes,
    trace_fact,
)
from alphaedit_peft.studies.tracing import Row, Run, Tracer
from tests.conftest import tiny_model

EDIT = Edit("Marie Curie", "I think that {} was born in", "Rome", id="curie")
FAMILIES = ("llama", "gpt2", "gptj")


def make(family: str, tokenizer, tokens_per_batch: int = 64):
    model = tiny_model(family, torch.float64)
    tracer = Tracer(model, describe(model), tokens_per_batch)
    with torch.no_grad():
        row = known(tracer, fact_row(tracer, tokenizer, EDIT, " "))
    generator = torch.Generator().manual_seed(0)
    shape = (2, len(row.subject), tracer.width)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tracer, Row(row.ids, (*row.target, 7, 9), row.subject), noise


def plain(model, row: Row, noise=None, restore=None) -> float:
    """P(target) of one run without padding; ``restore`` is (module, place, clean state)."""
    handles = []

    def corrupt(_module, _args, output):
        output = output.clone()
        output[0, row.subject[0] : row.subject[-1] + 1] += noise
        return output

    if noise is not None:
        handles.append(model.get_input_embeddings().register_forward_hook(corrupt))
    for name, place, state in restore or ():

        def put(_module, _args, output, place=place, state=state):
            hidden = hooks.hidden_of(output).clone()
            hidden[0, place] = state
            return hooks.with_hidden(output, hidden)

        handles.append(model.get_submodule(name).register_forward_hook(put))
    logits = model(torch.tensor([row.scoring_ids]), use_cache=False).logits[0].double()
    for handle in handles:
        handle.remove()
    found = logits[len(row.ids) - 1 :].log_softmax(-1)
    return float(found[range(len(row.target)), list(row.target)].sum().exp())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_everything_gives_the_clean_probability(family, tokenizer):
    tracer, row, noise = make(family, tokenizer)
    clean, states = tracer.clean(row)
    every = tuple(tracer.names("hidden", 1, 9))
    whole = Run(1, every, tuple(range(len(row.scoring_ids))))
    found = tracer.probabilities(row, states, noise, [Run(1), whole])
    assert abs(found[0] - clean) > 1e-9  # the noise matters
    assert float(found[1]) == pytest.approx(clean, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_corrupting_nothing_changes_nothing(family, tokenizer):
    tracer, row, noise = make(family, tokenizer)
    traced = trace_fact(tracer, tokenizer, EDIT, row, noise * 0, window=2)
    assert traced.corrupted == pytest.approx(traced.clean, rel=1e-9)
    flat = [value for rows in traced.effects.values() for line in rows for value in line]
    assert max(map(abs, flat)) < 1e-9 * traced.clean


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", ["hidden", "mlp"])
def test_all_at_once_equals_one_run_at_a_time(family, state, tokenizer):
    tracer, row, noise = make(family, tokenizer)
    clean, states = tracer.clean(row)
    traced = trace_fact(tracer, tokenizer, EDIT, row, noise, window=3)
    assert traced.clean == pytest.approx(plain(tracer.model, row), rel=1e-9)
    corrupted = sum(plain(tracer.model, row, n) for n in noise) / 2
    assert traced.corrupted == pytest.approx(corrupted, rel=1e-9)
    for place in (row.subject[-1], len(row.ids) - 1):
        for block in range(tracer.architecture.num_blocks):
            around = [block] if state == "hidden" else range(max(0, block - 1), min(4, block + 2))
            names = [name for b in around for name in tracer.names(state, b)]
            put = [(name, place, states[name][place]) for name in names]
            restored = sum(plain(tracer.model, row, n, put) for n in noise) / 2
            effect = traced.effects[state][place - row.subject[0]][block]
            assert effect == pytest.approx(restored - corrupted, rel=1e-6, abs=1e-9 * clean)


@torch.no_grad()
def test_the_last_block_before_the_last_token_restores_nothing(tokenizer):
    tracer, row, noise = make("llama", tokenizer)
    row = Row(row.ids, row.target[:1], row.subject)
    traced = trace_fact(tracer, tokenizer, EDIT, row, noise, window=1)
    before = traced.effects["hidden"][:-1]
    assert max(abs(line[-1]) for line in before) < 1e-12
    restored = traced.effects["hidden"][-1][-1] + traced.corrupted
    assert restored == pytest.approx(traced.clean, rel=1e-9)


@pytest.mark.parametrize(
    ("subject", "end", "classes"),
    [
        (range(1, 5), 8, (0, 1, 1, 2, 3, 4, 5)),
        (range(1, 3), 5, (0, 2, 3, 5)),
        (range(0, 1), 2, (2, 5)),
        (range(1, 3), 3, (0, 2)),
    ],
)
def test_every_token_from_the_subject_on_has_one_class(subject, end, classes):
    row = Row(tuple(range(end)), (1,), subject)
    assert token_classes(row) == tuple(CLASSES[i] for i in classes)


def test_the_same_seed_gives_the_same_trace_and_another_one_another(tokenizer):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, same, other = (
        locate(model, tokenizer, [EDIT], samples=2, seed=seed).to_json() for seed in (3, 3, 4)
    )
    assert one == same
    assert one["corrupted"] != other["corrupted"]
    assert one["facts"][0]["clean"] == other["facts"][0]["clean"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_facts_that_the_model_does_not_know_are_set_aside(tokenizer):
    model = tiny_model("llama")
    unknown = Edit("France", "The capital of {} is", "Rome", target_true="Paris", id="unknown")
    assert locate(model, tokenizer, [unknown, EDIT], samples=1).set_aside == 1
    with pytest.raises(ValueError, match="knows none of the 1 facts"):
        locate(model, tokenizer, [unknown])


@pytest.mark.parametrize("wrong", [{"noise": -1.0}, {"samples": 0}, {"window": 0}])
def test_numbers_out_of_range_are_named(wrong, tokenizer):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value} is out of range"):
        locate(tiny_model("llama"), tokenizer, [EDIT], **wrong)


def test_logits_that_are_not_finite_are_refused(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="are not finite: lm_head"):
        locate(model, tokenizer, [EDIT], AlphaEditConfig(), samples=1)


def made_up(*peaks: int, blocks: int = 6) -> Located:
    """Facts whose MLPs restore most in one block."""
    traces = []
    for i, peak in enumerate(peaks):
        line = tuple(0.9 if block == peak else 0.1 for block in range(blocks))
        effects = {"hidden": (line,), "mlp": (line,)}
        traces.append(FactTrace(str(i), "q", "t", 1.0, 0.0, ("s",), (CLASSES[2],), effects))
    return Located(tuple(traces), 0, 1.0, 3.0, 1, 1, blocks)


def test_suggested_layers_end_at_the_peak_with_a_block_above():
    assert (made_up(4, 4, 4).peak, made_up(4, 4, 4).near_peak) == (4, (4,))
    assert made_up(4, 4, 4).suggested_layers == (2, 3, 4)
    assert made_up(5, 5, 5).suggested_layers == (2, 3, 4)
    assert made_up(0, 0).suggested_layers == (0,)
    assert made_up(9, 9, blocks=20).suggested_layers == (5, 6, 7, 8, 9)
    assert made_up(*[1, 2] * 8).near_peak == (1, 2)
