"""The null space of preserved knowledge, as a value: the projector P of the paper's section 3.2.

In: key moments C0 = U diag(values) U^T and a threshold. Out: :class:`NullSpace`, which projects
keys, K P. For each layer it holds the thinner of Q, the eigenvectors that P keeps (P = Q Q^T), and
U, those that it removes (P = I - U U^T), with the whole spectrum, and enough further eigenvectors
to move the threshold by a factor of ten either way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.artefact import ORIGIN, Types
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.fingerprint import BaseFingerprint, bare_model, require_same_base
from alphaedit_peft.hub import Destination
from alphaedit_peft.nullspace.moments import KeyMoments
from alphaedit_peft.nullspace.sharing import find_folder, push_null_space
from alphaedit_peft.nullspace.spectrum import (
    REACH,
    LayerSpace,
    LayerSummary,
    decompose,
    moment_quadratic,
    read_parts,
    write_parts,
)

FIELDS: dict[str, Types] = {"threshold": (int, float), "threshold_mode": str, **ORIGIN}


@dataclass(frozen=True, eq=False)
class NullSpace:
    """Where keys may change without touching preserved knowledge, for each rewrite layer.

    Args:
        parts: layer -> its eigenvectors and spectrum.
        threshold: which eigenvalues count as zero, see ``algebra.null_dimension``.
        threshold_mode: absolute, relative, energy or rank.
        tokens: how many tokens the moments were collected over.
        fingerprint: of the base model; None is for any model.
        provenance: as in :class:`KeyMoments`.

    Raises:
        ValueError: a threshold that keeps no direction of a layer, or needs eigenvectors that are
            not stored.
    """

    parts: Mapping[int, LayerSpace]
    threshold: float
    threshold_mode: str
    tokens: int
    fingerprint: BaseFingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.layers:
            self.parts[layer].check_reach(layer, self.threshold, self.threshold_mode)

    @classmethod
    def from_texts(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[Any] | str,
        config: AlphaEditConfig,
        *,
        max_tokens: int | None = None,
        progress: bool = True,
        resume: str | Path | None = None,
        text_column: str = "text",
    ) -> NullSpace:
        """Collect key moments and keep their null space; arguments as ``KeyMoments.collect``.

        Raises:
            ValueError: as ``KeyMoments.collect`` and ``from_moments``.
        """
        moments = KeyMoments.collect(
            model,
            tokenizer,
            texts,
            config,
            max_tokens=max_tokens,
            progress=progress,
            resume=resume,
            text_column=text_column,
        )
        full = config.resolve(bare_model(model))[0]
        return moments.null_space(config=full, progress=progress)

    @classmethod
    def from_moments(
        cls,
        moments: KeyMoments,
        threshold: float,
        mode: str,
        reach: float = REACH,
        *,
        progress: bool = False,
    ) -> NullSpace:
        """The null space of key moments, its threshold within ``reach``; on a GPU if there is one.

        Raises:
            ValueError: fewer tokens than a layer is wide, a threshold that keeps nothing, or a
                ``reach`` below 1.

        Warns:
            UserWarning: fewer than ten tokens for each direction.
        """
        parts = decompose(moments.moments, moments.tokens, (threshold, mode, reach), progress)
        return cls(parts, threshold, mode, moments.tokens, moments.fingerprint, moments.provenance)

    @classmethod
    def identity(
        cls, widths: Mapping[int, int], fingerprint: BaseFingerprint | None = None
    ) -> NullSpace:
        """P = I for layers of these widths: nothing is preserved, nothing is removed."""
        parts = {layer: LayerSpace.identity(width) for layer, width in widths.items()}
        return cls(parts, 0.0, "rank", 0, fingerprint, {"corpus": "none (identity)"})

    @property
    def layers(self) -> tuple[int, ...]:
        """The rewrite layers, ascending."""
        return tuple(sorted(self.parts))

    @property
    def spectra(self) -> dict[int, Tensor]:
        """Layer -> all eigenvalues of its moment, (d_in,), ascending."""
        return {layer: self.parts[layer].values for layer in self.layers}

    def width(self, layer: int) -> int:
        """d_in of a layer."""
        return len(self._part(layer).values)

    def null_dimension(self, layer: int) -> int:
        """How many directions of a layer P keeps."""
        return algebra.null_dimension(self._part(layer).values, self.threshold, self.threshold_mode)

    def project(self, layer: int, keys: Tensor) -> Tensor:
        """Projected keys K P.

        Args:
            layer: one of ``layers``.
            keys: (n, d_in), any floating dtype, any device.

        Returns:
            (n, d_in) on the keys' device, in float32, or float64 where the keys are.

        Raises:
            ValueError: a layer without a null space, or keys of another width.
        """
        return self._part(layer).project(self._checked(layer, keys), self.null_dimension(layer))

    def moment_quadratic(self, layer: int, rows: Tensor) -> Tensor:
        """A C0 A^T, (n, n) in float64, for rows A (n, d_in): exactly, or as an upper bound.

        An update Delta = B A changes the outputs for preserved keys by sqrt(tr(B (A C0 A^T) B^T)),
        as a root mean square. Exact for projected rows where Q is stored. What else lies outside
        the stored eigenvectors counts at the largest eigenvalue not stored, which makes an upper
        bound (in the order of symmetric matrices).

        Raises:
            ValueError: as ``project``.
        """
        return moment_quadratic(self._part(layer), self._checked(layer, rows).double())

    def with_threshold(self, threshold: float, mode: str | None = None) -> NullSpace:
        """This null space at another threshold, within the ``reach`` it was made with.

        Raises:
            ValueError: a threshold beyond the stored eigenvectors; ``KeyMoments`` has them all.
        """
        return replace(self, threshold=threshold, threshold_mode=mode or self.threshold_mode)

    def check_base(self, fingerprint: BaseFingerprint, layers: Sequence[int]) -> None:
        """Check that this null space is of that base and has those layers.

        Raises:
            ValueError: missing layers, or another model.

        Warns:
            UserWarning: a base whose weights could not be compared.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise ValueError(
                f"this null space was made for layers {list(self.layers)}, the config wants "
                f"{sorted(layers)}: {missing} are missing; make one for these layers"
            )
        if self.fingerprint is not None:
            name = self.provenance.get("model")
            require_same_base(self.fingerprint, fingerprint, f"this null space (of {name})")

    def summary(self) -> list[LayerSummary]:
        """For each layer: width, directions kept, largest eigenvalue, and the threshold."""
        state = (self.threshold, self.threshold_mode)
        return [
            LayerSummary(n, len(values), self.null_dimension(n), float(values[-1]), *state)
            for n, values in self.spectra.items()
        ]

    def digest(self) -> str:
        """Sixteen hex digits that identify this projector, for provenance."""
        state = json.dumps([self.threshold, self.threshold_mode, self.layers])
        parts = (self.parts[layer].content() for layer in self.layers)
        return hashlib.sha256(state.encode() + b"".join(parts)).hexdigest()[:16]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``null_space.safetensors`` and ``null_space.json``."""
        values = {name: getattr(self, name) for name in FIELDS}
        values["fingerprint"] = self.fingerprint.to_json() if self.fingerprint else None
        write_parts(save_directory, self.parts, values)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        fingerprint: BaseFingerprint | None = None,
    ) -> NullSpace:
        """Read a null space from a folder or a Hub repository.

        ``fingerprint`` chooses, where there are several, the one that was made for that base (see
        ``push_to_hub(by_fingerprint=True)``); where none fits, the one at the root is read.

        Raises:
            FileNotFoundError: neither a folder nor a repository that may be read, or no null space.
            ValueError: a damaged file, or several that fit.
        """
        folder = find_folder(
            path_or_repo, fingerprint, revision=revision, token=token, subfolder=subfolder
        )
        parts, values = read_parts(folder, FIELDS)
        found = values.pop("fingerprint")
        made_for = BaseFingerprint.from_json(found) if found else None
        return cls(parts, fingerprint=made_for, **values)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        subfolder: str | None = None,
        by_fingerprint: bool = False,
    ) -> str:
        """Upload it with a README in one commit, and return the commit's or PR's address.

        ``by_fingerprint`` puts it into the folder named by its base's fingerprint, where
        ``config.null_space = repo_id`` finds it among others. The rest and what is raised: as
        ``Destination`` and ``push_folder`` in :mod:`alphaedit_peft.hub`.
        """
        to = Destination(repo_id, private, token, revision, create_pr, subfolder)
        return push_null_space(
            self, to, by_fingerprint=by_fingerprint, commit_message=commit_message
        )

    def _part(self, layer: int) -> LayerSpace:
        if layer not in self.parts:
            raise ValueError(f"layer {layer} has no null space; there are {list(self.layers)}")
        return self.parts[layer]

    def _checked(self, layer: int, keys: Tensor) -> Tensor:
        if keys.ndim != 2 or keys.shape[1] != self.width(layer):
            raise ValueError(
                f"keys {tuple(keys.shape)} do not fit layer {layer}; they are "
                f"(n, {self.width(layer)})"
            )
        return keys
