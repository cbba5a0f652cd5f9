"""What the reader says of a model, against plain runs, and of models known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, tokens
from alphaedit_peft.editing.batch import score as run_score
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.log_probs import Continuation, Reader, score
from tests.conftest import PEFT_ALONE, tiny_model
from tests.evaluation.models import Constant, Says, Uniform
from tests.test_architecture import VARIANTS
from tests.test_decoding import OTHERS, argmax_loop, built

PAIRS = [
    ("The capital of France is", "Paris"),
    ("Anna Smith plays", "the violin and the piano"),
    ("I", "think"),
    ("The capital of France is", "Rome"),
]


def plainly(model, tokenizer, prompt: str, target: str) -> list[float]:
    """Log-probabilities of a target's tokens, one row at a time, all logits."""
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [log_probs[i - 1, ids[i]].item() for i in range(start, len(ids))]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens_per_batch", [1, 40, 4096])
def test_it_reads_what_the_model_says_in_batches_of_any_size(tokenizer, family, tokens_per_batch):
    model = tiny_model(family)
    for pair, found in zip(
        PAIRS, Reader(model, tokenizer, tokens_per_batch).read(PAIRS), strict=True
    ):
        assert found.log_probs == pytest.approx(plainly(model, tokenizer, *pair), abs=1e-5)


def test_the_head_sees_target_positions_alone_and_nothing_is_left_behind(tokenizer, monkeypatch):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 1000)  # all in one pass
    model = tiny_model("llama").train()
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    reader = Reader(model, tokenizer)
    readings = reader.read(PAIRS)
    handle.remove()
    assert seen == [sum(len(r.target) for r in readings)]
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_equal_pairs_are_run_once_and_answered_each_time(tokenizer):
    reader = Reader(tiny_model("llama"), tokenizer)
    first, second = reader.read([PAIRS[0], PAIRS[0]])
    assert first is second


@PEFT_ALONE
def test_a_peft_model_is_read_like_its_base(tokenizer):
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    before = Reader(base, tokenizer).read(PAIRS)
    adapted = get_peft_model(base, LoraConfig(target_modules=["down_proj"]))
    assert Reader(adapted, tokenizer).read(PAIRS) == before  # a fresh LoRA adds nothing


def test_a_uniform_model_gives_each_token_its_share(tokenizer):
    for found in Reader(Uniform(), tokenizer).read(PAIRS):
        assert found.log_probs == pytest.approx([math.log(1 / 320)] * len(found.target))


def test_a_model_that_says_the_target_is_sure_of_it(tokenizer):
    model = Says(tokenizer, ["The capital of France is Paris"])
    paris, _, _, rome = Reader(model, tokenizer).read(PAIRS)
    assert paris.recalled
    assert paris.mean_probability == pytest.approx(1)
    assert not rome.recalled
    assert rome.mean_probability < paris.mean_probability


def test_a_constant_model_recalls_only_its_token(tokenizer):
    token = tokenizer(" a")["input_ids"][-1]
    found = Reader(Constant(token), tokenizer).read([("I", "a"), ("I", "think")])
    assert [reading.recalled for reading in found] == [True, False]
    assert set(found[1].top) == {token}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("The river", " "), "target ' ' has no token"),
        (("The river", ""), "target '' has no token"),
        (("", "Paris"), "prompt '' has no token"),
        (("the " * 200, "end"), "has 128 positions"),
    ],
)
def test_what_cannot_be_read_is_refused(tokenizer, pair, message):
    with pytest.raises(ValueError, match=message):
        Reader(tiny_model("llama"), tokenizer).read([pair])


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = tiny_model("llama")
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"token id \d+, the model has ids 0..19"):
        Reader(model, tokenizer).read(PAIRS)


def test_a_model_of_nan_is_refused(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        Reader(model, tokenizer).read(PAIRS)


def test_a_slow_tokenizer_and_an_empty_batch_are_refused(tokenizer):
    with pytest.raises(ValueError, match="object gives no character offsets"):
        Reader(Uniform(), object())
    with pytest.raises(ValueError, match="tokens_per_batch=0"):
        Reader(Uniform(), tokenizer, 0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_readings_and_scores_are_of_the_same_bits_in_the_same_batches(tokenizer, family):
    model = tiny_model(family)
    reader = Reader(model, tokenizer, 40)
    rows = [reader.encode(*pair) for pair in PAIRS]
    for found, said in zip(score(model, rows, reader.batches), reader.read(PAIRS), strict=True):
        assert found.log_prob == float(torch.tensor(said.log_probs).sum())
        assert (found.num_tokens, found.greedy) == (len(said.target), said.recalled)
        assert found.probability == math.exp(found.log_prob)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_run_of_edits_scores_by_the_same_code(tokenizer, family):
    model = tiny_model(family)
    config, architecture = AlphaEditConfig(tokens_per_batch=40).resolve(model)
    runner = Runner(model, tokenizer, config, architecture, ())
    rows = [runner.renderer.target_row(*pair) for pair in PAIRS]
    reader = Reader(model, tokenizer, 40)
    asked = [reader.encode(*pair) for pair in PAIRS]
    assert [(row.ids, row.target) for row in rows] == [(row.ids, row.target) for row in asked]
    assert run_score(runner, rows) == score(model, asked, reader.batches)


# what these compute in float32 even when they are in float64
NARROW = {"gptj", "bloom", "gpt_neo", "falcon_h1", "mixtral", "gemma2", "mamba"}


def stepwise(model, row: Continuation) -> list[float]:
    """log P of each token of the target, each by a whole pass over the ids before it."""
    found = []
    for token, last in zip(row.target, row.target_positions, strict=True):
        with torch.no_grad():
            ids = torch.tensor([row.scoring_ids[: last + 1]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        found.append(logits.log_softmax(-1)[token].item())
    return found


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_a_rows_numbers_are_those_it_has_alone_in_any_batch(name, tokenizer, monkeypatch):
    """LongRoPE's tables change above 16 tokens; some targets go over that."""
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 10**6)  # one pass, if it may be
    model = built(name) if name == "mixtral" else built(name).double()
    random = torch.Generator().manual_seed(0)
    lengths = [(1, 1), (5, 3), (14, 1), (14, 3), (14, 4), (15, 5), (16, 1), (16, 2), (17, 3)]
    rows = [
        Continuation(*(tuple(torch.randint(320, (n,), generator=random).tolist()) for n in both))
        for both in lengths
    ]
    found = score(model, rows, Reader(model, tokenizer).batches)
    expected = [stepwise(model, row) for row in rows]
    close = 1e-5 if name in NARROW else 1e-10
    assert [one.log_prob for one in found] == pytest.approx(list(map(sum, expected)), abs=close)


@pytest.mark.parametrize("name", ["phi3/longrope", "llama/longrope"])
def test_greedy_is_said_of_a_target_that_goes_over_the_length_where_tables_change(name, tokenizer):
    model = built(name).double()
    for length in (12, 15, 16, 17):
        ids = torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(length))
        written = argmax_loop(model, ids.tolist(), 4)
        row = Continuation(tuple(written[:length]), tuple(written[length:]))
        assert score(model, [row], Reader(model, tokenizer).batches)[0].greedy


def test_texts_on_either_side_of_that_length_are_read_apart(tokenizer, monkeypatch):
    monkeypatch.setitem(tokens.PASS_COST, "cpu", 10**6)
    reader = Reader(built("phi3/longrope").double(), tokenizer)
    texts = ["I think that", "The river is " * 12, "You are"]
    found = [sorted(set(batch.texts)) for batch in reader.text_batches(texts)]
    assert sorted(found) == [[0, 2], [1]]
