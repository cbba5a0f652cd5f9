"""What an edit rewrites in a model, and the settings that a model brings.

In: a causal language model from transformers. Out: an :class:`Architecture`: the names of the
decoder blocks and of their rewrite modules (the second MLP matrix, W_out in the paper's Eq. 1), as
``structure`` finds them, and the options that depend on them. No family is listed; a table holds
only what cannot be found, the paper's settings for its three models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alphaedit_peft.settings import PRESETS, Options
from alphaedit_peft.structure import Rewrite, find_structure
from alphaedit_peft.tokens import text_config


@dataclass(frozen=True)
class PaperPreset:
    """Table of the paper's appendix B: settings for one model, keyed by its shape."""

    rewrite_layers: tuple[int, ...]
    steps: int
    learning_rate: float
    moment_weight: float


# (model_type, blocks, hidden size, MLP width): Llama-3-8B, GPT-J-6B, GPT2-XL
PAPER_PRESETS: dict[tuple[str, int, int, int], PaperPreset] = {
    ("llama", 32, 4096, 14336): PaperPreset(tuple(range(4, 9)), 25, 0.1, 15_000),
    ("gptj", 28, 4096, 16384): PaperPreset(tuple(range(3, 9)), 25, 0.5, 15_000),
    ("gpt2", 48, 1600, 6400): PaperPreset(tuple(range(13, 18)), 20, 0.5, 20_000),
}


@dataclass(frozen=True)
class Architecture:
    """How to find the parts of one model; ``blocks`` and ``rewrites`` have an entry a block."""

    model_type: str
    blocks: tuple[str, ...]
    rewrites: tuple[Rewrite | None, ...]

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self.blocks)

    @property
    def conv1d(self) -> bool:
        """Whether weights are stored (d_in, d_out), as transformers' ``Conv1D`` does."""
        return any(rewrite is not None and rewrite.conv1d for rewrite in self.rewrites)

    def block_name(self, layer: int) -> str:
        """Full name of a decoder block, as in ``model.named_modules()``."""
        return self.blocks[layer]

    def rewrite_name(self, layer: int) -> str:
        """Full name of a block's rewrite module, as in ``model.named_modules()``.

        Raises:
            ValueError: a block that has none.
        """
        rewrite = self.rewrites[layer]
        if rewrite is None:
            raise ValueError(
                f"block {layer} has no module that an edit can rewrite (a mixture of routed "
                f"experts alone, or no MLP); use blocks {list(self.editable)}"
            )
        return rewrite.module

    @property
    def editable(self) -> tuple[int, ...]:
        """Blocks that an edit can rewrite: they add their rewrite module's output as it is."""
        return tuple(k for k, found in enumerate(self.rewrites) if found and found.adds)

    def width(self, model: nn.Module, layer: int) -> int:
        """d_in of a rewrite module, however its weights are packed."""
        module: Any = model.get_submodule(self.rewrite_name(layer))
        return int(module.weight.shape[0] if self.conv1d else module.in_features)

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The rewrite layers, ascending.

        Raises:
            ValueError: none, a repeated one, one outside the model, or one that cannot be edited.
        """
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"rewrite_layers={list(layers)} must be a list of distinct blocks")
        if min(layers) < 0 or max(layers) >= self.num_blocks:
            raise ValueError(
                f"rewrite_layers={list(layers)} is outside this model's {self.num_blocks} blocks; "
                f"use 0..{self.num_blocks - 1}"
            )
        for layer in layers:
            name, found = self.rewrite_name(layer), self.rewrites[layer]
            if found is not None and not found.adds:
                raise ValueError(
                    f"block {layer} of this {self.model_type} does not add what {name} puts out "
                    "as it is (a norm or a factor stands behind it), so that no update reaches a "
                    f"hidden state as the paper's equations assume; use blocks "
                    f"{list(self.editable)}"
                )
        return tuple(sorted(layers))


def describe(
    model: nn.Module, block_module: str | None = None, rewrite_module: str | None = None
) -> Architecture:
    """Find decoder blocks and rewrite modules of a causal language model.

    Args:
        model: the base model (not wrapped by PEFT).
        block_module: where what is found is not meant, a block's name with ``{}`` for its number,
            such as ``model.layers.{}``.
        rewrite_module: likewise for the rewrite module, ``model.layers.{}.mlp.down_proj``.

    Raises:
        ValueError: a model that cannot be edited, with what was found, or names that it does not
            have.
    """
    from transformers import PretrainedConfig  # whoever holds such a model has paid for it

    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"{type(model).__name__} has no transformers config; pass a causal LM")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, whose answers do not follow "
            "their prompt; use a causal language model"
        )
    found = find_structure(model, block_module, rewrite_module)
    architecture = Architecture(config.model_type, found.blocks, found.rewrites)
    if not architecture.editable:
        raise ValueError(f"{type(model).__name__} cannot be edited yet: {_why_not(found.rewrites)}")
    return architecture


def resolve(options: Options, model: Any) -> tuple[Options, Architecture]:
    """Fill every option left at None for a model; see :meth:`AlphaEditConfig.resolve`."""
    architecture = describe(model, options.block_module, options.rewrite_module)
    values = dict(PRESETS[options.preset])
    values["rewrite_layers"] = default_rewrite_layers(
        architecture.num_blocks, architecture.editable
    )
    known = paper_preset(model.config)
    if known is not None:
        values["rewrite_layers"] = known.rewrite_layers
    if known is not None and options.preset == "paper":
        values["moment_weight"] = known.moment_weight
        values["steps"], values["learning_rate"] = known.steps, known.learning_rate
    full = replace(options, **{k: v for k, v in values.items() if getattr(options, k) is None})
    full.rewrite_layers = list(architecture.check_layers(full.rewrite_layers or ()))
    name = getattr(model.config, "_name_or_path", None) or None
    full.base_model_name_or_path = options.base_model_name_or_path or name
    return full, architecture


def paper_preset(config: Any) -> PaperPreset | None:
    """The paper's settings if the model has the shape of one of the paper's three models."""
    config = text_config(config)
    hidden, blocks = (getattr(config, name, 0) for name in ("hidden_size", "num_hidden_layers"))
    return PAPER_PRESETS.get((config.model_type, blocks, hidden, mlp_width(config)))


def mlp_width(config: Any) -> int:
    """The MLP's inner width that a config states; 4 x hidden where it states none."""
    config = text_config(config)
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return width or 4 * getattr(config, "hidden_size", 0)


