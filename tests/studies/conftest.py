"""A study small enough to be run many times: a tiny random Llama, six cases, both statistics."""

from __future__ import annotations

from random import Random

import pytest

from alphaedit_peft import AlphaEditConfig, Edit
from alphaedit_peft.evaluation import Case, Question, Suite
from alphaedit_peft.studies import Base, Study
from tests.conftest import CORPUS, tiny_model

FACTS = (
    ("France", "The capital of {} is", "Rome", "Paris"),
    ("Marie Curie", "{} was born in", "Paris", "Warsaw"),
    ("Albert Einstein", "{} works as a", "river", "physicist"),
    ("Anna Smith", "the mother tongue of {} is", "French", "English"),
    ("Italy", "The weather of {} is", "right", "fine"),
    ("the mother", "{} plays the", "piano", "violin"),
)
CONFIG = AlphaEditConfig(
    rewrite_layers=[0, 1],
    steps=5,
    contexts=["I think.", "The river is fine."],
    moment_weight=1.0,
    on_conflict="replace",
)


def texts(count: int = 60) -> list[str]:
    """The corpus's words in other orders: more directions than the tiny model's MLP is wide."""
    words = " ".join(CORPUS).split()
    random = Random(0)
    return [" ".join(random.sample(words, 12)) for _ in range(count)]


def make_study(tokenizer) -> Study:
    base = Base.from_texts(tiny_model("llama"), tokenizer, texts(), CONFIG)
    cases = [
        Case(
            Edit(subject, prompt, new, target_true=true, id=subject),
            paraphrases=(f"Therefore {prompt.replace('{}', subject)}",),
            neighborhood=(Question("The river of Spain is", true),),
        )
        for subject, prompt, new, true in FACTS
    ]
    return Study(base, Suite(cases, [Question("we walk along the", "river")], CORPUS[:2]), CONFIG)


@pytest.fixture(scope="session")
def study(tokenizer) -> Study:
    return make_study(tokenizer)
