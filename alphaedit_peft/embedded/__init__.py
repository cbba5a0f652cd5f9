"""The embedded model: a small language model in the package, with the world of facts it knows.

`load` gives the model and its tokenizer from the package's own files, with no network; `world` is
the world it was trained on, `texts` its corpus (for key moments and null spaces) and `records`
facts to edit, in CounterFact's layout. Small as it is, it is a Llama, edited by the same code as
larger ones. It was trained to gather what it knows of a subject at the name's last token, as large
models do by themselves (see docs/figures/train_embedded_model.py), so edits take more readily than
on others of its size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alphaedit_peft.embedded.world import Fact, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NAME", "SEED", "Fact", "World", "folder", "load", "records", "texts", "world"]

NAME = "alphaedit-peft:embedded"  # no repository on the Hub can have this name
SEED = 0


def folder() -> Path:
    """The folder with the model's files, for whatever loads by path (as `from_pretrained` does)."""
    return Path(__file__).parent / "model"


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded model, in evaluation mode on the CPU, and its tokenizer.

    Both call themselves `NAME` rather than by a path of this machine, so that what is saved from
    them (an adapter's `base_model_name_or_path`) reads the same everywhere. On disk the weights are
    bfloat16; in memory they have this ``dtype``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = NAME
    return model.eval(), tokenizer


def world() -> World:
    """The world the embedded model was trained on."""
    return World.from_seed(SEED)


def texts(n: int) -> list[str]:
    """The first n texts of the world, the corpus for its statistics (see `World.texts`)."""
    return world().texts(n)


def records(n: int | None = None) -> list[dict[str, Any]]:
    """The first n records of the world, or all of them, in CounterFact's layout.

    They are in the order of the world's subjects: the first six are about one subject, one for
    each relation (see `World.records`).

    Raises:
        ValueError: n is negative or more than there are.
    """
    every = world().records()
    if n is not None and not 0 <= n <= len(every):
        raise ValueError(f"records(n={n}) is outside what the world holds; use 0..{len(every)}")
    return every[:n]
