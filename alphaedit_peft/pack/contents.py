"""A pack as a value: what its fields mean, whether they fit each other, and what follows from them.

In: factors by module (Delta = B A, one row of A for each key), records, target values z, and where
they come from. Out: a frozen :class:`PackContents`, which nothing here reads or writes: its folder
is ``files``' work, and each thing that is done to packs has a module of its own.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from alphaedit_peft import safe_files, solve_metric
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.messages import shown
from alphaedit_peft.pack import format
from alphaedit_peft.pack.edit_record import EditRecord
from alphaedit_peft.pack.format import ADAPTER_MODEL, EDITS, TARGETS, Factors, tensor_bytes
from alphaedit_peft.safe_files import Field, check_fields, finite, shown_name
from alphaedit_peft.settings import EditOptions

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in format.DTYPES}
_ERRORS = Field(dict, each=Field((int, float), 0, 1e300))
_COMPRESSION = {
    "rows": Field(int, 0, 2**31),
    "mixed": Field(bool),
    "dtype": Field(str),
    "delta_errors": _ERRORS,
    "output_errors": _ERRORS,
}


@dataclass(frozen=True)
class Compression:
    """What was done to a pack's factors, and what it cost, by module.

    Args:
        rows: keys of the pack that was compressed; the records' rows count among them.
        mixed: whether the rows of A are no longer keys of edits, but mixtures of them.
        dtype: float32, bfloat16 or float16: what the factors were rounded to.
        delta_errors: |Delta' - Delta|_F / |Delta|_F.
        output_errors: likewise of the outputs on the keys of the edits in force.
    """

    rows: int
    mixed: bool
    dtype: str
    delta_errors: dict[str, float]
    output_errors: dict[str, float]

    def __post_init__(self) -> None:
        check_fields(vars(self), _COMPRESSION, "compression")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"compression dtype={shown(self.dtype)} is none of {[*DTYPE_NAMES]}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Compression:
        """Read back ``to_json``'s values; a ValueError for other fields or types of them."""
        return cls(**check_fields(values, _COMPRESSION, "compression"))

    def __str__(self) -> str:
        """What was done, and what it cost at most, in a line."""
        how = f"from {self.rows} rows, " if self.mixed else ""
        delta, outputs = (
            max(errors.values(), default=0.0) for errors in (self.delta_errors, self.output_errors)
        )
        return f"{how}{self.dtype}; Delta off by {delta:.2g}, the edits' outputs by {outputs:.2g}"


