"""Contexts: seeded, recorded, without side effects."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from alphaedit_peft import AlphaEditConfig
from alphaedit_peft.editing.contexts import STARTS, sample_contexts
from tests.conftest import tiny_model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_same_seed_same_contexts_and_no_trace(family, tokenizer):
    model = tiny_model(family).train()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = sample_contexts(model, tokenizer, AlphaEditConfig(seed=3))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert first == sample_contexts(model, tokenizer, AlphaEditConfig(seed=3))
    assert first != sample_contexts(model, tokenizer, AlphaEditConfig(seed=4))


def test_contexts_are_sentences_without_slots_or_specials(tokenizer):
    config = AlphaEditConfig(num_contexts=7)
    contexts = sample_contexts(tiny_model("gpt2"), tokenizer, config)
    assert len(contexts) == len(set(contexts)) == 7
    for i, text in enumerate(contexts):
        assert text.startswith(STARTS[i % len(STARTS)])
        assert text.endswith(".")
        assert not set("{}\n") & set(text)
        assert "<s>" not in text


def test_given_contexts_are_taken_as_they_are(tokenizer):
    config = AlphaEditConfig(contexts=["In short,", "Well."])
    assert sample_contexts(None, tokenizer, config) == ("In short,", "Well.")
    assert sample_contexts(None, tokenizer, AlphaEditConfig(contexts=[])) == ()


def test_a_tokenizer_that_adds_eos_does_not_end_the_text_before_it_begins(tokenizer):
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    closing = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    model, config = tiny_model("gpt2"), AlphaEditConfig(seed=3)
    assert closing("The")["input_ids"][-1] == 1
    assert sample_contexts(model, closing, config) == sample_contexts(model, tokenizer, config)


def test_on_the_cpu_no_other_generator_is_touched(tokenizer, monkeypatch):
    def refuse(*_):
        raise AssertionError("seeded")

    model = tiny_model("gpt2")
    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    assert sample_contexts(model, tokenizer, AlphaEditConfig())
