"""Free continuations: greedy ones, sampled ones, seeds, limits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from alphaedit_peft.evaluation.generate import Sampling, greedy, sampled
from alphaedit_peft.log_probs import Reader
from tests.conftest import tiny_model
from tests.evaluation.models import Constant
from tests.test_decoding import OWN, argmax_loop, set_all

PROMPTS = ["The capital of France is", "I think", "Anna Smith plays the", "You are"]


@pytest.fixture
def reader(tokenizer) -> Reader:
    return Reader(tiny_model("llama"), tokenizer)


def test_greedy_takes_the_argmax_each_time(reader, tokenizer):
    for prompt, text in zip(PROMPTS, greedy(reader, PROMPTS, 6), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        written = argmax_loop(reader.model, ids, 6, {tokenizer.eos_token_id})
        assert text == tokenizer.decode(written[len(ids) :], skip_special_tokens=True)


def test_a_sample_depends_on_seed_and_name_but_not_on_its_batch(reader):
    named = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    together = sampled(reader, named, 16, Sampling(seed=1))
    alone = [sampled(reader, [entry], 16, Sampling(seed=1))[0] for entry in named]
    assert together == alone == sampled(reader, named[::-1], 16, Sampling(seed=1))[::-1]
    assert together != sampled(reader, named, 16, Sampling(seed=2))
    twice = sampled(reader, [("a", "I think"), ("b", "I think")], 16, Sampling())
    assert twice[0] != twice[1]
    assert all(text.startswith(prompt) for text, prompt in zip(together, PROMPTS, strict=True))


def test_of_one_token_to_choose_from_the_sample_is_greedy(tokenizer):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    tokenizer_without_end = Reader(model, tokenizer)
    said = greedy(tokenizer_without_end, ["I think"], 10)[0]
    length = len(tokenizer("I think")["input_ids"]) + 10
    (text,) = sampled(tokenizer_without_end, [("a", "I think")], length, Sampling(top_k=1))
    if tokenizer.eos_token_id not in tokenizer(said)["input_ids"]:
        assert text.startswith("I think" + said)


def test_samples_come_as_often_as_they_are_likely(reader, tokenizer):
    prompt = "I think"
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        best = reader.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(3)
    expected = best.values.softmax(0).tolist()
    named = [(str(i), prompt) for i in range(400)]
    found = Counter(sampled(reader, named, len(ids) + 1, Sampling(top_k=3)))
    for token, share in zip(best.indices.tolist(), expected, strict=True):
        text = tokenizer.decode([*ids, token], skip_special_tokens=True)
        assert found[text] / 400 == pytest.approx(share, abs=0.08)


def test_samples_go_on_to_their_full_length(reader, tokenizer):
    for text in sampled(reader, [("a", "I think"), ("b", "You are")], 40, Sampling(top_k=300)):
        assert "</s>" not in text
        assert len(tokenizer(text)["input_ids"]) >= 20


def test_the_models_own_ways_of_generating_do_not_matter(reader):
    named = [(prompt, prompt) for prompt in PROMPTS[:2]]

    def written() -> tuple[list[str], list[str]]:
        return greedy(reader, PROMPTS[:2], 6), sampled(reader, named, 12, Sampling())

    expected = written()
    for own in OWN:
        given = reader.model.generation_config = GenerationConfig(eos_token_id=1)
        set_all(given, own)
        before = given.to_json_string()
        assert written() == expected, own
        assert reader.model.generation_config is given
        assert given.to_json_string() == before


@pytest.mark.parametrize("end", [5, [7, 5], None])
def test_a_text_ends_where_the_model_says_or_else_the_tokenizer(end, tokenizer):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = end
    ends = {1} if end is None else {5}
    bias = torch.zeros(320)
    bias[5 if end else 1] = 9.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    for prompt, text in zip(PROMPTS, greedy(Reader(model, tokenizer), PROMPTS, 12), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        written = argmax_loop(model, ids, 12, ends | set(end if isinstance(end, list) else ()))
        assert text == tokenizer.decode(written[len(ids) :], skip_special_tokens=True)


def test_any_model_that_gives_logits_can_write(tokenizer):
    ids = tokenizer(" is")["input_ids"]
    assert greedy(Reader(Constant(ids[0]), tokenizer), ["I"], 3) == [" is is is"]


def test_what_cannot_go_on_is_refused(reader):
    with pytest.raises(ValueError, match="leave no room for new ones in 3"):
        sampled(reader, [("a", "The capital of France is Paris")], 3, Sampling())
    with pytest.raises(ValueError, match="texts of 500 tokens"):
        sampled(reader, [("a", "I")], 500, Sampling())
    with pytest.raises(ValueError, match="share a name"):
        sampled(reader, [("a", "I"), ("a", "You")], 20, Sampling())
    with pytest.raises(ValueError, match="prompt '' has no token"):
        greedy(reader, [""], 3)
    with pytest.raises(ValueError, match="top_k=0"):
        Sampling(top_k=0)


def test_nothing_to_go_on_from_gives_nothing(reader):
    assert greedy(reader, [], 3) == []
    assert sampled(reader, [], 30, Sampling()) == []
