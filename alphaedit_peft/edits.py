"""What a user asks for: one fact to change, and its JSON Lines form.

In: a subject, a prompt with one ``{}`` where the subject goes, and the new target. Out: a frozen,
validated :class:`Edit`, the unit that every other module passes around. Equation: an edit asks
that P(target_new | prompt(subject)) be high (AlphaEdit, section 2.1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SLOT = "{}"


@dataclass(frozen=True)
class Edit:
    """One fact to change: the prompt, filled with the subject, shall continue with the target.

    Args:
        subject: the entity the fact is about, as it appears in the prompt.
        prompt: a text with exactly one ``{}``, the place of the subject.
        target_new: the continuation wanted after the edit, with or without its leading space.
        target_true: the continuation before the edit, where known; used for reports only.
        id: a name unique within a pack; a hash of subject, prompt and target where not given.
        paraphrases: whole prompts that should show the edit too; never optimised on.
        neighborhood: whole prompts about other subjects that should not change.
        anchors: prompts with one ``{}`` for the subject; what the model says after them is kept
            while the edit is optimised (the subject's other facts).

    Raises:
        ValueError: an empty field, or a prompt or anchor that does not hold exactly one ``{}``.
        TypeError: a field that is not text.
    """

    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    id: str = ""
    paraphrases: tuple[str, ...] = field(default=())
    neighborhood: tuple[str, ...] = field(default=())
    anchors: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "target_new", "id"):
            _require_text(name, getattr(self, name))
        if self.target_true is not None:
            _require_text("target_true", self.target_true)
        for name in ("paraphrases", "neighborhood", "anchors"):
            object.__setattr__(self, name, text_tuple(name, getattr(self, name)))
        for name, text in (("subject", self.subject), ("target_new", self.target_new)):
            if not text.strip():
                raise ValueError(f"{name}={text!r} is empty; an edit needs a {name}")
        for name, text in (("prompt", self.prompt), *(("anchor", a) for a in self.anchors)):
            if text.count(SLOT) != 1:
                raise ValueError(
                    f"{name}={text!r} holds {text.count(SLOT)} times '{{}}'; write it exactly "
                    f"once, where the subject {self.subject!r} goes"
                )
        if not self.id:
            said = [self.subject, self.prompt, self.target_new]
            digest = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
            object.__setattr__(self, "id", digest[:12])

    @property
    def question(self) -> str:
        """The prompt with the subject in its place; other braces in the text stay as they are."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character range [start, end) of the subject within ``question``."""
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The edit as plain JSON values, without optional fields that are not set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {k: v for k, v in values.items() if v not in (None, ())}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Edit:
        """Build an edit from plain JSON values.

        Raises:
            ValueError: a missing or unknown field, or one that :class:`Edit` refuses.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"subject", "prompt", "target_new"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"edit {dict(values)!r}: missing fields {missing}, unknown fields {unknown}; "
                f"an edit has {sorted(known)}"
            )
        return cls(**values)


def as_edits(edits: Iterable[Edit | Mapping[str, Any]]) -> tuple[Edit, ...]:
    """Edits or plain dicts, as a tuple of edits.

    Raises:
        ValueError: no edit at all.
        TypeError: something that is neither an edit nor a mapping.
    """
    if isinstance(edits, (Edit, Mapping, str)):
        raise TypeError(f"edits={edits!r} is a single {type(edits).__name__}; pass a list of edits")
    found = tuple(_as_edit(edit) for edit in edits)
    if not found:
        raise ValueError("edits=[] is empty; give at least one edit")
    return found


def read_edits(path: str | Path) -> tuple[Edit, ...]:
    """Read edits from a JSON Lines file, one edit a line, blank lines skipped.

    Raises:
        ValueError: a line that is no JSON object or no valid edit; names file and line.
    """
    # str.splitlines would also cut at U+2028 and its like, which JSON strings may hold;
    # "-sig" passes over the byte order mark that some editors put first
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    edits = []
    for number, line in numbered:
        try:
            edits.append(_as_edit(json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: {line.strip()[:40]!r} is no JSON ({error}); write one "
                'edit a line, {"subject": ..., "prompt": "... {} ...", "target_new": ...}'
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not edits:
        raise ValueError(f"{path} holds no edit; write one JSON object a line")
    return tuple(edits)


def write_edits(edits: Iterable[Edit], path: str | Path) -> None:
    """Write edits as JSON Lines, the form that :func:`read_edits` reads."""
    lines = [json.dumps(edit.to_dict(), ensure_ascii=False) for edit in edits]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _as_edit(value: Edit | Mapping[str, Any]) -> Edit:
    if isinstance(value, Edit):
        return value
    if isinstance(value, Mapping):
        return Edit.from_dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}; an edit is an Edit or a dict")


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be text")


def text_tuple(name: str, values: object) -> tuple[str, ...]:
    """Texts as a tuple; raises TypeError for one text, or for what is none."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r} must be a list of texts")
    texts = tuple(values)
    for text in texts:
        _require_text(name, text)
    return texts
