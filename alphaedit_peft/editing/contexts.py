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
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    devices = [device] if device.type == "cuda" else []
    texts: list[str] = []
    with torch.random.fork_rng(devices=devices), hooks.evaluating(model):
        torch.manual_seed(config.seed)
        for number in range(config.num_contexts):
            start = STARTS[number % len(STARTS)]
            texts.append(_continue(model, tokenizer, start, config.context_length))
    return tuple(dict.fromkeys(text for text in texts if text))


def _continue(model: nn.Module, tokenizer: PreTrainedTokenizerBase, start: str, length: int) -> str:
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.tensor([tokenizer(start)["input_ids"]], device=device)
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
