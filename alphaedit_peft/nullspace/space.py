"""What edits must not disturb, as users see it: key moments, and their null space.

In: a model and texts. Out: :class:`KeyMoments`, the second moments C0 of the keys of every rewrite
layer (paper section 3.2), and :class:`NullSpace`, the projector P of a threshold. Moments are large
(d_in^2 numbers a layer) and stay local; any null space, and MEMIT's inverse, is made from them. A
null space is thin, to be shared: for each layer the thinner of Q, the eigenvectors that P keeps
(P = Q Q^T), and U, those that it removes (P = I - U U^T), some more, and the whole spectrum.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from alphaedit_peft import hooks, parallel, tokens
from alphaedit_peft.architecture import position_switches, resolve
from alphaedit_peft.devices import require_whole
from alphaedit_peft.fingerprint import BaseFingerprint, bare_model, fingerprint, require_same_base
from alphaedit_peft.hub import Destination
from alphaedit_peft.messages import shown
from alphaedit_peft.nullspace.corpus import (
    TokenBatch,
    corpus_label,
    expected_tokens,
    read_texts,
    token_batches,
)
from alphaedit_peft.nullspace.moments import Checkpoint, collect_sums
from alphaedit_peft.nullspace.sharing import About, find_folder, push_null_space
from alphaedit_peft.nullspace.spectrum import (
    STEM,
    LayerSpace,
    LayerSummary,
    check_shapes,
    moment_quadratic,
)
from alphaedit_peft.nullspace.threshold import (
    ADVISED,
    REACH,
    check_reach,
    decompose,
    null_dimension,
    require_in_range,
)
from alphaedit_peft.progress import counting
from alphaedit_peft.safe_files import Field, read_artefact, refusing, versions, write_artefact
from alphaedit_peft.settings import EditOptions

LOGGER = logging.getLogger(__name__)
MOMENTS_STEM = "key_moments"
LAYER = r"0|[1-9]\d{0,4}"  # a block's number as a name
ORIGIN = {
    "tokens": Field(int, 0, 2**62),
    "fingerprint": Field((dict, type(None))),
    "provenance": Field(dict),
}
MOMENTS_FIELDS = {"modules": Field(dict, each=Field(str), key=LAYER), **ORIGIN}
FIELDS = {
    "complement": Field(dict, each=Field(bool), key=LAYER),
    "threshold": Field((int, float), 0, 1e300),
    "threshold_mode": Field(str, high=40),
    **ORIGIN,
}


@dataclass(frozen=True, eq=False)
class KeyMoments:
    """Key moments of the rewrite layers of one model.

    Args:
        moments: layer -> C0, (d_in, d_in), float32: the mean of k k^T over the tokens.
        tokens: how many tokens went in.
        modules: layer -> name of the rewrite module.
        fingerprint: of the base model, up to the last of the layers.
        provenance: corpus, texts read, a hash of the token ids, and versions.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    modules: Mapping[int, str]
    fingerprint: BaseFingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The rewrite layers, ascending."""
        return tuple(sorted(self.moments))

    @classmethod
    @parallel.in_step()
    def collect(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[Any] | str,
        config: EditOptions,
        *,
        max_tokens: int | None = None,
        progress: bool = True,
        resume: str | Path | None = None,
        text_column: str = "text",
    ) -> KeyMoments:
        """Collect the moments of all rewrite layers in one pass that stops at the last one.

        Several processes (``accelerate launch``) share the work, and end with the same moments.

        Args:
            model: the base model; of a PEFT model, its base with adapters off.
            texts: the corpus, with its ``text_column``, in any form that ``read_texts`` takes.
            config: rewrite layers, and ``tokens_per_batch``, which bounds memory.
            max_tokens: stop after this many tokens; at least ten times d_in is advised.
            resume: a file for the sums: written now and then, on Ctrl-C and at the end, and gone
                on from when it exists, to the same bits on the same hardware.

        Raises:
            ValueError: a model that cannot be edited or is split among processes, a threshold that
                its layers cannot have, no tokens, keys that are not finite, or a resume file of
                another run.
        """
        base = bare_model(model)
        require_whole(base)
        full, architecture = resolve(config, base)
        modules = {layer: architecture.rewrite_name(layer) for layer in full.rewrite_layers or ()}
        names = list(modules.values())
        width = max(architecture.width(base, layer) for layer in modules)
        if full.threshold is not None and full.threshold_mode is not None:  # not after hours
            require_in_range(full.threshold, full.threshold_mode, width)
        made_for = fingerprint(base, max(modules), architecture)
        subject = {"fingerprint": made_for.to_json(), "modules": names}
        checkpoint = Checkpoint(Path(resume), subject) if resume else None
        corpus = read_texts(texts, text_column)
        batches = _batches(base, tokenizer, corpus, full.tokens_per_batch, max_tokens)
        held = expected_tokens(texts, tokenizer, text_column) if progress else None
        total = min((n for n in (held, max_tokens) if n is not None), default=None)
        tell = progress and parallel.is_main()
        if tell:
            LOGGER.info("key moments: %s", _plan(len(modules), width, held, max_tokens))
        adapters_off = getattr(model, "disable_adapter", nullcontext)
        counted = counting("key moments", total, "token", shown=progress)
        with adapters_off(), hooks.evaluating(base), counted as bar:
            sums = collect_sums(base, names, batches, checkpoint=checkpoint, bar=bar, tell=tell)
        provenance = {
            "corpus": corpus_label(texts),
            "texts": sums.texts,
            "token_hash": sums.seen,
            "model": full.base_model_name_or_path,
            "versions": versions(),
        }
        moments = {layer: sums.mean(name) for layer, name in modules.items()}
        return cls(moments, sums.tokens, modules, made_for, provenance)

    def null_space(
        self,
        threshold: float | None = None,
        mode: str | None = None,
        config: EditOptions | None = None,
        *,
        reach: float = 10.0,
        progress: bool = True,
    ) -> NullSpace:
        """The null space for a threshold, given here or in a resolved config.

        Args:
            threshold: which eigenvalues count as zero, see ``threshold.null_dimension``.
            mode: absolute, relative, energy or rank.
            config: has both where they are not given.
            reach: how far ``with_threshold`` can go from there, as a factor, either way. The
                artefact holds eigenvectors for all of it: 1.0 makes the thinnest one, whose
                threshold stays.
        """
        if config is not None:
            threshold = config.threshold if threshold is None else threshold
            mode = mode or config.threshold_mode
        if threshold is None or mode is None:
            raise ValueError(
                f"threshold={threshold} and mode={mode!r} leave one open; give both, or a config "
                "that was resolved for the model"
            )
        return NullSpace.from_moments(self, threshold, mode, reach, progress=progress)

    def digest(self) -> str:
        """Sixteen hex digits that identify these moments, for provenance."""
        return self._digest

    @cached_property  # it reads all numbers
    def _digest(self) -> str:
        found = hashlib.sha256()
        for layer in self.layers:
            moment = self.moments[layer].float().cpu().contiguous()
            found.update(f"{layer} {tuple(moment.shape)}".encode())
            found.update(moment.numpy().data)
        return found.hexdigest()[:16]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``key_moments.safetensors`` and ``key_moments.json``; the main process does."""
        tensors = {f"layers.{layer}.moment": self.moments[layer] for layer in self.layers}
        modules = {str(layer): self.modules[layer] for layer in self.layers}
        values = {"tokens": self.tokens, "modules": modules, **_origin(self)}
        write_artefact(save_directory, MOMENTS_STEM, tensors, values)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> KeyMoments:
        """Read what ``save_pretrained`` wrote; a damaged file is a ValueError."""
        tensors, values = _read(save_directory, MOMENTS_STEM, MOMENTS_FIELDS, "modules", "moment")
        return cls({n: tensors[f"layers.{n}.moment"] for n in values["modules"]}, **values)


