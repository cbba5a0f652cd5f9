"""The second moment of a model's keys over a corpus: C0 = K0^T K0 / tokens, (d_in, d_in) a layer.

In: a model and texts. Out: :class:`KeyMoments`, the full statistics for every rewrite layer. They
are large (d_in^2 numbers a layer) and stay local: any threshold's null space can be made from
them, and MEMIT's inverse needs them. The thin, shareable artefact is
:class:`~alphaedit_peft.nullspace.space.NullSpace`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from alphaedit_peft import hooks, parallel
from alphaedit_peft.artefact import ORIGIN, Types, read_artefact, versions, write_artefact
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import require_whole
from alphaedit_peft.fingerprint import BaseFingerprint, bare_model, fingerprint
from alphaedit_peft.nullspace.collect import Checkpoint, Sums, collect_sums
from alphaedit_peft.nullspace.corpus import TokenBatch, corpus_label, read_texts, token_batches

if TYPE_CHECKING:
    from alphaedit_peft.nullspace.space import NullSpace

STEM = "key_moments"
FIELDS: dict[str, Types] = {"modules": dict, **ORIGIN}


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
    def collect(
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
    ) -> KeyMoments:
        """Collect the moments of all rewrite layers in one pass that stops at the last one.

        Several processes (``accelerate launch``) share the work, and end with the same moments.

        Args:
            model: the base model; of a PEFT model, its base with adapters off.
            tokenizer: of the model.
            texts: the corpus, in any form that ``corpus.read_texts`` takes.
            config: rewrite layers, and ``tokens_per_batch``, which bounds memory.
            max_tokens: stop after this many tokens; at least ten times d_in is advised.
            progress: whether to show a progress bar on stderr.
            resume: a file for the sums: written now and then, on Ctrl-C and at the end, and gone
                on from when it exists. On the same hardware this ends in the same bits as an
                uninterrupted pass.
            text_column: which column of a dataset holds the text.

        Raises:
            ValueError: a model that cannot be edited or is split among processes, no tokens, keys
                that are not finite, or a resume file of another run.
            OtherProcessError: another of several processes failed.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(
                f"max_tokens={max_tokens} leaves no token to collect; give at least 1, better ten "
                "times d_in, or None for the whole corpus"
            )
        base = bare_model(model)
        require_whole(base)
        full, architecture = config.resolve(base)
        modules = {layer: architecture.rewrite_name(layer) for layer in full.rewrite_layers or ()}
        made_for = fingerprint(base, max(modules), architecture)
        subject = {"fingerprint": made_for.to_json(), "modules": list(modules.values())}
        corpus = read_texts(texts, text_column)
        hidden = not (progress and parallel.is_main())
        adapters_off = getattr(model, "disable_adapter", nullcontext)
        bar = tqdm(total=max_tokens, unit="tok", desc="key moments", disable=hidden)
        with adapters_off(), hooks.evaluating(base), bar:
            sums = collect_sums(
                base,
                list(modules.values()),
                _batches(base, tokenizer, corpus, full, max_tokens),
                checkpoint=Checkpoint(Path(resume), subject) if resume else None,
                bar=bar,
            )
        return cls(
            moments={layer: _mean(sums, name) for layer, name in modules.items()},
            tokens=sums.tokens,
            modules=modules,
            fingerprint=made_for,
            provenance=_provenance(corpus_label(texts), sums, full.base_model_name_or_path),
        )

    def null_space(
        self,
        threshold: float | None = None,
        mode: str | None = None,
        config: AlphaEditConfig | None = None,
        *,
        reach: float = 10.0,
        progress: bool = True,
    ) -> NullSpace:
        """The null space for a threshold, given here or in a resolved config.

        Args:
            threshold: which eigenvalues count as zero, see ``algebra.null_dimension``.
            mode: absolute, relative, energy or rank.
            config: has both where they are not given.
            reach: how far ``with_threshold`` can go from there, as a factor, either way. The
                artefact holds eigenvectors for all of it: 1.0 makes the thinnest one, whose
                threshold stays.
            progress: whether to show a bar on stderr where it takes long.

        Raises:
            ValueError: no threshold or mode in either place, and as ``NullSpace.from_moments``.
        """
        from alphaedit_peft.nullspace.space import NullSpace

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
        found = hashlib.sha256()
        for layer in self.layers:
            moment = self.moments[layer].float().cpu().contiguous()
            found.update(f"{layer} {tuple(moment.shape)}".encode())
            found.update(moment.numpy().data)
        return found.hexdigest()[:16]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``key_moments.safetensors`` and ``key_moments.json``; the main process does."""
        if not parallel.is_main():
            return
        tensors = {f"layers.{layer}.moment": self.moments[layer] for layer in self.layers}
        values = {
            "tokens": self.tokens,
            "modules": {str(layer): self.modules[layer] for layer in self.layers},
            "fingerprint": self.fingerprint.to_json() if self.fingerprint else None,
            "provenance": dict(self.provenance),
        }
        write_artefact(save_directory, STEM, tensors, values)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> KeyMoments:
        """Read what ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: a missing file.
            ValueError: a damaged file.
        """
        tensors, values = read_artefact(save_directory, STEM, FIELDS)
        modules = {int(layer): name for layer, name in values["modules"].items()}
        wanted = {f"layers.{layer}.moment" for layer in modules}
        if set(tensors) != wanted:
            raise ValueError(
                f"{save_directory} holds {sorted(tensors)}, but its JSON names {sorted(wanted)}; "
                "the files do not belong together"
            )
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1]:
                raise ValueError(f"{name} {tuple(tensor.shape)} is not square; the file is damaged")
        found = values["fingerprint"]
        return cls(
            moments={layer: tensors[f"layers.{layer}.moment"] for layer in modules},
            tokens=values["tokens"],
            modules=modules,
            fingerprint=BaseFingerprint.from_json(found) if found else None,
            provenance=values["provenance"],
        )


def _batches(
    base: Any, tokenizer: Any, texts: Iterable[str], config: AlphaEditConfig, limit: int | None
) -> Iterator[TokenBatch]:
    """Batches within the model's positions and the config's budget."""
    most = config.tokens_per_batch
    positions = getattr(base.config, "max_position_embeddings", None) or most
    window = min(positions, most)
    return token_batches(texts, tokenizer, window=window, tokens_per_batch=most, max_tokens=limit)


def _provenance(corpus: str, sums: Sums, model_name: str | None) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "texts": sums.texts,
        "token_hash": sums.seen,
        "model": model_name,
        "versions": versions(),
    }


def _mean(sums: Sums, name: str) -> Tensor:
    if not sums.tokens:
        raise ValueError("the corpus holds 0 tokens; give texts that are not blank")
    return (sums.matrices[name] / sums.tokens).cpu()
