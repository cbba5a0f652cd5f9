"""Models of a given shape with random weights: time depends on the shape, not on what they know.

In: a shape's name, or a ``config.json``. Out: a model made directly in the dtype and on the device
asked for, seeded, and a tokenizer with as many words as the model has token ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from alphaedit_peft.editing.contexts import STARTS


@dataclass(frozen=True)
class Shape:
    """A table row: a transformers config's type and fields, and the rewrite layers if not known."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    rewrite_layers: tuple[int, ...] | None = None


ENDS = {"bos_token_id": 0, "eos_token_id": 0}

# The lab shapes are small ones of the same families: five rewrite layers that end at the depth of
# the large model's, and as many token ids as give the output head the large model's share of the
# arithmetic.
SHAPES: dict[str, Shape] = {
    "gpt2-xl": Shape("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": Shape("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16}),
    "llama-3-8b": Shape(
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "vocab_size": 128256,
        },
    ),
    "lab-gpt2": Shape(
        "gpt2",
        {"n_embd": 512, "n_layer": 16, "n_head": 8, "vocab_size": 5120, **ENDS},
        (1, 2, 3, 4, 5),
    ),
    "lab-gptj": Shape(
        "gptj",
        {"n_embd": 512, "n_layer": 14, "n_head": 8, "rotary_dim": 32, "vocab_size": 3072, **ENDS},
        (0, 1, 2, 3, 4),
    ),
    "lab-llama": Shape(
        "llama",
        {
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 7168,
            **ENDS,
        },
        (0, 1, 2, 3, 4),
    ),
}
SHOWN = 200  # characters of an error
WORDS = ("</s>", "<unk>", ".", "is", "a", *STARTS)


def read_shape(shape: str | Path) -> Shape:
    """A shape by its name, or from a ``config.json`` or the folder that holds one.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: a file that is no model's config.
    """
    if str(shape) in SHAPES:
        return SHAPES[str(shape)]
    path = Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"shape {str(shape)!r} is neither one of {sorted(SHAPES)} nor a config.json or a "
            "folder with one"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Shape(values.pop("model_type"), values)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is no model's config ({type(error).__name__}: {error}); it needs JSON with a "
            "model_type"
        ) from error


def shape_config(shape: Shape) -> PretrainedConfig:
    """The transformers config of a shape.

    Raises:
        ValueError: a family or fields that transformers does not know.
    """
    try:
        config = AutoConfig.for_model(shape.model_type, **shape.fields)
    except Exception as error:  # each family checks its fields in its own way
        raise ValueError(
            f"model_type={shape.model_type!r} makes no config: {_shortly(error)}"
        ) from error
    return config


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> nn.Module:
    """A causal language model with random weights, in evaluation mode.

    Every weight is made in its own dtype on its own device, so no larger copy of the model ever
    exists. torch's random state is left as it was.

    Args:
        config: of transformers.
        dtype: of the weights.
        device: where they are made.
        seed: of the weights; the same on the same device gives the same bits.

    Raises:
        ValueError: a config that makes no causal language model.
    """
    place = torch.device(device)
    gpus = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), place:
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"model_type={config.model_type!r} makes no causal language model: "
                f"{_shortly(error)}"
            ) from error
    return model.eval().requires_grad_(False)


def stand_in_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every id is one made-up word, so that a text has a known number of tokens.

    Raises:
        ValueError: fewer ids than edits can be made of.
    """
    least = len(WORDS) + 8
    if vocabulary < least:
        raise ValueError(f"a vocabulary of {vocabulary} ids is too small; {least} are needed")
    words = [*WORDS, *(f"w{number}" for number in range(len(WORDS), vocabulary))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def _shortly(error: Exception) -> str:
    """An error of transformers in one line, which may be long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
