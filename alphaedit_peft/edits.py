"""What a user asks for: one fact to change, and the files that such requests come in.

In: a subject, a prompt with one ``{}`` where the subject goes, and the new target; or a file of
them, of this package or of a data set. Out: a frozen, validated :class:`Edit`, the unit that every
other module passes around. Equation: an edit asks
that P(target_new | prompt(subject)) be high (AlphaEdit, section 2.1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from alphaedit_peft.messages import shown
from alphaedit_peft.records import HOW, Record, read_records
from alphaedit_peft.saving import replace_file
from alphaedit_peft.text_files import fault, is_text

SLOT = "{}"
MAX_BYTES = 2**19  # of an edit in a file; twice as many are the limit of a pack's line
MAX_ID = 200
SHOWN = 80  # characters of a value beside others in an error


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
                raise ValueError(f"{name}={shown(text)} is empty; an edit needs a {name}")
        for name, text in (("prompt", self.prompt), *(("anchor", a) for a in self.anchors)):
            if text.count(SLOT) != 1:
                raise ValueError(
                    f"{name}={shown(text, SHOWN)} holds {text.count(SLOT)} times '{{}}'; write it "
                    f"exactly once, where the subject {shown(self.subject, SHOWN)} goes"
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
        """Character range [start, end) of the subject within ``question``; see ``filled``."""
        return filled(self.prompt, self.subject)[1]

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
        unknown = [name for name in values if name not in known]
        missing = sorted({"subject", "prompt", "target_new"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"edit {shown(dict(values), SHOWN)}: missing fields {missing}, unknown fields "
                f"{shown(unknown, SHOWN)}; an edit has {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)


def filled(prompt: str, subject: str) -> tuple[str, tuple[int, int]]:
    """A prompt with the subject in its slot, and the subject's characters [start, end) there.

    White space around a subject belongs to the prompt.
    """
    start = prompt.index(SLOT) + len(subject) - len(subject.lstrip())
    return prompt.replace(SLOT, subject), (start, start + len(subject.strip()))


def as_edits(edits: Iterable[Edit | Mapping[str, Any]]) -> tuple[Edit, ...]:
    """Edits or plain dicts, as a tuple of edits.

    Raises:
        ValueError: no edit at all.
        TypeError: something that is neither an edit nor a mapping.
    """
    if isinstance(edits, (Edit, Mapping, str)):
        raise TypeError(
            f"edits={shown(edits)} is a single {type(edits).__name__}; pass a list of edits"
        )
    found = tuple(_as_edit(edit) for edit in edits)
    if not found:
        raise ValueError("edits=[] is empty; give at least one edit")
    return found


def read_edits(path: str | Path) -> tuple[Edit, ...]:
    """Read edits from a file of this package's records or of a data set's.

    JSON Lines, a JSON list, or a table (CSV) with the columns subject, prompt and target_new; of
    the first layout of ``LAYOUTS`` that its first record fits. Prompts may have the subject written
    out instead of ``{}``.

    Raises:
        DataError: a ValueError that names file and place: no such records, or one that is no edit.
        FileNotFoundError: no such file.
    """
    records = read_records(path)
    if not records:
        raise fault(path, "there is no edit in it", HOW)
    read = LAYOUTS[layout_of(records[0]) or "own"][1]
    edits: list[Edit] = []
    for record in records:
        made = read(record)
        for edit in made if isinstance(made, tuple) else (made,):
            size = len(json.dumps(edit.to_dict(), ensure_ascii=False).encode())
            if size > MAX_BYTES or len(edit.id) > MAX_ID:
                wrong = f"the edit takes {size:,} bytes, its id {len(edit.id):,} characters"
                raise fault(record.where, wrong, f"the limits are {MAX_BYTES:,} and {MAX_ID}")
            edits.append(edit)
    return tuple(edits)


def told(edit: Edit) -> str:
    """An edit in an error: its question and new target, cut short."""
    return f"{shown(edit.question, 60)} -> {shown(edit.target_new, 40)}"


def write_edits(edits: Iterable[Edit], path: str | Path) -> None:
    """Write edits as JSON Lines, the form that :func:`read_edits` reads."""
    lines = [json.dumps(edit.to_dict(), ensure_ascii=False) for edit in edits]
    replace_file(path, "".join(line + "\n" for line in lines))


def layout_of(record: Record) -> str | None:
    """The first of ``LAYOUTS`` that a record looks like."""
    return next((name for name, (fits, _) in LAYOUTS.items() if fits(record)), None)


def own_edit(record: Record) -> Edit:
    """The edit of one of this package's own records; what only a case holds is passed over.

    Raises:
        DataError: a field that is missing, wrong or unknown.
    """
    given = {k: v for k, v in record.values.items() if k not in CASE_FIELDS}
    near = given.get("neighborhood")
    if isinstance(near, (list, tuple)):
        given["neighborhood"] = [e.get("prompt") if isinstance(e, Mapping) else e for e in near]
    subject, prompt = given.get("subject"), given.get("prompt")
    texts = all(isinstance(text, str) and text.strip() for text in (subject, prompt))
    if texts and SLOT not in str(prompt):
        given["prompt"] = record.prompt_with_slot("prompt", str(subject))
    try:
        return Edit.from_dict(given)
    except (TypeError, ValueError) as error:
        raise fault(record.where, str(error)) from error


def rewrite_edits(record: Record) -> tuple[Edit, ...]:
    """The edits of ``requested_rewrite``: one in CounterFact, a list of them in MQuAKE.

    Raises:
        DataError: a field that is missing or wrong.
    """
    field = "requested_rewrite"
    asked = record.records(field) if _is_mquake(record) else (record.record(field),)
    if not asked:
        raise record.error(field, " holds no edit")
    return tuple(_rewrite_edit(record, rewrite) for rewrite in asked)


def _rewrite_edit(record: Record, rewrite: Record) -> Edit:
    again = (rewrite.text("question"),) if rewrite.has("question") else ()  # MQuAKE's
    return _made(
        rewrite,
        subject=rewrite.text("subject"),
        prompt=rewrite.text("prompt"),
        target_new=rewrite.record("target_new").text("str"),
        target_true=rewrite.record("target_true").text("str"),
        paraphrases=record.texts("paraphrase_prompts") or again,
        neighborhood=record.texts("neighborhood_prompts"),
    )


def zsre_edit(record: Record, target: str = "answers") -> Edit:
    """The edit of a record of zsRE, as in MEND's ``zsre_mend_eval.json``.

    Args:
        record: with ``subject``, ``src``, ``rephrase``, ``answers``, ``alt``.
        target: which field holds the new target: ``answers``, the right answer, which a model
            rarely knows (its first entry, as MEMIT and AlphaEdit do), or ``alt``, a wrong one, as
            MEND did; with ``alt``, ``answers`` gives the true target.

    Raises:
        DataError: a field that is missing or wrong.
    """
    subject, answers = record.text("subject"), record.alternatives("answers")
    return _made(
        record,
        subject=subject,
        prompt=record.prompt_with_slot("src", subject),
        target_new=record.text("alt") if target == "alt" else answers[0],
        target_true=answers[0] if target == "alt" else None,
        paraphrases=(record.text("rephrase"),),
    )


def easyedit_edit(record: Record) -> Edit:
    """The edit of a record of KnowEdit or of EasyEdit's own requests.

    Args:
        record: with ``subject``, ``prompt``, ``target_new``; where they are there,
            ``ground_truth`` and ``rephrase_prompt`` or ``rephrase``. Answers may be texts, lists of
            aliases, or lists of such lists; the first is the answer.

    Raises:
        DataError: a field that is missing or wrong.
    """
    subject = record.text("subject")
    prompt = record.text("prompt")
    true = record.alternatives("ground_truth")[0] if record.has("ground_truth") else None
    again = next((f for f in ("rephrase", "rephrase_prompt") if record.has(f)), None)
    return _made(
        record,
        subject=subject,
        prompt=prompt if SLOT in prompt else record.prompt_with_slot("prompt", subject),
        target_new=record.alternatives("target_new")[0],
        target_true=None if true == NO_TRUTH else true,
        paraphrases=record.alternatives(again) if again else (),
    )


def _made(record: Record, **values: Any) -> Edit:
    try:
        return Edit(**values)
    except ValueError as error:
        raise record.error("prompt", f": {error}") from error


def _is_own(record: Record) -> bool:
    given = record.values
    questions = (given.get("locality"), given.get("portability"))
    foreign = _EASYEDIT & set(given) or not isinstance(given.get("target_new"), str)
    foreign = foreign or any(isinstance(asked, Mapping) for asked in questions)
    return set(given) >= _NAMED and not (foreign and not _OWN & set(given))


def _is_mquake(record: Record) -> bool:
    return isinstance(record.values.get("requested_rewrite"), (list, tuple))


NO_TRUTH = "<|endoftext|>"  # what EasyEdit's editor writes where no ground truth was given
CASE_FIELDS = ("generation", "references", "locality", "same_subject", "portability")
_OWN = {"target_true", "paraphrases", "neighborhood", "anchors"}
_EASYEDIT = {"ground_truth", "rephrase_prompt", "rephrase", "locality_prompt", "cond"}
_NAMED = {"subject", "prompt", "target_new"}
# name -> (whether a record looks like it, its edits), the first that fits is taken
LAYOUTS: dict[str, tuple[Callable[[Record], bool], Callable[[Record], Edit | tuple[Edit, ...]]]] = {
    "mquake": (_is_mquake, rewrite_edits),
    "counterfact": (lambda record: "requested_rewrite" in record.values, rewrite_edits),
    "zsre": (lambda record: {"src", "subject", "loc"} <= set(record.values), zsre_edit),
    "own": (_is_own, own_edit),
    "knowedit": (lambda record: set(record.values) >= _NAMED, easyedit_edit),
}


def _as_edit(value: Edit | Mapping[str, Any]) -> Edit:
    if isinstance(value, Edit):
        return value
    if isinstance(value, Mapping):
        return Edit.from_dict(value)
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; an edit is an Edit or a dict")


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; it must be text")
    if not is_text(value):
        raise ValueError(
            f"{name}={shown(value)} holds half a surrogate pair, which is no character; mend it"
        )


def text_tuple(name: str, values: object) -> tuple[str, ...]:
    """Texts as a tuple; raises TypeError for one text, or for what is none."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}={shown(values)} must be a list of texts")
    texts = tuple(values)
    for text in texts:
        _require_text(name, text)
    return texts
