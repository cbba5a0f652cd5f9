"""An edit pack as a value: the factors of the edits, and all that is needed to go on from them.

In: factors by module (Delta = B A, one row of A for each key), records, target values z. Out: a
frozen :class:`EditPack` that saves itself as a standard LoRA folder with a sidecar, and loads
again with the same bits.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.artefact import replace_folder
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.hub import Destination
from alphaedit_peft.pack import card
from alphaedit_peft.pack.checks import check_parts
from alphaedit_peft.pack.compress import DTYPE_NAMES, Compression
from alphaedit_peft.pack.files import locate, pack_files, read_fields, read_steadily
from alphaedit_peft.pack.format import ADAPTER_MODEL, CARD, EDITS, FILES, TARGETS, refuse
from alphaedit_peft.pack.hub import push_pack
from alphaedit_peft.pack.lora import by_block, lora_state
from alphaedit_peft.pack.operations import PackOperations
from alphaedit_peft.pack.record import EditRecord


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part in an edit, those that are installed."""
    found = {}
    for name in ("alphaedit_peft", "peft", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class EditPack(PackOperations):
    """Edits of one base model, as a LoRA whose rows are their projected keys.

    Args:
        factors: by full module name: A (n, d_in) and B (d_out, n), the same n for all; n may be 0.
        records: the edits, in the order they were made.
        targets: z by row, (n, d_model), float32; None where they were not kept.
        config: the settings the edits were made with.
        contexts: texts that were put before the prompts, sampled or given.
        fan_in_fan_out: whether the base keeps these weights as (d_in, d_out), as ``Conv1D`` does.
        base: fingerprint of the base model; None where unknown.
        null_space: where the projector came from, or MEMIT's key moments: digest, tokens,
            threshold, mode.
        versions: of the libraries that made the edits.
        parents: what this pack was made from, where it was not edited directly.
        compression: what was lost, where the factors were made smaller; None where they were not.
        decisions: settings that were decided by measurement, each a dict of name, value, reason.

    ``provenance`` gives base, null space, versions, parents and contexts together, as JSON values.

    Raises:
        ValueError: parts that do not fit each other, or values that are not finite.
    """

    factors: dict[str, LowRankDelta]
    config: AlphaEditConfig
    records: tuple[EditRecord, ...] = ()
    targets: Tensor | None = None
    contexts: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    base: BaseFingerprint | None = None
    null_space: dict[str, Any] | None = None
    versions: dict[str, Any] = field(default_factory=library_versions)
    parents: tuple[dict[str, Any], ...] = ()
    compression: Compression | None = None
    decisions: tuple[dict[str, str], ...] = ()

    def __post_init__(self) -> None:
        ordered = {name: self.factors[name] for name in sorted(self.factors, key=by_block)}
        object.__setattr__(self, "factors", ordered)
        for name in ("records", "contexts", "parents", "decisions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_parts(self)

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
    def size_bytes(self) -> int:
        """Bytes of the factors and target values, as they are in memory."""
        tensors = [t for delta in self.factors.values() for t in (delta.A, delta.B)]
        tensors += [] if self.targets is None else [self.targets]
        return sum(tensor.nbytes for tensor in tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under PEFT's key names; an empty pack has one zero row, as LoRA needs."""
        return lora_state(self.factors)

    def digest(self) -> str:
        """SHA-256 over factors (in float32), records and target values: what two packs share."""
        files = pack_files(self, torch.float32)
        found = hashlib.sha256()
        for name in (ADAPTER_MODEL, EDITS, TARGETS):
            found.update(hashlib.sha256(files.get(name, b"")).digest())
        return found.hexdigest()

    def summary(self) -> str:
        """A plain-text table: edits, modules, rank, norms, size, base, null space."""
        return card.summary(self)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the pack as a folder, in one step: readers see the old folder or the new one.

        Args:
            folder: new, empty, a pack or another adapter; files that are not the pack's stay.
            dtype: of the factors on disk; float32 keeps going on bit-equal, bfloat16 and float16
                halve the size and round. None: float32, or what the pack was compressed to.

        Raises:
            PackError: a value that the dtype or JSON cannot hold, or a file over its limit.
            FileExistsError: ``folder`` is a file.
            OSError: the disk is full, or a right is missing; what was there before is untouched.
        """
        if dtype is None:
            dtype = DTYPE_NAMES[self.compression.dtype] if self.compression else torch.float32
        files = pack_files(self, dtype)
        replace_folder(folder, files | {CARD: card.card(self).encode("utf-8")}, owned=FILES)

    def push_to_hub(  # noqa: PLR0913
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        subfolder: str | None = None,
        texts: bool = True,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload the pack in one commit, and return the commit's or pull request's address.

        ``texts=False`` leaves the edits' texts out of the card. The rest and what is raised: as
        ``Destination`` and ``push_folder`` in :mod:`alphaedit_peft.hub`.
        """
        to = Destination(repo_id, private, token, revision, create_pr, subfolder)
        return push_pack(self, to, texts=texts, commit_message=commit_message, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> EditPack:
        """Read a pack from a folder or a Hub repository; the factors come in float32.

        Raises:
            FileNotFoundError: no such folder, or one without sidecar: a plain LoRA.
            PackError: a file that is damaged or does not fit the others.
        """
        return read_steadily(locate(path_or_repo, revision, token, subfolder), cls._read)

    @classmethod
    def _read(cls, folder: Path) -> EditPack:
        fields = read_fields(folder)
        try:
            return cls(**fields)
        except ValueError as error:
            refuse(folder, str(error))
