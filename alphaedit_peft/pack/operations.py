"""What can be done with packs from their files alone, as methods of a pack.

In: packs, without any model. Out: other packs, or a folder for servers. The work is done in
``removing``, ``joining``, ``compressing`` and ``exporting``; :class:`~alphaedit_peft.pack.EditPack`
inherits this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from alphaedit_peft.pack.compress import compress
from alphaedit_peft.pack.export import Export, export
from alphaedit_peft.pack.join import join
from alphaedit_peft.pack.remove import remove

if TYPE_CHECKING:
    from alphaedit_peft.pack.pack import EditPack


class PackOperations:
    """The half of :class:`~alphaedit_peft.pack.EditPack` that makes new packs of old ones."""

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
        return remove(cast("EditPack", self), ids, max_share=max_share).pack

    def removal_shares(self, ids: Iterable[str]) -> dict[str, dict[str, float]]:
        """How much of each edit ``without(ids)`` leaves in force: by edit id, then module.

        It is |Pi a|^2 / |a|^2, with a the edit's row of A and Pi the projection onto the rows that
        stay: 0 where the edit goes entirely, 1 where it stays as it was.

        Raises:
            ValueError: as ``without``.
        """
        return remove(cast("EditPack", self), ids, max_share=1.0).shares

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
        return join(
            packs,
            names=names,
            on_conflict=on_conflict,
            key_cosine=key_cosine,
            ridge=ridge,
            ridge_mode=ridge_mode,
            norm_guard=norm_guard,
            layers=layers,
        ).pack

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
        return compress(cast("EditPack", self), rank=rank, tolerance=tolerance, dtype=dtype)

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
            cast("EditPack", self),
            folder,
            format=format,
            max_rank=max_rank,
            dtype=dtype,
            all_layers=all_layers,
            num_blocks=num_blocks,
        )