@dataclass(frozen=True, eq=False)
class NullSpace:
    """Where keys may change without touching preserved knowledge, for each rewrite layer.

    Args:
        parts: layer -> its eigenvectors and spectrum.
        threshold: which eigenvalues count as zero, see ``threshold.null_dimension``.
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
            check_reach(self.parts[layer], layer, self.threshold, self.threshold_mode)

    @classmethod
    def from_texts(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[Any] | str,
        config: EditOptions,
        *,
        max_tokens: int | None = None,
        progress: bool = True,
        resume: str | Path | None = None,
        text_column: str = "text",
    ) -> NullSpace:
        """Collect key moments and keep their null space; arguments as ``KeyMoments.collect``."""
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
        full = resolve(config, bare_model(model))[0]
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
            ValueError: fewer tokens than a layer is wide (fewer than ten times that: a warning), a
                threshold that keeps nothing, or a ``reach`` below 1.
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
        return null_dimension(self._part(layer).values, self.threshold, self.threshold_mode)

    def project(self, layer: int, keys: Tensor) -> Tensor:
        """Projected keys K P.

        Args:
            keys: (n, d_in), any floating dtype, any device.

        Returns:
            (n, d_in) on the keys' device, in float32, or float64 where the keys are.
        """
        return self._fitting(layer, keys).project(keys, self.null_dimension(layer))

    def moment_quadratic(self, layer: int, rows: Tensor) -> Tensor:
        """A C0 A^T, (n, n) in float64, for rows A (n, d_in): exactly, or as an upper bound.

        An update Delta = B A changes the outputs for preserved keys by sqrt(tr(B (A C0 A^T) B^T)),
        as a root mean square. Exact for projected rows where Q is stored. What else lies outside
        the stored eigenvectors counts at the largest eigenvalue not stored, which makes an upper
        bound (in the order of symmetric matrices).
        """
        return moment_quadratic(self._fitting(layer, rows), rows.double())

    def with_threshold(self, threshold: float, mode: str | None = None) -> NullSpace:
        """This null space at another threshold; one beyond its ``reach`` is a ValueError."""
        return replace(self, threshold=threshold, threshold_mode=mode or self.threshold_mode)

    def check_base(self, fingerprint: BaseFingerprint, layers: Sequence[int]) -> None:
        """Refuse layers that are missing, or another base; warn of one that cannot be compared."""
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
        return self._digest

    @cached_property  # it reads all numbers
    def _digest(self) -> str:
        state = json.dumps([self.threshold, self.threshold_mode, self.layers])
        found = hashlib.sha256(state.encode())
        for part in (self.parts[layer] for layer in self.layers):
            found.update(part.values.numpy().tobytes() + part.basis.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``null_space.safetensors`` and ``null_space.json``; the main process does."""
        tensors = {
            f"layers.{layer}.{name}": getattr(part, name)
            for layer, part in self.parts.items()
            for name in ("basis", "values")
        }
        sides = {str(layer): part.complement for layer, part in self.parts.items()}
        mode = {"threshold": self.threshold, "threshold_mode": self.threshold_mode}
        values = {"complement": sides, **mode, **_origin(self)}
        write_artefact(save_directory, STEM, tensors, values)

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
        """Read a null space from a folder or a Hub repository; a damaged file is a ValueError.

        ``fingerprint`` chooses, where there are several, the one that was made for that base (see
        ``push_to_hub(by_fingerprint=True)``); where none fits, the one at the root is read.
        """
        folder = find_folder(
            path_or_repo, fingerprint, revision=revision, token=token, subfolder=subfolder
        )
        tensors, values = _read(folder, STEM, FIELDS, "complement", "basis", "values")
        parts = {
            n: LayerSpace(tensors[f"layers.{n}.basis"], tensors[f"layers.{n}.values"], bool(side))
            for n, side in values.pop("complement").items()
        }
        with refusing(folder / f"{STEM}.safetensors"):
            for layer, part in parts.items():
                part.check(layer)
            return cls(parts, **values)

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
        about = About(self.summary(), self.tokens, self.fingerprint, self.provenance)
        return push_null_space(
            self.save_pretrained, about, to, by_fingerprint=by_fingerprint, message=commit_message
        )

    def _part(self, layer: int) -> LayerSpace:
        if layer not in self.parts:
            raise ValueError(f"layer {layer} has no null space; there are {list(self.layers)}")
        return self.parts[layer]

    def _fitting(self, layer: int, keys: Tensor) -> LayerSpace:
        shape, width = tuple(keys.shape), self.width(layer)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"keys {shape} do not fit layer {layer}; they are (n, {width})")
        return self._part(layer)


