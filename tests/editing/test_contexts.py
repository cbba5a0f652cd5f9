"""Contexts: seeded, recorded, without side effects."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from alphaedit_peft import AlphaEditConfig
from alphaedit_peft.editing import contexts
from alphaedit_peft.editing.contexts import STARTS, sample_contexts
from tests.conftest import tiny_model
from tests.test_architecture import VARIANTS
from tests.test_decoding import OTHERS, OWN, built, set_all


def one_after_another(model, tokenizer, config) -> tuple[str, ...]:
    """The oracle: torch's own generator, seeded once, and a whole pass of a row for each token."""
    texts = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed)
        for number in range(config.num_contexts):
            ids = tokenizer(STARTS[number % len(STARTS)])["input_ids"]
            for _ in range(config.context_length):
                scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
                scores[tokenizer.eos_token_id] = -torch.inf
                best = scores.topk(5).values[-1]
                chances = scores.masked_fill(scores < best, -torch.inf).softmax(-1)
                ids = [*ids, int(torch.multinomial(chances[None], 1))]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            text = " ".join(text.replace("{", " ").replace("}", " ").split())
            texts.append(text.rstrip(".") + ".")
    return tuple(dict.fromkeys(texts))


def rows_run(model) -> list[int]:
    """How many rows each forward pass has, filled in as they run."""
    found: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: found.append(len(given["input_ids"])), with_kwargs=True
    )
    return found


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


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_every_familys_contexts_are_those_sampled_one_after_another(name, tokenizer):
    model = built(name)
    config = AlphaEditConfig(num_contexts=7, context_length=6, seed=3)
    expected = one_after_another(model, tokenizer, config)
    assert sample_contexts(model, tokenizer, config) == expected
    assert len(expected) == 7


def test_starts_of_equally_many_tokens_run_together_and_unpadded(tokenizer):
    model = tiny_model("llama")
    run = rows_run(model)
    sample_contexts(model, tokenizer, AlphaEditConfig(num_contexts=10, context_length=4))
    lengths = [len(tokenizer(start)["input_ids"]) for start in STARTS]
    sizes = [2 * lengths.count(length) for length in dict.fromkeys(lengths)]
    # twice the cache is held against a whole pass of two rows
    first = [sizes[0], min(2, sizes[0])] * 2 + [sizes[0]] * 2
    assert run == [*first, *(size for size in sizes[1:] for _ in range(4))]
    assert max(sizes) > 2


@pytest.mark.parametrize(("tokens_per_batch", "most_rows"), [(1, 64), (30, 64), (8192, 3)])
def test_contexts_do_not_depend_on_what_they_are_batched_with(
    tokens_per_batch, most_rows, tokenizer, monkeypatch
):
    model = tiny_model("gpt2")
    whole = sample_contexts(model, tokenizer, AlphaEditConfig(num_contexts=20))
    fewer = sample_contexts(model, tokenizer, AlphaEditConfig(num_contexts=3))
    monkeypatch.setattr(contexts, "MOST_ROWS", most_rows)
    run = rows_run(model)
    config = AlphaEditConfig(num_contexts=20, tokens_per_batch=tokens_per_batch)
    assert sample_contexts(model, tokenizer, config) == whole
    assert max(run) == {1: 1, 30: 2, 8192: 3}[tokens_per_batch]
    assert whole[:3] == fewer


def test_none_of_the_models_own_generation_settings_count(tokenizer):
    model, config = tiny_model("llama"), AlphaEditConfig(num_contexts=5, context_length=5)
    expected = one_after_another(model, tokenizer, config)
    assert sample_contexts(model, tokenizer, config) == expected
    for own in OWN:
        model.generation_config = GenerationConfig()
        set_all(model.generation_config, own)
        assert sample_contexts(model, tokenizer, config) == expected, own


def test_contexts_never_end_early_where_eos_is_likeliest(tokenizer):
    model = tiny_model("llama")
    bias = torch.zeros(320)
    bias[tokenizer.eos_token_id] = 50.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    config = AlphaEditConfig(num_contexts=10)
    found = sample_contexts(model, tokenizer, config)
    assert found == one_after_another(model, tokenizer, config)
    assert len(found) == 10


def test_a_vocabulary_padded_beyond_the_tokenizers_is_drawn_from_as_it_is(tokenizer):
    model = tiny_model("llama")
    model.resize_token_embeddings(384, mean_resizing=False)
    config = AlphaEditConfig(num_contexts=7, seed=5)
    expected = one_after_another(model, tokenizer, config)
    assert sample_contexts(model, tokenizer, config) == expected


def test_logits_that_are_not_finite_are_refused_with_the_tokens_before_them(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("I")["input_ids"][0]] = torch.nan
    ids = tokenizer("I")["input_ids"]
    with pytest.raises(ValueError, match=rf"logits for token ids \[{ids[0]}\] are not finite"):
        sample_contexts(model, tokenizer, AlphaEditConfig())
