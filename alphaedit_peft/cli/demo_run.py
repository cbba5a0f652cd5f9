"""The demonstration behind ``alphaedit demo``: a pack's whole life on the embedded model, measured.

In: a folder. Out: the pack in that folder, and :class:`Findings`: what the model answered before
the edits, after them, with the pack loaded by PEFT alone, and with the edits merged. Nothing is
assumed: each claim that the demo prints is counted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    EditPack,
    EditReport,
    NullSpace,
    embedded,
    get_alphaedit_model,
    write_edits,
)
from alphaedit_peft.edits import rewrite_edits
from alphaedit_peft.evaluation.generate import greedy
from alphaedit_peft.log_probs import Reader, score
from alphaedit_peft.records import as_records

EDITS = 10
TEXTS = 2500
CLOSE = 1e-4  # largest difference of a probability that counts as the same


@dataclass(frozen=True)
class Findings:
    """What was measured; ``answers`` has one list by state, in the order of ``questions``.

    The states are ``base``, ``edited``, ``plain PEFT`` and ``merged``.
    """

    edits: tuple[Edit, ...]
    questions: tuple[Question, ...]
    answers: Mapping[str, Sequence[Answer]]
    report: EditReport
    pack: EditPack
    restored: bool
    seconds: float

    def right(self, kind: str, state: str) -> tuple[int, int]:
        """How many questions of a kind get the wanted answer in a state, and of how many."""
        pairs = zip(self.questions, self.answers[state], strict=True)
        found = [q.wanted == a.text for q, a in pairs if q.kind == kind]
        return sum(found), len(found)

    def agreement(self, state: str) -> tuple[int, float]:
        """Against the edited model: equal answers, and the largest difference of a probability."""
        pairs = list(zip(self.answers["edited"], self.answers[state], strict=True))
        equal = sum(a.text == b.text for a, b in pairs)
        furthest = max(
            max(
                abs(a.probability_new - b.probability_new),
                abs(a.probability_true - b.probability_true),
            )
            for a, b in pairs
        )
        return equal, furthest

    def same(self, state: str) -> bool:
        """Whether a state answers as the edited model does."""
        equal, furthest = self.agreement(state)
        return equal == len(self.questions) and furthest <= CLOSE

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        asked = []
        for i, question in enumerate(self.questions):
            answers = {state: asdict(found[i]) for state, found in self.answers.items()}
            asked.append({**asdict(question), "wanted": question.wanted, "answers": answers})
        return {
            "restored_bit_for_bit": self.restored,
            "plain_peft_answers_the_same": self.same("plain PEFT"),
            "merged_answers_the_same": self.same("merged"),
            "rank": self.pack.rank,
            "pack_bytes": self.pack.size_bytes,
            "seconds": round(self.seconds, 1),
            "questions": asked,
            "report": self.report.to_json(),
        }


def demonstrate(folder: Path, tell: Callable[[str], None] = lambda text: None) -> Findings:
    """Edit the embedded model and take the edits through everything a pack is for.

    Args:
        folder: gets ``edits.jsonl``, ``null_space/`` and ``pack/``.
        tell: called with a sentence at the beginning of each step.
    """
    begun = time.perf_counter()
    loaded, tokenizer = embedded.load()
    base: Any = loaded
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    edits, questions = exam()
    answers = {}

    tell(f"A null space from {TEXTS:,} of the model's own texts")
    config = AlphaEditConfig()
    null_space = NullSpace.from_texts(
        base, tokenizer, embedded.texts(TEXTS), config, progress=False
    )
    null_space.save_pretrained(folder / "null_space")
    tell(f"{len(questions)} questions before the edits")
    answers["base"] = ask(base, tokenizer, questions)

    tell(f"{len(edits)} edits, the same questions again, and the pack")
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=null_space)
    report = model.edit(edits, progress=False)
    answers["edited"] = ask(model, tokenizer, questions)
    model.save_pretrained(folder / "pack")
    write_edits(edits, folder / "edits.jsonl")

    tell("The adapter unloaded, the pack loaded by PEFT alone, the same questions")
    base = model.unload()
    restored = _equal(original, base.state_dict())
    plain: Any = PeftModel.from_pretrained(base, str(folder / "pack"))
    answers["plain PEFT"] = ask(plain, tokenizer, questions)

    tell("The pack loaded again and merged, the same questions")
    merged = AlphaEditModel.from_pretrained(plain.unload(), folder / "pack").merge_and_unload()
    answers["merged"] = ask(merged, tokenizer, questions)
    pack = EditPack.from_pretrained(folder / "pack")
    seconds = time.perf_counter() - begun
    return Findings(edits, questions, answers, report, pack, restored, seconds)


def exam() -> tuple[tuple[Edit, ...], tuple[Question, ...]]:
    """Edits of ten people, all relations, and the questions that show what they did."""
    records = as_records(embedded.records(), "embedded")
    facts = [edit for record in records for edit in rewrite_edits(record)]
    relations = len(embedded.world().relations)
    edits, questions = [], []
    for number in range(EDITS):
        # the next person, the next relation
        edit = facts[number * relations + number % relations]
        others = [fact for fact in facts if fact.subject == edit.subject and fact is not edit]
        asked = [("edit", edit.question, edit.target_true)]
        asked += [("paraphrase", prompt, edit.target_true) for prompt in edit.paraphrases]
        asked += [("same subject", fact.question, fact.target_true) for fact in others]
        asked += [("bystander", prompt, edit.target_true) for prompt in edit.neighborhood]
        edits.append(edit)
        questions += [Question(k, text, edit.target_new, str(true)) for k, text, true in asked]
    return tuple(edits), tuple(questions)


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


KINDS = ("edit", "paraphrase", "same subject", "bystander")
LONGEST = 8  # tokens of an answer


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
    def wanted(self) -> str:
        """The answer that a perfect edit leaves here."""
        return self.new if self.kind in ("edit", "paraphrase") else self.true


@dataclass(frozen=True)
class Answer:
    """What the model says by itself, and P of the new and of the true target."""

    text: str
    probability_new: float
    probability_true: float


def ask(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[Answer]:
    """Ask all questions; the model is left as it was."""
    reader = Reader(model, tokenizer, AlphaEditConfig().tokens_per_batch)
    texts = greedy(reader, [question.prompt for question in questions], LONGEST)
    new, true = (
        score(model, [reader.encode(q.prompt, target(q)) for q in questions], reader.batches)
        for target in (lambda q: q.new, lambda q: q.true)
    )
    return [
        Answer(text.partition(".")[0].strip(), a.probability, b.probability)
        for text, a, b in zip(texts, new, true, strict=True)
    ]
