"""A record of a data set and what a model says to each of its prompts, before and after an edit.

In: a :class:`~alphaedit_peft.evaluation.Case`, and a model where there is one. Out:
:class:`Prompt`, every prompt of the case with what it asks for, and :class:`Answer`, what a model
says to it. The parts are those of the records shown in AlphaEdit's figures 12 (CounterFact) and 13
(zsRE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft.evaluation import Case, Reader
from alphaedit_peft.evaluation.generating import greedy

REQUEST, PARAPHRASE, GENERATION = "request", "paraphrase", "generation"
# part of a record -> what its prompts are there for
PARTS = {
    REQUEST: "The sentence that is taught.",
    PARAPHRASE: "The same fact in other words: these should say the new target too.",
    "neighborhood": "The same relation of other subjects: these should stay as they were.",
    "same_subject": "Other facts of the subject: these should stay as they were.",
    "locality": "Questions about something else: these should stay as they were.",
    "portability": "What follows from the edit.",
    GENERATION: "Beginnings that the model goes on from freely.",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a record.

    Attributes:
        part: a key of ``PARTS``.
        text: the prompt.
        wanted: what should follow it; None where anything may.
        rival: the target that it is compared with: before the edit the true one of what is
            taught, the new target where an answer should stay.
    """

    part: str
    text: str
    wanted: str | None = None
    rival: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt.

    Attributes:
        text: its greedy continuation.
        wanted: probability of what should follow, the geometric mean over its tokens.
        rival: likewise of the target that it is compared with.
    """

    text: str
    wanted: float | None = None
    rival: float | None = None


def prompts_of(case: Case) -> tuple[Prompt, ...]:
    """Every prompt of a case, each once in its part, in the order of ``PARTS``."""
    edit = case.edit
    found = [Prompt(REQUEST, edit.question, edit.target_new, edit.target_true)]
    found += [Prompt(PARAPHRASE, t, edit.target_new, edit.target_true) for t in case.paraphrases]
    for part in ("neighborhood", "same_subject", "locality", "portability"):
        rival = edit.target_new if part == "neighborhood" else None
        found += [Prompt(part, q.prompt, q.answer, rival) for q in getattr(case, part)]
    found += [Prompt(GENERATION, text) for text in case.generation]
    return tuple(dict.fromkeys(found))


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    answer_tokens: int = 8,
    text_tokens: int = 24,
) -> tuple[Answer, ...]:
    """What a model says to each prompt, greedily, and how probable the two targets are.

    Args:
        model: a causal language model with ``generate``.
        tokenizer: its fast tokenizer.
        prompts: from ``prompts_of``.
        answer_tokens: most tokens of an answer.
        text_tokens: most tokens after a beginning that is to be continued freely.

    Raises:
        ValueError: no tokens to write, or a prompt that the model cannot take.
    """
    for name, value in (("answer_tokens", answer_tokens), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} leaves nothing to write; use 1 or more")
    reader = Reader(model, tokenizer)
    free = [p.text for p in prompts if p.part == GENERATION]
    asked = [p.text for p in prompts if p.part != GENERATION]
    texts = dict(zip(free, greedy(reader, free, text_tokens), strict=True))
    answers = dict(zip(asked, greedy(reader, asked, answer_tokens), strict=True))
    pairs = [(p.text, t) for p in prompts for t in (p.wanted, p.rival) if t is not None]
    readings = dict(zip(pairs, reader.read(pairs), strict=True)) if pairs else {}

    def probability(prompt: Prompt, target: str | None) -> float | None:
        return None if target is None else readings[prompt.text, target].mean_probability

    return tuple(
        Answer(
            (texts if prompt.part == GENERATION else answers)[prompt.text],
            probability(prompt, prompt.wanted),
            probability(prompt, prompt.rival),
        )
        for prompt in prompts
    )