@dataclass(frozen=True, eq=False, kw_only=True)
class PackContents(ABC):
    """The fields of a pack, as :class:`~alphaedit_peft.pack.EditPack` describes them.

    ``dataclasses.replace`` and the functions of this package keep the class they are given.
    """

    options: ClassVar[type[EditOptions]]  # the class of ``config``
    factors: dict[str, LowRankDelta]
    config: EditOptions
    records: tuple[EditRecord, ...] = ()
    targets: Tensor | None = None
    contexts: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    base: BaseFingerprint | None = None
    null_space: dict[str, Any] | None = None
    versions: dict[str, Any] = field(default_factory=partial(safe_files.versions, "peft"))
    parents: tuple[dict[str, Any], ...] = ()
    compression: Compression | None = None
    decisions: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        ordered = {name: self.factors[name] for name in sorted(self.factors, key=format.by_block)}
        object.__setattr__(self, "factors", ordered)
        for name in ("records", "contexts", "parents", "decisions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_tensors(self.factors, self.targets)
        _check_records(self.records, self.compression, self.rank)
        if not all(isinstance(text, str) for text in self.contexts):
            raise ValueError(f"contexts={shown(self.contexts)} must be texts")
        for name in ("parents", "decisions"):
            if not all(isinstance(value, Mapping) for value in getattr(self, name)):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be dicts")

    @abstractmethod
    def adapter_config(self, factors: Factors) -> dict[str, Any]:
        """PEFT's config of a plain LoRA with these factors: scaling 1, full module names."""

    @property
    def rank(self) -> int:
        """Number of rows n: one for each group of edits that share a key."""
        return next(iter(self.factors.values())).rank

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the edited modules, lowest block first."""
        return tuple(self.factors)

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers of the edited modules, ascending."""
        numbers = (re.search(r"\.(\d+)\.", name) for name in self.factors)
        return tuple(sorted(int(found[1]) for found in numbers if found))

    @property
    def edits(self) -> list[Edit]:
        """The edits that this pack makes (role own), in order."""
        return [record.edit for record in self.records if record.role == "own"]

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of the batches the records come from, ascending."""
        return tuple(sorted({record.batch for record in self.records}))

    def active_rows(self) -> tuple[int, ...]:
        """Rows that an own or protected edit refers to, ascending: the protected set."""
        return tuple(sorted({r.row for r in self.records if r.role != "superseded"}))

    @property
    def rows_are_keys(self) -> bool:
        """Whether the edits were made with rows of A that are their projected keys."""
        return solve_metric.kind(self.config.objective).rows_are_keys

    @property
    def mixed(self) -> bool:
        """Whether compression mixed the rows of A, so that none is a single edit's any more."""
        return self.compression is not None and self.compression.mixed

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the pack comes from, as plain JSON values.

        Its ``base`` (fingerprint), ``null_space`` (or MEMIT's key moments), ``versions`` of
        libraries, ``parents`` and ``contexts``.
        """
        return {
            "base": None if self.base is None else self.base.to_json(),
            "null_space": None if self.null_space is None else dict(self.null_space),
            "versions": dict(self.versions),
            "parents": [dict(parent) for parent in self.parents],
            "contexts": list(self.contexts),
        }

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the factors in memory; loading gives float32 whatever the file holds."""
        return next(iter(self.factors.values())).A.dtype

    @property
    def saved_dtype(self) -> torch.dtype:
        """dtype in which the factors are saved: float32, or what they were compressed to."""
        return torch.float32 if self.compression is None else DTYPE_NAMES[self.compression.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the factors and target values, as they are in memory."""
        tensors = [t for delta in self.factors.values() for t in (delta.A, delta.B)]
        tensors += [] if self.targets is None else [self.targets]
        return sum(tensor.nbytes for tensor in tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under PEFT's key names; an empty pack has one zero row, as LoRA needs."""
        return format.lora_state(self.factors)

    def digest(self) -> str:
        """SHA-256 over factors (in float32), records and target values: what two packs share."""
        files = content_files(self, torch.float32)
        found = hashlib.sha256()
        for name in (ADAPTER_MODEL, EDITS, TARGETS):
            found.update(hashlib.sha256(files.get(name, b"")).digest())
        return found.hexdigest()


Pack = TypeVar("Pack", bound=PackContents)


def require_rows(compression: Compression | None, what: str) -> None:
    """Raise a ValueError where rows are mixtures of edits, for ``what``: "remove edits from it"."""
    if compression is not None and compression.mixed:
        raise ValueError(
            f"this pack was compressed from {compression.rows} rows to a lower rank, so its edits "
            f"can no longer be told apart and one cannot {what}; do it with the pack it was made "
            "from, and compress again"
        )


def require_projected(pack: PackContents, what: str, remedy: str) -> None:
    """Raise a ValueError where rows do not tell what edits put out on their keys, as MEMIT's."""
    if not pack.rows_are_keys:
        raise ValueError(
            f"this pack was made with objective={pack.config.objective!r}, whose rows are not "
            f"projected keys, so its edits cannot be {what}; {remedy}"
        )


def content_files(pack: PackContents, dtype: torch.dtype) -> dict[str, bytes]:
    """The files of the factors, in ``dtype``, the records, and the target values in float32."""
    files = {
        ADAPTER_MODEL: tensor_bytes(pack.state_dict(), ADAPTER_MODEL, dtype),
        EDITS: format.json_lines_bytes([record.to_json() for record in pack.records], EDITS),
    }
    if pack.targets is not None:
        files[TARGETS] = tensor_bytes({"z": pack.targets}, TARGETS, torch.float32)
    return files


def check_targets(factors: Factors, shape: tuple[int, ...]) -> None:
    """Refuse target values z of another shape than (n, d_model), n rows of every module."""
    for name, delta in factors.items():
        wanted = (delta.rank, delta.B.shape[0])
        if shape != wanted:
            raise ValueError(f"targets {shape} do not fit {shown_name(name)}: {wanted} needed")


def _check_tensors(factors: Factors, targets: Tensor | None) -> None:
    if not factors:
        raise ValueError("factors={} names no module; give each edited module its factors")
    ranks = {name: delta.rank for name, delta in factors.items()}
    if len(set(ranks.values())) > 1:
        raise ValueError(f"ranks {ranks} differ; every module has one row for each key")
    for name, delta in factors.items():
        for side, tensor in (("A", delta.A), ("B", delta.B)):
            if not tensor.is_floating_point() or not finite(tensor):
                raise ValueError(f"{side} of {name} ({tensor.dtype}) must be finite floats")
    if targets is None:
        return
    check_targets(factors, tuple(targets.shape))
    if targets.dtype != torch.float32 or not finite(targets):
        raise ValueError(f"targets ({targets.dtype}) must be finite float32")


def _check_records(
    records: Iterable[EditRecord], compression: Compression | None, rank: int
) -> None:
    if compression is not None:
        rows = compression.rows  # what records count among: more than the rank once mixed
        if rows <= rank if compression.mixed else rows != rank:
            raise ValueError(f"compression rows={rows} does not fit a pack of rank {rank}")
        rank = rows
    outside = sorted({record.row for record in records if record.row >= rank})
    if outside:
        raise ValueError(f"rows {outside} of the records are outside the factors' {rank} rows")
    own = Counter(record.edit.id for record in records if record.role == "own")
    twice = sorted(name for name, count in own.items() if count > 1)
    if twice:
        raise ValueError(f"edit ids {twice} occur twice; give each edit an id of its own")
