"""Perplexity and divergence on texts, against plain runs and known models."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

from alphaedit_peft.evaluation import Reader, text_divergence, text_perplexity
from tests.conftest import CORPUS, tiny_model
from tests.evaluation.models import Constant, Uniform


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(tokenizer):
    found = text_perplexity(Reader(Uniform(), tokenizer), CORPUS)
    assert (found.value, found.low, found.high) == pytest.approx((320, 320, 320), rel=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [10, 4096])
def test_perplexity_is_that_of_all_tokens_together(tokenizer, tokens_per_batch):
    model = tiny_model("llama")
    total, count = 0.0, 0
    for text in CORPUS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = text_perplexity(Reader(model, tokenizer, tokens_per_batch), CORPUS)
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.low < found.value < found.high
    assert found.n == len(CORPUS)


def test_long_texts_are_cut_at_the_models_last_position(tokenizer):
    found = text_perplexity(Reader(tiny_model("gpt2"), tokenizer), ["the river " * 200])
    assert math.isfinite(found.value)


def test_a_model_has_not_drifted_from_itself(tokenizer):
    model = tiny_model("llama")
    assert text_divergence(Reader(model, tokenizer), model, CORPUS).value == 0


def test_divergence_from_uniform_to_certain_by_hand(tokenizer):
    now, before = Reader(Constant(3), tokenizer), Uniform()
    log_sum = math.log(math.exp(50) + 319)
    by_hand = -math.log(320) - ((50 - log_sum) + 319 * (0 - log_sum)) / 320
    assert text_divergence(now, before, CORPUS).value == pytest.approx(by_hand, rel=1e-4)


def test_what_switches_the_edits_off_serves_as_the_model_before(tokenizer):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    own, foreign = model.lm_head.weight.data, other.lm_head.weight.data

    @contextmanager
    def off():
        model.lm_head.weight.data = foreign
        yield
        model.lm_head.weight.data = own

    found = text_divergence(Reader(model, tokenizer), off, CORPUS)
    with off():
        swapped = tiny_model("llama")
        swapped.lm_head.weight.data = foreign
    assert found == text_divergence(Reader(model, tokenizer), swapped, CORPUS)
    assert found.value > 0


def test_models_of_different_vocabulary_are_not_compared(tokenizer):
    with pytest.raises(ValueError, match="300 and 320 token ids"):
        text_divergence(Reader(Uniform(320), tokenizer), Uniform(300), CORPUS)


def test_one_text_is_no_list_of_texts(tokenizer):
    with pytest.raises(TypeError, match="texts='the river' is one text"):
        text_perplexity(Reader(Uniform(), tokenizer), "the river")


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_texts_that_foretell_nothing_are_refused(tokenizer, texts):
    with pytest.raises(ValueError, match=f"{len(texts)} texts hold no token"):
        text_perplexity(Reader(Uniform(), tokenizer), texts)
