"""Ask a model questions: what it says by itself, and how likely it finds two answers.

In: any causal language model and :class:`Question` values about edits made or to be made. Out: an
:class:`Answer` to each. The text is greedy, up to the full stop; P is the product over the target's
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.bench import Bench
from alphaedit_peft.editing.prompts import Renderer
from alphaedit_peft.fingerprint import bare_model

KINDS = ("edit", "paraphrase", "same subject", "bystander")
LONGEST = 8  # tokens of an answer
AT_ONCE = 64  # prompts


@dataclass(frozen=True)
class Question:
    """A prompt without its answer: the edit's new target, and what is true before the edits.

    ``kind`` is ``edit``, ``paraphrase``, ``same subject`` (another fact about the edit's subject)
    or ``bystander`` (another subject of which the same is true); the last two should stay.
    """

    kind: str
    prompt: str
    new: str
    true: str

    @property
    def should_change(self) -> bool:
        """Whether the edit asks for the new target here."""
        return self.kind in ("edit", "paraphrase")

    @property
    def wanted(self) -> str:
        """The answer that a perfect edit leaves here."""
        return self.new if self.should_change else self.true


@dataclass(frozen=True)
class Answer:
    """What the model says by itself, and P of the new and of the true target."""

    text: str
    probability_new: float
    probability_true: float


def ask(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[Answer]:
    """Ask all questions; the model is left as it was."""
    texts = says(model, tokenizer, [question.prompt for question in questions])
    config, architecture = AlphaEditConfig().resolve(bare_model(model))
    bench = Bench(model, tokenizer, config, architecture, ())
    row = Renderer(tokenizer, config).target_row
    new = bench.score([row(q.prompt, q.new) for q in questions])
    true = bench.score([row(q.prompt, q.true) for q in questions])
    return [
        Answer(text, a.probability, b.probability)
        for text, a, b in zip(texts, new, true, strict=True)
    ]


@torch.no_grad()
def says(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The model's greedy continuation of each prompt, up to the full stop."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=LONGEST,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts: list[str] = []
    for start in range(0, len(prompts), AT_ONCE):
        inputs = tokenizer(
            list(prompts[start : start + AT_ONCE]),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        out = model.generate(**inputs, generation_config=settings)
        new = out[:, inputs["input_ids"].shape[1] :]  # (prompts, new tokens)
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.partition(".")[0].strip() for text in texts]
