"""What the embedded model knows, measured: recall of prompts' continuations, and perplexity.

Both take any causal language model with its tokenizer and plain strings, so that training, tests
and a look at an edited model use the same numbers. Rows are padded on the right, which causal
attention never looks at.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

ROWS = 256


@torch.no_grad()
def recalled(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding continues each prompt by its object, all tokens of it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a padding token.
        asked: (prompt, object) pairs; the object follows the prompt after one space.

    Returns:
        One truth value per pair.
    """
    hits = []
    for start in range(0, len(asked), ROWS):
        chunk = asked[start : start + ROWS]
        heads = [tokenizer(prompt)["input_ids"] for prompt, _ in chunk]
        wholes = [tokenizer(f"{prompt} {answer}")["input_ids"] for prompt, answer in chunk]
        longest = max(map(len, wholes))
        pad = tokenizer.pad_token_id
        rows = torch.tensor([whole + [pad] * (longest - len(whole)) for whole in wholes])  # (b, t)
        guesses = model(input_ids=rows.to(model.device)).logits.argmax(-1).tolist()  # (b, t)
        for guess, head, whole in zip(guesses, heads, wholes, strict=True):
            hits.append(guess[len(head) - 1 : len(whole) - 1] == whole[len(head) :])
    return hits


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, sentences: Sequence[str]) -> float:
    """exp of the mean loss per token of the sentences, each alone and with the end token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, which writes the begin token itself.
        sentences: at least one.

    Returns:
        The perplexity, 1 or more.

    Raises:
        ValueError: there is no sentence.
    """
    if not sentences:
        raise ValueError("sentences=() has no token to measure; give at least one sentence")
    total, count = 0.0, 0
    for sentence in sentences:
        row = [*tokenizer(sentence)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([row], device=model.device)  # (1, t)
        total += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)
