"""What is asked of a model about one edit: the edit itself and everything that stands around it.

In: texts, from the readers in ``data`` or from a user. Out: :class:`Case`, the one value that the
judge takes, and :class:`Question`, a prompt with the answer that belongs to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alphaedit_peft.edits import Edit, text_tuple
from alphaedit_peft.messages import shown


@dataclass(frozen=True)
class Question:
    """A whole prompt, the answer that belongs to it, and other ways to write that answer.

    Raises:
        TypeError: a prompt or an answer that is not text.
        ValueError: an empty prompt or answer.
    """

    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "aliases", _texts("aliases", self.aliases))
        for name in ("prompt", "answer"):
            _texts(name, [getattr(self, name)])

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases, each once."""
        return tuple(dict.fromkeys((self.answer, *self.aliases)))


@dataclass(frozen=True)
class Case:
    """One edit and what to ask about it; whatever is empty is not measured.

    Args:
        edit: the fact to change; with ``target_true``, new and true answers are compared.
        paraphrases: whole prompts that should show the new target too.
        neighborhood: prompts about other subjects, with the answer that should stay. It is compared
            with ``edit.target_new``, so it should be of the same kind.
        generation: prompts to be continued freely, for fluency and consistency.
        references: texts about things of which the new target is true, for consistency.
        locality: prompts that have nothing to do with the edit, with the answer given by the data.
        same_subject: other facts of the same subject, which should stay.
        portability: what should follow from the edit.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: an empty text.
    """

    edit: Edit
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[Question, ...] = ()
    generation: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    locality: tuple[Question, ...] = ()
    same_subject: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit):
            raise TypeError(
                f"edit={shown(self.edit)} is a {type(self.edit).__name__}; pass an Edit"
            )
        for name in ("paraphrases", "generation", "references"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for name in ("neighborhood", "locality", "same_subject", "portability"):
            object.__setattr__(self, name, _questions(name, getattr(self, name)))

    @property
    def id(self) -> str:
        """The edit's id."""
        return self.edit.id

    @property
    def digest(self) -> str:
        """A hash of everything in the case: equal cases ask the same."""
        content = json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The case as plain JSON values, without what is empty."""
        values = {k: v for k, v in asdict(self).items() if k != "edit" and v}
        return {"edit": self.edit.to_dict(), **values}


@dataclass(frozen=True)
class Suite:
    """Cases, and what else to ask of a model that was edited by them.

    Args:
        cases: at least one, each once.
        unedited: facts that no edit is about.

    Raises:
        TypeError: something else.
        ValueError: no case, or one twice.
    """

    cases: Sequence[Case]
    unedited: Sequence[Question] = ()
    texts: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", _distinct(self.cases))
        object.__setattr__(self, "unedited", _questions("unedited", self.unedited))
        object.__setattr__(self, "texts", _texts("texts", self.texts))

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The cases' edits, to be made before the edited model is judged."""
        return tuple(case.edit for case in self.cases)


def facts_of(cases: Iterable[Case]) -> tuple[Question, ...]:
    """What is true before the cases' edits: their prompts with ``target_true``, where known.

    Of cases that are not edited, these are facts that should stay.
    """
    edits = [case.edit for case in cases]
    return tuple(Question(e.question, e.target_true) for e in edits if e.target_true)


def _distinct(cases: object) -> tuple[Case, ...]:
    if isinstance(cases, (str, Case)) or not isinstance(cases, Iterable):
        raise TypeError(f"cases={shown(cases)} is a {type(cases).__name__}; pass a list of Case")
    found = tuple(cases)
    if not found:
        raise ValueError("cases=[] ask nothing; give at least one")
    digests: set[str] = set()
    for case in found:
        if not isinstance(case, Case):
            raise TypeError(f"cases hold {shown(case)}; each entry must be a Case (see read_cases)")
        if case.digest in digests:
            raise ValueError(f"the case of edit {shown(case.id)} is there twice; give it once")
        digests.add(case.digest)
    return found


def _texts(name: str, values: object) -> tuple[str, ...]:
    texts = text_tuple(name, values)
    for text in texts:
        if not text.strip():
            raise ValueError(f"{name}={shown(text)} is empty; leave the entry out")
    return texts


def _questions(name: str, values: object) -> tuple[Question, ...]:
    if isinstance(values, (str, Question)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={shown(values)} must be a list of Question")
    questions = tuple(values)
    for question in questions:
        if not isinstance(question, Question):
            raise TypeError(f"{name} holds {shown(question)}; each entry must be a Question")
    return questions
