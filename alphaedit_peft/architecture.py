"""Where each model family keeps what an edit rewrites: a table of data, and its lookup.

In: a causal language model from transformers, or its config. Out: an :class:`Architecture`: the
names of the decoder blocks and of the rewrite modules (the second MLP matrix, W_out in the paper's
Eq. 1), and which way round their weights lie. A family is a row of ``FAMILIES``; anything else is
named in the config (``block_module``, ``rewrite_module``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from alphaedit_peft.settings import PRESETS, Options


@dataclass(frozen=True)
class Family:
    """One row: ``blocks`` is the path of a decoder block, ``rewrite`` its module's path within.

    ``conv1d`` says that weights are stored (d_in, d_out), as transformers' ``Conv1D`` does.
    """

    blocks: str
    rewrite: str
    conv1d: bool = False


@dataclass(frozen=True)
class PaperPreset:
    """Table of the paper's appendix B: settings for one model, keyed by its shape."""

    rewrite_layers: tuple[int, ...]
    steps: int
    learning_rate: float
    moment_weight: float


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h.{}", "mlp.c_proj", conv1d=True),
    "gptj": Family("transformer.h.{}", "mlp.fc_out"),
    "gpt_neox": Family("gpt_neox.layers.{}", "mlp.dense_4h_to_h"),
    "llama": Family("model.layers.{}", "mlp.down_proj"),
    "mistral": Family("model.layers.{}", "mlp.down_proj"),
    "qwen2": Family("model.layers.{}", "mlp.down_proj"),
    "qwen3": Family("model.layers.{}", "mlp.down_proj"),
    "phi": Family("model.layers.{}", "mlp.fc2"),
    "phi3": Family("model.layers.{}", "mlp.down_proj"),
    "opt": Family("model.decoder.layers.{}", "fc2"),
    "stablelm": Family("model.layers.{}", "mlp.down_proj"),
    "falcon": Family("transformer.h.{}", "mlp.dense_4h_to_h"),
}

_NORM_AFTER, _EXPERTS = "its blocks put a norm after the MLP", "its MLPs are mixtures of experts"
# Families whose blocks normalise or mix the MLP's output: there Delta k = R does not reach h.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), _NORM_AFTER),
    **dict.fromkeys(("gemma4", "gemma4_text", "olmo2", "olmo3", "olmo_hybrid"), _NORM_AFTER),
    **dict.fromkeys(("glm4", "exaone4", "openai-gpt"), _NORM_AFTER),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _EXPERTS),
}

# (model_type, blocks, hidden size, MLP width): Llama-3-8B, GPT-J-6B, GPT2-XL
PAPER_PRESETS: dict[tuple[str, int, int, int], PaperPreset] = {
    ("llama", 32, 4096, 14336): PaperPreset(tuple(range(4, 9)), 25, 0.1, 15_000),
    ("gptj", 28, 4096, 16384): PaperPreset(tuple(range(3, 9)), 25, 0.5, 15_000),
    ("gpt2", 48, 1600, 6400): PaperPreset(tuple(range(13, 18)), 20, 0.5, 20_000),
}

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NORM_FLAGS = ("do_layer_norm_before", "use_post_norm")  # OPT 350M; HyperCLOVA X
_MLP_SCALES = ("residual_multiplier", "scale_depth")  # Granite; MiniCPM


