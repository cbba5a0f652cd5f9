"""One line of a pack's journal: which edit was made, into which row of ``lora_A``, and how it went.

In: an :class:`~alphaedit_peft.edits.Edit` and what the run knows about it. Out: a frozen
:class:`EditRecord` and its JSON form, one line of ``alphaedit/edits.jsonl``. Several records may
name one row: keys are causal, so edits that share context and subject prefix share their key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from alphaedit_peft.edits import Edit
from alphaedit_peft.messages import shown
from alphaedit_peft.settings import require_one_of

Role = Literal["own", "protected", "superseded"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class EditRecord:
    """An edit, its row, and its role there.

    Args:
        edit: what was asked for.
        row: the row of ``lora_A`` that holds the edit's projected key.
        role: ``own``: made by this pack; ``protected``: a parent's row, kept from change;
            ``superseded``: a later edit replaced it, its row is no longer protected.
        batch: number of the batch that made it, from 0.
        prefix: prompt text up to and including the subject ("" where unknown); edits with the
            same prefix share a key.
        probability_before: of the new target before its batch, with the edits of earlier batches in
            place, where measured.
        probability_after: of the new target right after its batch, where measured.

    Raises:
        TypeError: an ``edit`` that is no Edit, a ``prefix`` that is no text.
        ValueError: a row, role, batch or probability outside its range.
    """

    edit: Edit
    row: int
    role: Role = "own"
    batch: int = 0
    prefix: str = ""
    probability_before: float | None = None
    probability_after: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit):
            raise TypeError(
                f"edit={shown(self.edit)} is a {type(self.edit).__name__}; pass an Edit"
            )
        if not isinstance(self.prefix, str):
            raise TypeError(f"prefix={shown(self.prefix)} must be text; use '' where it is unknown")
        require_one_of("role", self.role, ROLES)
        for name in ("row", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={shown(value)} must be a whole number from 0 on")
        for name in ("probability_before", "probability_after"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 1):
                raise ValueError(
                    f"{name}={shown(value)} is outside 0..1; use None where it was not measured"
                )

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**vars(self), "edit": self.edit.to_dict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EditRecord:
        """Build a record from ``to_json``'s values.

        Raises:
            ValueError: a missing or unknown field, or a value that :class:`EditRecord` refuses.
            TypeError: a field of the wrong type.
        """
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError(
                f"record has missing fields {sorted(known - set(values))}, unknown fields "
                f"{sorted(set(values) - known)}; it has {sorted(known)}"
            )
        if not isinstance(values["edit"], Mapping):
            raise TypeError(f"edit={shown(values['edit'])} must be a JSON object")
        return cls(**{**values, "edit": Edit.from_dict(values["edit"])})


def asked(edit: Edit) -> str:
    """An edit's filled prompt, word by word: what two edits that contradict each other share."""
    return " ".join(edit.question.split())


def few(ids: Collection[str], most: int = 10) -> str:
    """Ids of edits in their order, the first of them and a count where there are many."""
    shown = sorted(ids)
    more = len(shown) - most
    return f"{shown[:most]} and {more} more" if more > 0 else str(shown)
