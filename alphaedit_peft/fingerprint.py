"""Tell whether two base models are the same one, however they were loaded.

In: a causal language model, bare or wrapped by PEFT. Out: a :class:`BaseFingerprint`, small enough
for JSON: the shape its config states, and hashes over a sample of the input embeddings and of the
blocks up to the last rewrite layer. Values are rounded to bfloat16 first, so a float32 checkpoint
and its bfloat16 load agree (float16 agrees for values it holds exactly). Take it of the unmerged
base: merged edits are other weights.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaedit_peft.architecture import Architecture, mlp_width
from alphaedit_peft.devices import held_parameters
from alphaedit_peft.messages import shown
from alphaedit_peft.safe_files import Field, check_fields
from alphaedit_peft.tokens import text_config

SAMPLES = 64
_STAGE = 8  # hex digits of the digest for the embeddings, and for each block
_FIELDS = {
    "shape": Field(dict, high=20, each=Field((str, int, type(None)), high=2**48)),
    "digest": Field((str, type(None))),
    "last_layer": Field(int, 0, 2**16),
}


@dataclass(frozen=True)
class BaseFingerprint:
    """What identifies a base model.

    Args:
        shape: model_type, layers, hidden, intermediate, heads and vocab, from its config.
        digest: eight hex digits for the input embeddings, then eight for each block up to
            ``last_layer``; None where the weights cannot be read (quantised or offloaded).
        last_layer: the last block that the digest covers.
    """

    shape: dict[str, Any]
    digest: str | None
    last_layer: int

    @property
    def verifiable(self) -> bool:
        """Whether the weights could be read."""
        return self.digest is not None

    def matches(self, other: BaseFingerprint) -> bool | None:
        """Whether both are of one base; None where the weights of one could not be read.

        Fingerprints with other ``last_layer`` are compared over the blocks that both cover.
        """
        if self.shape != other.shape:
            return False
        if self.digest is None or other.digest is None:
            return None
        return self._first_difference(other) is None

    def describe_mismatch(self, other: BaseFingerprint) -> str:
        """A clause that says how ``other`` differs, such as ``hidden is 512 here, 768 there``."""
        names = sorted(set(self.shape) | set(other.shape))
        pairs = [(name, self.shape.get(name), other.shape.get(name)) for name in names]
        differing = [f"{name} is {a} here, {b} there" for name, a, b in pairs if a != b]
        if differing:
            return ", ".join(differing)
        if self.digest is None or other.digest is None:
            return "the shapes agree; the weights of one are quantised or offloaded"
        stage = self._first_difference(other)
        where = f"block {stage - 1}" if stage else "the embeddings"
        return "no difference" if stage is None else f"the weights differ from {where} on"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"shape": self.shape, "digest": self.digest, "last_layer": self.last_layer}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BaseFingerprint:
        """Read ``to_json``'s values; a ValueError for other fields, types or a digest too short."""
        found = cls(**check_fields(values, _FIELDS, "fingerprint"))
        if found.digest is not None and len(found.digest) != _STAGE * (found.last_layer + 2):
            raise ValueError(
                f"digest {shown(found.digest)} does not cover the embeddings and blocks "
                f"0..{found.last_layer}; the file is damaged"
            )
        return found

    def _first_difference(self, other: BaseFingerprint) -> int | None:
        """The first stage (0: embeddings, i + 1: block i) with another hash."""
        mine, theirs = self.digest or "", other.digest or ""
        starts = range(0, min(len(mine), len(theirs)), _STAGE)
        differing = (i // _STAGE for i in starts if mine[i : i + _STAGE] != theirs[i : i + _STAGE])
        return next(differing, None)


def fingerprint(model: nn.Module, last_layer: int, architecture: Architecture) -> BaseFingerprint:
    """Fingerprint of a base model up to its last rewrite layer.

    Args:
        model: the base model, unmerged; a PEFT wrapper is looked through, adapters are left out.
        last_layer: the last block to cover; one outside the model is a ValueError.
    """
    if not 0 <= last_layer < architecture.num_blocks:
        raise ValueError(
            f"last_layer={last_layer} is outside this model's {architecture.num_blocks} blocks; "
            f"use 0..{architecture.num_blocks - 1}"
        )
    base = bare_model(model)
    stages = [base.get_input_embeddings()]
    stages += [base.get_submodule(architecture.block_name(i)) for i in range(last_layer + 1)]
    parameters = [_own_parameters(stage) for stage in stages]
    configured = getattr(base.config, "quantization_config", None)
    quantised = getattr(base, "is_quantized", False) or configured
    readable = not quantised and all(
        p.is_floating_point() and p.element_size() >= 2 and not p.is_meta
        for stage in parameters
        for p in stage.values()
    )
    digest = "".join(map(_hash, parameters)) if readable else None
    config = text_config(base.config)
    shape = {
        "model_type": architecture.model_type,
        "layers": architecture.num_blocks,
        "hidden": config.hidden_size,
        "intermediate": mlp_width(base.config),
        "heads": getattr(config, "num_attention_heads", None),
        "vocab": config.vocab_size,
    }
    return BaseFingerprint(shape, digest, last_layer)


def require_same_base(made_for: BaseFingerprint, given: BaseFingerprint, what: str) -> None:
    """Refuse an artefact, named ``what``, of another model; warn where it cannot be compared."""
    same = made_for.matches(given)
    if same is None:
        warnings.warn(
            f"cannot verify that {what} belongs to this model: {given.describe_mismatch(made_for)}",
            stacklevel=3,
        )
    elif not same:
        raise ValueError(
            f"{what} was made for another model: {given.describe_mismatch(made_for)}; load its "
            "model, or make one for this model"
        )


def bare_model(model: nn.Module) -> Any:
    """The transformers model within a PEFT wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by their name in the bare model, without those that adapters added."""
    named = ((f".{name}", parameter) for name, parameter in held_parameters(module))
    return {n.replace(".base_layer.", "."): p for n, p in named if ".lora_" not in n}


def _hash(parameters: Mapping[str, Tensor]) -> str:
    """Hash of evenly spaced values of each tensor, rounded to bfloat16."""
    found = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        flat = parameter.reshape(-1)
        count = min(SAMPLES, len(flat))
        at = torch.arange(count, device=flat.device) * len(flat) // max(count, 1)
        sample = flat[at].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        found.update(f"{name} {tuple(parameter.shape)}\n".encode() + sample.tobytes())
    return found.hexdigest()[:_STAGE]
