"""What an edit's report says of prompts as users type them, with spaces where they may be."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, embedded, get_alphaedit_model
from alphaedit_peft.evaluation import Case, evaluate
from tests.conftest import tiny_model

OTHERS = 8


@pytest.fixture(scope="module")
def facts(weights):
    """The first fact of the embedded world, and other subjects of the same question."""
    records = [record["requested_rewrite"] for record in embedded.records(300)]
    subjects = dict.fromkeys(record["subject"] for record in records)
    subjects.pop(records[0]["subject"])
    return records[0], list(subjects)[:OTHERS]


@pytest.fixture(scope="module")
def space(weights):
    base, tokenizer = embedded.load()
    texts = embedded.texts(800)
    return NullSpace.from_texts(base, tokenizer, texts, AlphaEditConfig(), progress=False)


def trimmed(tokenizer) -> PreTrainedTokenizerFast:
    """The same, with a post-processor that takes spaces off the offsets."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def by_hand(model, tokenizer, prompt: str, target: str) -> float:
    """P(target | prompt) with nothing of the package: two texts, one after the other."""
    ids = tokenizer(prompt).input_ids
    target = target if prompt.endswith(" ") else f" {target}"
    following = tokenizer(target, add_special_tokens=False).input_ids
    logits = model(input_ids=torch.tensor([ids + following])).logits[0].double()
    told = logits[len(ids) - 1 : -1].log_softmax(-1)
    return math.exp(told[range(len(following)), following].sum())


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("around", ["{} ", "{}", "space after the subject"])
def test_the_report_evaluation_and_the_user_see_one_number(facts, space, trim, around):
    fact, others = facts
    base, tokenizer = embedded.load()
    tokenizer = trimmed(tokenizer) if trim else tokenizer
    prompt, subject, target = fact["prompt"], fact["subject"], fact["target_new"]["str"]
    if around.startswith("{}"):
        edit = Edit(subject, around.replace("{}", prompt, 1), target)
    else:
        assert "{} " in prompt
        edit = Edit(f"{subject} ", prompt.replace("{} ", "{}"), target)
    asked = [prompt.replace("{}", other) for other in others]
    model = get_alphaedit_model(
        base, AlphaEditConfig(contexts=["I think."]), tokenizer=tokenizer, null_space=space
    )
    before = [by_hand(model, tokenizer, question, target) for question in asked]
    result = model.edit([edit], progress=False).results[0]
    scores = evaluate(model, tokenizer, [Case(edit)])
    seen = by_hand(model, tokenizer, edit.question, target)
    judged = scores["efficacy_probability"]
    assert result.probability_after == pytest.approx(seen, rel=1e-4)
    tokens = len(tokenizer(target if edit.question[-1] == " " else f" {target}").input_ids)
    tokens -= 0 if trim else 1  # BOS
    assert judged**tokens == pytest.approx(seen, rel=1e-4)  # a geometric mean over the tokens
    assert seen > 0.5 or edit.question.endswith(" ")
    after = [by_hand(model, tokenizer, question, target) for question in asked]
    for then, now in zip(before, after, strict=True):
        assert now < max(3 * then, 1e-4)


class Untouched(torch.nn.Module):
    """Fails where it is run."""

    def forward(self, *args, **kwargs):
        raise AssertionError("it was run")


def test_what_a_tokenizer_cannot_place_is_told_before_anything_is_run(tokenizer):
    base = tiny_model("llama")
    config = AlphaEditConfig(rewrite_layers=[0, 1])
    space = NullSpace.identity({0: 96, 1: 96})
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    base.forward = Untouched().forward
    edits = [Edit("France", "The capital of {} is", "Rome"), Edit("capi", "The {}tal is", "hot")]
    with pytest.raises(ValueError, match=r"subject 'capi' ends within a token in 'The cap"):
        model.edit(edits, progress=False)
    cases = [Case(edits[0]), Case(Edit("France", "{} is", "a" * 200))]
    with pytest.raises(ValueError, match="the model has 128 positions"):
        evaluate(base, tokenizer, cases)
    assert model.edits == []
