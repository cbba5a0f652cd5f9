"""A tiny model, a tokenizer of sixty words, and texts of them."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.nullspace import KeyMoments

LAYERS = [0, 2]


@pytest.fixture
def model() -> GPT2LMHeadModel:
    shape = {"n_layer": 4, "n_embd": 16, "n_head": 2, "n_inner": 24, "n_positions": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, initializer_range=0.4, **shape))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds BOS (id 1), and has no padding token."""
    words = {"<unk>": 0, "<s>": 1} | {f"w{i}": i + 2 for i in range(60)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.fixture
def texts() -> list[str]:
    """About 1,400 tokens in texts of 1 to 29 words, none longer than the model's positions."""
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(60)}" for _ in range(n % 29 + 1)) for n in range(90)]


@pytest.fixture
def config() -> AlphaEditConfig:
    return AlphaEditConfig(rewrite_layers=LAYERS, tokens_per_batch=128)


@pytest.fixture
def moments(model, tokenizer, texts, config) -> KeyMoments:
    return KeyMoments.collect(model, tokenizer, texts, config, progress=False)
