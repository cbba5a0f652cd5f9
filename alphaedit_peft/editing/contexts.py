"""Texts put before a prompt, so that an edit holds wherever it is met, not only bare.

In: the base model and a seed. Out: short texts that the model itself writes (section 2.2 of the
paper: contexts x_j sampled from the model), reproducible, recorded in the pack, and never kept in a
global. The model's and torch's random state are left as they were.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from alphaedit_peft import hooks
from alphaedit_peft.config import AlphaEditConfig

STARTS = ("The", "Therefore", "Because", "I", "You")


def sample_contexts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: AlphaEditConfig
) -> tuple[str, ...]:
    """The configured contexts, or ``num_contexts`` texts that the model writes.

    Each begins with one of ``STARTS`` in turn and ends in a full stop. The random numbers come from
    ``config.seed`` alone.

    Returns:
        Distinct texts; fewer than asked for where the model repeats itself or writes nothing.
    """
    if config.contexts is not None:
        return tuple(config.contexts)
    device = _device(model)
    devices = [device] if device.type == "cuda" else []
    texts: list[str] = []
    with torch.random.fork_rng(devices=devices), hooks.evaluating(model):
        _seed(device, config.seed)
        for number in range(config.num_contexts):
            start = STARTS[number % len(STARTS)]
            texts.append(_continue(model, tokenizer, start, config.context_length))
    return tuple(dict.fromkeys(text for text in texts if text))


def _device(model: nn.Module) -> torch.device:
    """Where token ids go and are drawn; an offloaded embedding has no device of its own."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return torch.device("cpu") if device.type == "meta" else device


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators that drawing on a device uses, and no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def _opening(tokenizer: PreTrainedTokenizerBase, start: str) -> list[int]:
    """Ids of a text to go on from: without the EOS that some tokenizers close a text with."""
    encoded = tokenizer(start, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while len(ids) > 1 and added[len(ids) - 1]:
        ids.pop()
    return ids


def _continue(model: nn.Module, tokenizer: PreTrainedTokenizerBase, start: str, length: int) -> str:
    ids = torch.tensor([_opening(tokenizer, start)], device=_device(model))
    settings = GenerationConfig(
        do_sample=True,
        top_k=5,
        max_new_tokens=length,
        min_new_tokens=length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    out = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    text = str(tokenizer.decode(out[0], skip_special_tokens=True))
    # braces would read as a slot for the subject; line breaks end a prompt in many chat formats
    text = " ".join(text.replace("{", " ").replace("}", " ").split())
    return text.rstrip(".") + "." if text else ""
