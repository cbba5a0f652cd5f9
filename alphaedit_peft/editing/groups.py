"""Which edits contradict each other, and which share a key and so must be solved as one.

In: new edits and the records already in place. Out: the edits to make, those set aside with the
reason, the records they replace, and groups of edits with one key each. Keys are causal: two
prompts that agree up to the subject's end have the same key, whatever follows, so their target
value is optimised once, for all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.edits import Edit, told
from alphaedit_peft.messages import shown
from alphaedit_peft.pack.edit_record import asked


@dataclass(frozen=True)
class Sorted:
    """Edits to make, others with the reason, and new id -> id of the edit in place it replaces."""

    to_make: tuple[Edit, ...]
    set_aside: tuple[tuple[Edit, str], ...]
    replaced: dict[str, str]


@dataclass(frozen=True)
class Group:
    """Edits that share one key: one row of ``lora_A`` and one target value.

    ``members`` are new edits first, then edits of earlier batches that are carried into this row;
    ``old_rows`` are the rows those had, which leave the protected set.
    """

    members: tuple[EditRows, ...]
    old_rows: tuple[int, ...] = ()

    @property
    def leader(self) -> EditRows:
        """The edit whose prompts give the group's key."""
        return self.members[0]


def sort_out(new: Sequence[Edit], existing: Sequence[Edit], on_conflict: str) -> Sorted:
    """Set aside repetitions and settle contradictions by the configured rule.

    An edit that stands already is set aside. Two edits of one prompt and subject with different
    targets contradict each other: ``error`` refuses all, ``keep`` sets the later one aside,
    ``replace`` sets the earlier one aside or, if it is in place, takes it out. How much white space
    is between the words of a prompt makes no difference.

    Raises:
        ValueError: a contradiction under ``error``, or one id for two different edits.
    """
    standing = {asked(edit): edit for edit in existing}
    in_place = {edit.id for edit in existing}
    by_id = {edit.id: edit for edit in existing}
    aside: list[tuple[Edit, str]] = []
    replaced: dict[str, str] = {}
    chosen: dict[str, Edit] = {}
    for edit in new:
        other = by_id.setdefault(edit.id, edit)
        if (other.question, other.target_new) != (edit.question, edit.target_new):
            raise ValueError(
                f"id {edit.id!r} names two edits: {told(other)} and {told(edit)}; give each its "
                "own id"
            )
        question = asked(edit)
        earlier = standing.get(question)
        if earlier is not None:
            reason = _reason_aside(earlier, edit, on_conflict, earlier.id in in_place)
            if reason:
                aside.append((edit, reason))
                continue
            if earlier.id in chosen:
                aside.append((chosen.pop(earlier.id), f"edit {edit.id} replaces it"))
                if earlier.id in replaced:
                    replaced[edit.id] = replaced.pop(earlier.id)
            else:
                replaced[edit.id] = earlier.id
        standing[question] = chosen[edit.id] = edit
    return Sorted(tuple(chosen.values()), tuple(aside), replaced)


def group_by_key(
    prefixes: Sequence[str],
    keys: Tensor,
    standing: Sequence[tuple[int, str]],
    old_keys: Tensor,
    bound: float,
) -> list[tuple[list[int], list[int]]]:
    """Group edits whose prompts agree up to the subject, or whose projected keys are alike.

    Args:
        prefixes: of the edits to make.
        keys: (len(prefixes), d_in), their projected keys at the first rewrite layer.
        standing: (row, prefix) of the edits in place, several of which may share a row.
        old_keys: (n, d_in), projected keys in place, by row.
        bound: cosine from which two keys count as one.

    Returns:
        For each group, in order of its first edit: indices of its edits, rows in place it takes
        over.
    """
    unit, old_unit = (normalize(some.double(), dim=1) for some in (keys, old_keys))
    alike, alike_old = unit @ unit.T >= bound, unit @ old_unit.T >= bound
    members: dict[int, list[int]] = {}
    head: list[int] = []
    by_prefix: dict[str, int] = {}
    by_key = {i: found[0] for i, found in _pairs(alike.tril(-1)).items()}
    for i, prefix in enumerate(prefixes):
        first = min(by_prefix.setdefault(prefix, i), by_key.get(i, i))
        head.append(i if first == i else head[first])
        members.setdefault(head[i], []).append(i)
    old = _pairs(alike_old)
    groups = []
    for indices in members.values():
        rows = {row for i in indices for row in old.get(i, ())}
        texts = {prefixes[i] for i in indices}
        taken = {row for row, prefix in standing if row in rows or prefix in texts}
        groups.append((indices, sorted(taken)))
    return groups


def _pairs(alike: Tensor) -> dict[int, list[int]]:
    """Row -> columns, ascending, in which a table (rows, columns) is true."""
    found: dict[int, list[int]] = {}
    for row, column in alike.nonzero().tolist():
        found.setdefault(row, []).append(column)
    return found


def _reason_aside(earlier: Edit, edit: Edit, on_conflict: str, in_place: bool) -> str:
    """Why an edit of an earlier one's question is set aside; empty where it replaces that one."""
    if earlier.target_new.strip() == edit.target_new.strip():
        return f"edit {earlier.id} already says so, {'in place' if in_place else 'in this list'}"
    if on_conflict == "error":
        raise ValueError(
            f"edits {earlier.id} and {edit.id} contradict each other: {told(earlier)} and "
            f"{shown(edit.target_new, 40)}; drop one, or set "
            "on_conflict='replace' (the later one wins) or 'keep' (the earlier one stays)"
        )
    if on_conflict == "keep":
        return f"it contradicts edit {earlier.id}, which is kept (on_conflict='keep')"
    return ""
