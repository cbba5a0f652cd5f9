"""The benchmark: shapes, made-up edits, counts and figures. No test here asserts a time."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from alphaedit_peft.devices import held_parameters, keeps_elsewhere
from alphaedit_peft.studies.benchmark import (
    LENGTHS,
    SHAPES,
    Findings,
    PlainSession,
    Plan,
    Subject,
    benchmark,
    benchmark_config,
    collect_statistics,
    made_up_edits,
    random_model,
    random_statistics,
    read_shape,
    shape_config,
    stand_in_tokenizer,
)
from alphaedit_peft.studies.benchmark.measure import forward_times
from alphaedit_peft.studies.benchmark.subject import Shape
from alphaedit_peft.studies.benchmark.timings import Batch, Floor, Session
from alphaedit_peft.tokens import encode
from tests.conftest import tiny_config, tiny_model

CPU = torch.device("cpu")
PARAMETERS = {"gpt2-xl": 1.557e9, "gpt-j-6b": 6.051e9, "llama-3-8b": 8.030e9}
PAIRS = (("lab-gpt2", "gpt2-xl"), ("lab-gptj", "gpt-j-6b"), ("lab-llama", "llama-3-8b"))


def on_meta(name: str):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_config(SHAPES[name]))


def head_share(model) -> float:
    head = model.get_output_embeddings().weight.numel()
    blocks = sum(p.numel() for n, p in model.named_parameters() if ".h." in n or ".layers." in n)
    return head / (head + blocks)


def make_subject(family: str = "llama", tokenizer=None, **settings) -> Subject:
    tokenizer = tokenizer or stand_in_tokenizer(320)
    config = benchmark_config([0, 1], steps=3, **settings)
    config.contexts = ["The w11 w12 w13.", "Because w14 w15 w16."]
    return Subject(family, tiny_model(family), tokenizer, config)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_shapes_have_the_papers_parameters_and_layers(name):
    model = on_meta(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == pytest.approx(PARAMETERS[name], rel=1e-3)
    full, _ = benchmark_config().resolve(model)
    wanted = {"gpt2-xl": (range(13, 18), 20), "gpt-j-6b": (range(3, 9), 25)}
    layers, steps = wanted.get(name, (range(4, 9), 25))
    assert (full.rewrite_layers, full.steps) == (list(layers), steps)


@pytest.mark.parametrize(("lab", "large"), PAIRS)
def test_lab_shapes_have_the_large_ones_depth_of_edits_and_share_of_the_head(lab, large):
    small, big = on_meta(lab), on_meta(large)
    layers = SHAPES[lab].rewrite_layers
    full, _ = benchmark_config().resolve(big)
    depth = (full.rewrite_layers[-1] + 1) / big.config.num_hidden_layers
    assert abs((layers[-1] + 1) / small.config.num_hidden_layers - depth) < 0.05
    assert len(layers) == 5
    assert head_share(small) == pytest.approx(head_share(big), rel=0.25)


def test_a_shape_is_read_from_a_config_file_or_its_folder(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert shape_config(read_shape(path)).hidden_size == 32


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no model's config"),
        ("{}", "KeyError: 'model_type'"),
        ("[1]", "is no model's config"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_shape(path)


def test_an_unknown_shape_is_refused():
    with pytest.raises(FileNotFoundError, match="shape 'gpt-9' is neither one of"):
        read_shape("gpt-9")
    with pytest.raises(ValueError, match="model_type='gpt9' makes no config"):
        shape_config(Shape("gpt9"))
    with pytest.raises(ValueError, match="model_type='vit' makes no causal language model"):
        random_model(shape_config(Shape("vit")), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_come_from_the_seed_alone_in_the_dtype_asked_for(dtype):
    state = torch.get_rng_state()
    one, same, other = (random_model(tiny_config("gptj"), dtype, "cpu", s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in one.parameters()} == {dtype}
    first, second, third = (m.get_input_embeddings().weight for m in (one, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not one.training


@pytest.mark.parametrize("requests", LENGTHS)
def test_made_up_edits_have_the_lengths_asked_for(requests):
    tokenizer, lengths = stand_in_tokenizer(320), LENGTHS[requests]
    edits = made_up_edits(tokenizer, 60, requests)
    assert len({edit.subject for edit in edits}) == 60

    def count(text: str) -> int:
        return len(encode(tokenizer, text, special=False)[0]) if text.strip() else 0

    for edit in edits:
        before, _, after = edit.prompt.partition("{}")
        assert count(before) in lengths.before
        assert count(edit.subject) in lengths.subject
        assert count(after) in lengths.after
        assert count(edit.target_new) in lengths.target
    assert edits == made_up_edits(tokenizer, 60, requests)
    assert edits != made_up_edits(tokenizer, 60, requests, seed=1)


def test_made_up_edits_work_with_a_real_tokenizers_words(tokenizer):
    edits = made_up_edits(tokenizer, 5)
    for edit in edits:
        alone = len(encode(tokenizer, "is", special=False)[0])
        words = edit.subject.split()
        found = encode(tokenizer, f"is {edit.subject}", special=False)[0]
        assert len(found) == alone + len(words)


def test_what_edits_cannot_be_made_of_is_refused():
    with pytest.raises(ValueError, match="requests='wiki' is unknown"):
        made_up_edits(stand_in_tokenizer(320), 1, "wiki")
    with pytest.raises(ValueError, match="too few to draw 1000000 different ones"):
        made_up_edits(stand_in_tokenizer(19), 1_000_000)
    with pytest.raises(ValueError, match="a vocabulary of 10 ids is too small"):
        stand_in_tokenizer(10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"edits": 0}, "edits=0 must be at least 1"),
        ({"repeats": -1}, "repeats=-1 must be at least 1"),
        ({"objectives": ("rome",)}, r"objectives=\('rome',\) must be some of"),
        ({"objectives": ()}, r"objectives=\(\) must be some of"),
        ({"edits": 5, "plain_edits": 6}, "plain_edits=6 is outside 0..5"),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Plan(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_benchmark_runs_all_steps_of_all_edits_and_leaves_the_bits(family):
    subject = make_subject(family)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    edits = made_up_edits(subject.tokenizer, 8)
    plan = Plan(edits=4, batches=2, repeats=2, plain_edits=2)
    found = benchmark(subject, collect_statistics(subject, 200), edits, plan)
    assert [session.objective for session in found.sessions] == ["alphaedit", "memit"]
    for session in found.sessions:
        assert [batch.rows_before for batch in session.batches] == [0, 4]
        for batch in session.batches:
            assert (batch.made, batch.rows, batch.steps) == (4, 4, 3)
            assert len(batch.totals) == 2
            assert {"targets", "keys", "solve"} <= {k for k, v in batch.seconds.items() if v > 0}
        assert {"targets", "keys", "solve", "score"} <= set(session.floor.operations)
        assert session.floor.tokens > 0
    assert found.plain.floor.operations["targets"]["float32"] > 0
    after = subject.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["alphaedit_to_memit"]["median"] > 0
    assert len(values["plain_to_ours"]["runs"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_a_base_kept_elsewhere_is_measured_and_left_with_its_bits(how, tmp_path):
    base = tiny_model("gpt2").requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = str(tmp_path)
        base = cpu_offload(base, CPU) if how == "cpu" else disk_offload(base, folder, CPU)
    before = {name: weight.clone() for name, weight in held_parameters(base)}
    subject = replace(make_subject("gpt2"), model=base)
    plan = Plan(edits=2, objectives=("alphaedit",), plain_edits=1, inference=True)
    found = benchmark(
        subject, collect_statistics(subject), made_up_edits(subject.tokenizer, 2), plan
    )
    assert found.plain is not None
    assert found.plain.total > 0
    assert {forward.model for forward in found.inference} == {"base", "unmerged", "merged"}
    assert keeps_elsewhere(base)
    for name, weight in held_parameters(base):
        assert torch.equal(weight, before[name])


def test_the_plain_way_computes_more_than_ours():
    subject = make_subject()
    edits = made_up_edits(subject.tokenizer, 3)
    plan = Plan(edits=3, objectives=("alphaedit",), plain_edits=3)
    found = benchmark(subject, random_statistics(subject), edits, plan)
    ours, plain = found.sessions[0].floor.operations, found.plain.floor.operations
    for phase in ("targets", "keys", "solve"):
        assert sum(plain[phase].values()) > sum(ours[phase].values())
    assert found.plain.floor.tokens > found.sessions[0].floor.tokens


def test_too_few_edits_are_refused():
    subject = make_subject()
    edits = made_up_edits(subject.tokenizer, 3)
    with pytest.raises(ValueError, match="3 edits are too few for 2 batches of 2; give 4"):
        benchmark(subject, random_statistics(subject), edits, Plan(edits=2, batches=2))


def test_moments_of_few_words_can_be_inverted():
    subject = make_subject("gptj")
    words = stand_in_tokenizer(20)  # fewer than the keys have directions
    given = Subject("few words", subject.model, words, subject.config)
    moments = collect_statistics(given, 200).key_moments
    for moment in moments.moments.values():
        values = torch.linalg.eigvalsh(moment.double())
        assert float(values[0]) > 5e-4 * float(values.mean())


def test_random_statistics_have_the_shapes_of_collected_ones():
    subject = make_subject("gpt2")
    collected, drawn = collect_statistics(subject, 200), random_statistics(subject)
    for layer in (0, 1):
        shapes = [tuple(s.null_space.parts[layer].basis.shape) for s in (collected, drawn)]
        assert shapes[0] == shapes[1] == (96, 48)
        assert drawn.null_space.null_dimension(layer) == 48
        assert drawn.key_moments.moments[layer].shape == (96, 96)
    assert set(collected.seconds) == {"collected", "decomposed"}


def test_forwards_are_timed_for_the_base_each_rank_and_merged():
    subject = make_subject("gpt2")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = forward_times(subject, ranks=(1, 5), tokens=200, passes=1)
    assert [(one.model, one.rank) for one in found] == [
        *(("base", 0), ("unmerged", 1), ("unmerged", 5), ("merged", 5))
    ]
    assert {one.tokens for one in found} == {128}  # the model's positions
    after = subject.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_only_targets_and_keys_of_the_plain_way_grow_with_the_edits():
    floor = Floor({}, {"targets": 1.0, "solve": 1.0}, 0.0)
    run = {"targets": 2.0, "keys": 1.0, "solve": 5.0}
    plain = PlainSession(10, 100, (run,), 0, floor)
    assert plain.scaled == {"targets": 20.0, "keys": 10.0, "solve": 5.0}
    assert plain.scaled_floor == {"targets": 10.0, "solve": 1.0}
    assert plain.total == 35.0


def test_ratios_are_taken_run_by_run_and_leave_contexts_out_against_the_plain_way():
    seconds = {"contexts": 2.0, "targets": 3.0}
    ours = Batch(10, 0, 10, 10, 25.0, seconds, (9.0, 7.0, 3.0), (2.0, 3.0, 2.0), 0)
    memit = Batch(10, 0, 10, 10, 25.0, seconds, (18.0, 7.0, 12.0), (2.0, 3.0, 2.0), 0)
    plain = PlainSession(10, 10, tuple({"targets": float(s)} for s in (14, 24, 3)), 0)
    sessions = (Session("alphaedit", (ours,)), Session("memit", (memit,)))
    found = Findings({}, {}, {}, sessions, plain)
    assert found.alphaedit_to_memit == (0.5, 1.0, 0.25)
    assert found.plain_to_ours == (2.0, 6.0, 3.0)
    values = found.to_json()
    assert values["alphaedit_to_memit"]["median"] == 0.5
    assert values["plain_to_ours"] == {"median": 3.0, "runs": [2.0, 6.0, 3.0]}
    assert ours.bare == (7.0, 4.0, 1.0)
    alone = Findings({}, {}, {}, sessions[:1])
    assert alone.alphaedit_to_memit == alone.plain_to_ours == ()
    assert alone.to_json()["plain_to_ours"] is None