def position_switches(config: Any) -> tuple[int, ...]:
    """Lengths of rows above which a model reads them with other rotary tables, ascending.

    That is LongRoPE, which has a second set of frequencies for texts longer than those of the first
    training: there what follows a token decides its key. (Dynamic NTK's tables change above the
    model's positions, where no row comes.) A config that states no such length has none.
    """
    config = text_config(config)
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = set()
    for part in (stated, *(part for part in stated.values() if isinstance(part, Mapping))):
        if part.get("rope_type", part.get("type")) in ("longrope", "su"):  # Phi-3's first name
            own = getattr(config, "original_max_position_embeddings", None)
            found.add(part.get("original_max_position_embeddings", own))
    return tuple(sorted(length for length in found if length is not None))


def default_rewrite_layers(
    num_blocks: int, editable: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The depth rule: consecutive blocks that end at 30 % of the depth, five in deep models.

    The paper's three models end at 25-35 % of their depth and rewrite 5-6 blocks; models of fewer
    than 16 blocks get three. At least one block stays above the last rewrite layer. Where not all
    blocks can be edited, the last of the ``editable`` ones up to there are taken, or the first one.
    """
    blocks = range(num_blocks) if editable is None else editable
    last = max(0, min(int(0.3 * num_blocks), num_blocks - 2))
    count = 5 if num_blocks >= 16 else 3
    return tuple([block for block in blocks if block <= last][-count:] or blocks[:1])


def _why_not(rewrites: Sequence[Rewrite | None]) -> str:
    """What was found in the blocks of a model of which none can be edited."""
    found = next((rewrite for rewrite in rewrites if rewrite is not None), None)
    if found is None:
        return (
            "no block has a matrix that writes into the residual stream from its own position "
            "alone, as a dense MLP's last one does; its MLPs are mixtures of routed experts, or it "
            "has none"
        )
    return (
        f"its blocks do not add what {found.module} puts out as it is (a norm or a factor stands "
        "behind it), so that no update reaches a hidden state as the paper's equations assume; use "
        "a dense pre-norm decoder"
    )