def _origin(what: KeyMoments | NullSpace) -> dict[str, Any]:
    """What both artefacts say of where they come from, as plain JSON values."""
    made_for = what.fingerprint.to_json() if what.fingerprint else None
    return {"tokens": what.tokens, "fingerprint": made_for, "provenance": dict(what.provenance)}


def _read(
    folder: str | Path, stem: str, fields: Mapping[str, Field], by_layer: str, *names: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors ``names`` of each layer of the value ``by_layer``, and all values, checked."""

    def fit(shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]) -> None:
        wanted = {f"layers.{layer}.{name}" for layer in values[by_layer] for name in names}
        if set(shapes) != wanted:
            raise ValueError(
                f"{shown(sorted(set(shapes) ^ wanted))} are in this file or in the JSON beside it, "
                "but not in both, so they do not belong together"
            )
        for layer in values[by_layer]:
            check_shapes(int(layer), *(shapes[f"layers.{layer}.{name}"] for name in names))

    tensors, values = read_artefact(folder, stem, fields, fit)
    values[by_layer] = {int(layer): value for layer, value in values[by_layer].items()}
    found = values["fingerprint"]
    with refusing(Path(folder) / f"{stem}.json"):
        values["fingerprint"] = None if found is None else BaseFingerprint.from_json(found)
    return tensors, values


def _batches(
    base: Any, tokenizer: Any, corpus: Iterable[str], most: int, max_tokens: int | None
) -> Iterator[TokenBatch]:
    """The corpus in batches of ``most`` tokens, as the model takes them."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(
            f"max_tokens={max_tokens} leaves no token to collect; give at least 1, better ten "
            "times d_in, or None for the whole corpus"
        )
    return token_batches(
        corpus,
        tokenizer,
        window=min(tokens.positions_of(base) or most, most),
        tokens_per_batch=most,
        max_tokens=max_tokens,
        switches=position_switches(base.config),
    )


def _plan(layers: int, width: int, held: int | None, max_tokens: int | None) -> str:
    """How many tokens a pass takes, and how many are enough for this model."""
    least, advised = f"{width:,}", f"{ADVISED * width:,}"
    need = f"{layers} layer{'s' * (layers > 1)} of d_in {width:,} need{'s' * (layers == 1)}"
    told = f"{need} {least} tokens at least, better {advised}; "
    if held is None:
        told += "how many these texts hold is not known"
    else:
        told += f"these texts hold about {held:,}"
    if max_tokens is not None and (held is None or held > max_tokens):
        told += f", of which {max_tokens:,} are taken (max_tokens)"
    taken = min((n for n in (held, max_tokens) if n is not None), default=None)
    if taken is not None and taken < ADVISED * width:
        told += ": too few" if taken < width else ": enough, but few"
    return told
