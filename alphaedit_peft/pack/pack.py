"""Edit packs as users see them: a value that saves itself, loads again, and makes new packs.

In: factors, records, target values and settings, or a folder or Hub repository. Out: a frozen
:class:`EditPack`. Its methods call the functions of this package that do the work, all of which
take any :class:`~alphaedit_peft.pack.contents.PackContents`; this class alone knows PEFT, by its
``config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.hub import Destination
from alphaedit_peft.messages import shown
from alphaedit_peft.pack import card
from alphaedit_peft.pack.compress import compress
from alphaedit_peft.pack.contents import PackContents
from alphaedit_peft.pack.export import Export, export
from alphaedit_peft.pack.files import locate, push_pack, read_pack, save_pack
from alphaedit_peft.pack.format import Factors
from alphaedit_peft.pack.join import JoinOptions, join
from alphaedit_peft.pack.remove import remove


@dataclass(frozen=True, eq=False, kw_only=True)
class EditPack(PackContents):
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

    config: AlphaEditConfig
    options: ClassVar = AlphaEditConfig

    def adapter_config(self, factors: Factors) -> dict[str, Any]:
        """The config of a plain LoRA with these factors, as the installed PEFT writes it."""
        rank = next(iter(factors.values())).rank
        return self.config.adapter_config(list(factors), rank, self.fan_in_fan_out)

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
        return read_pack(locate(path_or_repo, revision, token, subfolder), cls)

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
        save_pack(self, folder, dtype)

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
        return push_pack(self, to, texts, commit_message, dtype)

    def summary(self) -> str:
        """A plain-text table: edits, modules, rank, norms, size, base, null space."""
        return card.summary(self)

    def without(self, ids: Iterable[str], *, max_share: float = 0.5) -> EditPack:
        """The pack without some edits; what the others put out on their stored keys stays.

        What a removed edit shares with the others' keys stays too. ``removal_shares`` says how
        much that is; ``AlphaEditModel.remove_edits`` leaves nothing, and needs the model.

        Args:
            ids: ids of edits of this pack.
            max_share: warn where a larger share of an edit stays in force.

        Raises:
            ValueError: an unknown id, one of several edits in a row, or a pack whose rows are not
                projected keys of single edits: MEMIT's, or a compressed one.

        Warns:
            UserWarning: an edit stays in force by more than ``max_share``.
        """
        return remove(self, ids, max_share=max_share).pack

    def removal_shares(self, ids: Iterable[str]) -> dict[str, dict[str, float]]:
        """How much of each edit ``without(ids)`` leaves in force: by edit id, then module.

        It is |Pi a|^2 / |a|^2, with a the edit's row of A and Pi the projection onto the rows that
        stay: 0 where the edit goes entirely, 1 where it stays as it was.

        Raises:
            ValueError: as ``without``.
        """
        return remove(self, ids, max_share=1.0).shares

    @staticmethod
    def join(
        packs: Sequence[EditPack | str | Path],
        *,
        names: Sequence[str] | None = None,
        on_conflict: str = "error",
        key_cosine: float = 0.999,
        ridge: float | None = None,
        ridge_mode: str = "relative",
        norm_guard: float = 2.0,
        layers: str = "same",
    ) -> EditPack:
        """One pack that does what several do, each on its own stored keys.

        Args:
            packs: of one base and one null space, or their folders or Hub ids; batches are
                numbered in this order. One that was edited on top of others comes after them: on
                its keys the joined pack does what the chain did.
            names: of the packs, for messages and ``parents``; None: pack 1, pack 2 ...
            on_conflict: where two packs contradict each other, or have one key for different
                edits: ``error``, or keep the row of the ``first`` or the ``last``.
            key_cosine: rows at least this alike are one key.
            ridge: lambda of the solve; None: 0, exact until ``norm_guard`` acts.
            ridge_mode: ``relative`` to the mean |P k|^2, or ``absolute``.
            norm_guard: |Delta| may be this times as large as that of unrelated packs; while it is
                more, the ridge grows. 0: no bound.
            layers: ``same``: packs must edit the same modules. ``union``: a module that a pack does
                not edit is joined from the others, whose updates this pack's edits then feel, since
                their keys there are unknown.

        Raises:
            TypeError: one pack, or something that is none.
            ValueError: packs of different bases, null spaces, modules or objectives, contradictions
                under ``error``, one id for two edits, or a pack before one that it stands on.

        Warns:
            UserWarning: the norm guard acted, the bases could not be compared, or a pack stands on
                one that is not given; the joined pack stands on that then.
        """
        how = JoinOptions(on_conflict, key_cosine, ridge, ridge_mode, norm_guard, layers)
        return join([_opened(pack) for pack in require_packs(packs)], how, names).pack

    def compress(
        self,
        *,
        rank: int | None = None,
        tolerance: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> EditPack:
        """A smaller pack, whose ``compression`` says what was lost.

        A lower rank mixes the rows: edits are still listed, but can no longer be removed, joined or
        gone on from, and their target values are left out. A dtype alone keeps the rows.

        Args:
            rank: of every module.
            tolerance: the least rank at which |Delta' - Delta|_F <= tolerance |Delta|_F in every
                module, before rounding to ``dtype``.
            dtype: bfloat16, float16 or float32, in which the pack is then saved.

        Raises:
            ValueError: nothing or too much asked for, a rank that is not lower, or a pack that was
                compressed to a lower rank before.
        """
        return compress(self, rank, tolerance, dtype)

    def export(
        self,
        folder: str | Path,
        *,
        format: str = "peft",
        max_rank: int | str | None = None,
        dtype: torch.dtype | None = None,
        all_layers: bool = False,
        num_blocks: int | None = None,
    ) -> Export:
        """Write a LoRA folder without sidecar, for servers.

        Args:
            folder: new or empty, or an earlier export; never a pack.
            format: ``peft``: for PEFT, transformers, vLLM and TGI; ``llama.cpp``: for its
                converter, which wants the factors of GPT-2's ``Conv1D`` transposed.
            max_rank: rows of zeros are added up to this rank; ``"vllm"``: up to the next
                ``max_lora_rank`` that vLLM takes. None: the pack's own rank.
            dtype: of the factors; None: float32, or what the pack was compressed to.
            all_layers: give every block's rewrite module factors, of zeros where nothing was
                edited; TGI ignores the adapter otherwise.
            num_blocks: of the base, for ``all_layers``; None: from the base's fingerprint.

        Returns:
            What was written, with the relative error of rounding to ``dtype``.

        Raises:
            ValueError: a rank over ``max_rank``, an unknown format or dtype, an unknown number of
                blocks, or a pack that stands on others.
            FileExistsError: ``folder`` holds an edit pack, or something else that is no export.
        """
        return export(
            self,
            folder,
            format=format,
            max_rank=max_rank,
            dtype=dtype,
            all_layers=all_layers,
            num_blocks=num_blocks,
        )


def require_packs(packs: Sequence[EditPack | str | Path]) -> list[EditPack | str | Path]:
    """Packs, their folders or repositories; a TypeError for a single one, or for what is none."""
    if isinstance(packs, (str, Path, EditPack)):
        one = "one EditPack" if isinstance(packs, EditPack) else shown(str(packs))
        raise TypeError(f"packs={one} is one pack; pass a list of packs, folders or Hub ids")
    given = list(packs)
    for pack in given:
        if not isinstance(pack, (EditPack, str, Path)):
            raise TypeError(
                f"packs holds {shown(pack)}, a {type(pack).__name__}; pass EditPacks, folders or "
                "Hub ids"
            )
    return given


def _opened(pack: EditPack | str | Path) -> EditPack:
    return pack if isinstance(pack, EditPack) else EditPack.from_pretrained(pack)