@dataclass(frozen=True)
class Architecture:
    """How to find the parts of one model; ``blocks`` and ``rewrite`` hold one ``{}`` each."""

    model_type: str
    blocks: str
    rewrite: str
    conv1d: bool
    num_blocks: int

    def block_name(self, layer: int) -> str:
        """Full name of a decoder block, as in ``model.named_modules()``."""
        return self.blocks.replace("{}", str(layer))

    def rewrite_name(self, layer: int) -> str:
        """Full name of a rewrite module, as in ``model.named_modules()``."""
        return self.rewrite.replace("{}", str(layer))

    def width(self, model: nn.Module, layer: int) -> int:
        """d_in of a rewrite module, however its weights are packed."""
        module: Any = model.get_submodule(self.rewrite_name(layer))
        return int(module.weight.shape[0] if self.conv1d else module.in_features)

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The rewrite layers, ascending.

        Raises:
            ValueError: none, a repeated one, or one outside the model.
        """
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"rewrite_layers={list(layers)} must be a list of distinct blocks")
        if min(layers) < 0 or max(layers) >= self.num_blocks:
            raise ValueError(
                f"rewrite_layers={list(layers)} is outside this model's {self.num_blocks} blocks; "
                f"use 0..{self.num_blocks - 1}"
            )
        return tuple(sorted(layers))


def describe(
    model: nn.Module, block_module: str | None = None, rewrite_module: str | None = None
) -> Architecture:
    """Find decoder blocks and rewrite modules of a causal language model.

    Args:
        model: the base model (not wrapped by PEFT).
        block_module: for families outside the table: a block's name with ``{}`` for its number,
            such as ``model.layers.{}``.
        rewrite_module: likewise for the rewrite module, ``model.layers.{}.mlp.down_proj``.

    Raises:
        ValueError: a family that is unknown or refused, or names that the model does not have.
    """
    from transformers import PretrainedConfig  # whoever holds such a model has paid for it

    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"{type(model).__name__} has no transformers config; pass a causal LM")
    family = _family(config, block_module, rewrite_module)
    rewrite = f"{family.blocks}.{family.rewrite}" if rewrite_module is None else rewrite_module
    num_blocks = len(list(_module(model, family.blocks.partition(".{}")[0]).children()))
    for name in (family.blocks, rewrite):
        if name.count("{}") != 1:
            raise ValueError(f"module name {name!r} needs one '{{}}' for the block's number")
    named = type(_module(model, rewrite.replace("{}", "0"))).__name__ == "Conv1D"
    conv1d = family.conv1d if rewrite_module is None else named
    return Architecture(config.model_type, family.blocks, rewrite, conv1d, num_blocks)


def resolve(options: Options, model: Any) -> tuple[Options, Architecture]:
    """Fill every option left at None for a model; see :meth:`AlphaEditConfig.resolve`."""
    architecture = describe(model, options.block_module, options.rewrite_module)
    values = dict(PRESETS[options.preset])
    values["rewrite_layers"] = default_rewrite_layers(architecture.num_blocks)
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
    hidden, blocks = (getattr(config, name, 0) for name in ("hidden_size", "num_hidden_layers"))
    return PAPER_PRESETS.get((config.model_type, blocks, hidden, mlp_width(config)))


def mlp_width(config: Any) -> int:
    """The MLP's inner width that a config states; 4 x hidden where it states none."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return width or 4 * getattr(config, "hidden_size", 0)


def position_switches(config: Any) -> tuple[int, ...]:
    """Lengths of rows above which a model reads them with other rotary tables, ascending.

    That is LongRoPE, which has a second set of frequencies for texts longer than those of the first
    training: there what follows a token decides its key. (Dynamic NTK's tables change above the
    model's positions, where no row comes.) A config that states no such length has none.
    """
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = set()
    for part in (stated, *(part for part in stated.values() if isinstance(part, Mapping))):
        if part.get("rope_type", part.get("type")) in ("longrope", "su"):  # Phi-3's first name
            own = getattr(config, "original_max_position_embeddings", None)
            found.add(part.get("original_max_position_embeddings", own))
    return tuple(sorted(length for length in found if length is not None))


def default_rewrite_layers(num_blocks: int) -> tuple[int, ...]:
    """The depth rule: consecutive blocks that end at 30 % of the depth, five in deep models.

    The paper's three models end at 25-35 % of their depth and rewrite 5-6 blocks; models of fewer
    than 16 blocks get three. At least one block stays above the last rewrite layer.
    """
    last = max(0, min(int(0.3 * num_blocks), num_blocks - 2))
    count = 5 if num_blocks >= 16 else 3
    return tuple(range(max(0, last - count + 1), last + 1))


def _family(config: Any, block_module: str | None, rewrite_module: str | None) -> Family:
    kind = config.model_type
    reason = REFUSED.get(kind) or _structural_reason(config)
    if reason:
        raise ValueError(
            f"model_type={kind!r} cannot be edited yet: {reason}, so an update of one matrix does "
            "not move the hidden state as the paper's equations assume; use a dense pre-norm "
            "decoder"
        )
    known = FAMILIES.get(kind)
    if known is None and (block_module is None or rewrite_module is None):
        raise ValueError(
            f"model_type={kind!r} is not in the table of families {sorted(FAMILIES)}; name its "
            "parts in the config: block_module='model.layers.{}', "
            "rewrite_module='model.layers.{}.mlp.down_proj'"
        )
    known = known or Family("", "")
    return Family(block_module or known.blocks, rewrite_module or known.rewrite, known.conv1d)


def _structural_reason(config: Any) -> str | None:
    """Why the equations do not hold for a config, whatever its family."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERT_COUNTS):
        return _EXPERTS
    before, after = (getattr(config, name, None) for name in _NORM_FLAGS)
    if before is False or after:
        return _NORM_AFTER
    if any((getattr(config, name, None) or 1) != 1 for name in _MLP_SCALES):
        return "its blocks scale the MLP's output"
    return None


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; see model.named_modules() and set "
            "block_module and rewrite_module in the config"
        ) from None
