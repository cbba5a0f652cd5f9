"""Free continuations of prompts, greedy or sampled, the same for the same seed in any batch.

In: a model (as a :class:`Reader`) and prompts. Out: texts. Prompts of equal length are written on
together (``decoding``), so nothing is padded. Sampling takes the k most probable tokens and adds
Gumbel noise to their log-probabilities, whose argmax is a draw from them (Gumbel 1954); each prompt
has noise of its own, so a continuation does not depend on what else is in its batch. Of the model's
own generation settings only the end of a text counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaedit_peft import tokens
from alphaedit_peft.decoding import Decoder, likeliest
from alphaedit_peft.log_probs import Reader
from alphaedit_peft.messages import shown


@dataclass(frozen=True)
class Sampling:
    """How to sample: among the ``top_k`` most probable tokens, from a seed.

    Raises:
        ValueError: no token to choose from.
    """

    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} leaves no token to choose; use 1 or more")


def greedy(reader: Reader, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What the model says after each prompt, without the prompt, until EOS or the limit.

    Raises:
        ValueError: a prompt without tokens, or one that leaves no room for new ones.
    """
    distinct = [(prompt, prompt) for prompt in dict.fromkeys(prompts)]
    found = _generate(reader, distinct, lambda start: start + max_new_tokens)
    return [found[prompt] for prompt in prompts]


def sampled(
    reader: Reader, prompts: Sequence[tuple[str, str]], length: int, sampling: Sampling
) -> list[str]:
    """Prompts and how the model goes on, ``length`` tokens together, never stopping at EOS.

    Args:
        prompts: (name, prompt); the name and the seed determine the draws.
        length: tokens of prompt and continuation, 100 in the papers. Texts of equal length have
            comparable entropy, hence no end before that.

    Raises:
        ValueError: a prompt without tokens or too long, or a name given twice.
    """
    if len(dict(prompts)) != len(prompts):
        raise ValueError("prompts share a name, so they would share their draws; name them apart")
    found = _generate(reader, prompts, lambda _: length, sampling)
    return [prompt + found[name] for name, prompt in prompts]


def _generate(
    reader: Reader,
    prompts: Sequence[tuple[str, str]],
    length_for: Callable[[int], int],
    sampling: Sampling | None = None,
) -> dict[str, str]:
    """Continuations by name; ``length_for`` a prompt of so many tokens, both together."""
    waiting: dict[tuple[int, int], list[tuple[str, tuple[int, ...]]]] = {}
    for name, prompt in prompts:
        ids = reader.prompt_ids(prompt)
        start, length = len(ids), length_for(len(ids))
        if not ids:
            raise ValueError(f"prompt {shown(prompt)} has no token, so nothing can go on from it")
        if start >= length:
            raise ValueError(
                f"prompt {prompt[: tokens.SHOWN]!r} has {start} tokens, which leave no room "
                f"for new ones in {length}; raise the length"
            )
        if reader.positions is not None and length > reader.positions:
            raise ValueError(
                f"texts of {length} tokens are longer than the model's {reader.positions} "
                "positions; lower the length"
            )
        waiting.setdefault((start, length), []).append((name, ids))
    found: dict[str, str] = {}
    decoder = Decoder(reader.model)
    for (start, length), rows in waiting.items():
        step = max(1, reader.tokens_per_batch // length)
        for i in range(0, len(rows), step):
            found |= _batch(reader, decoder, rows[i : i + step], length - start, sampling)
    return found


def _batch(
    reader: Reader,
    decoder: Decoder,
    rows: Sequence[tuple[str, tuple[int, ...]]],
    new: int,
    sampling: Sampling | None,
) -> dict[str, str]:
    """Continuations by name; samples have no end before they have ``new`` tokens."""
    names, every = zip(*rows, strict=True)
    ids = torch.tensor(every, device=reader.device)  # (rows, tokens)
    ends = _ends(reader)
    if sampling is None:
        found = decoder.write(ids, new, likeliest, ends)
    else:
        found = decoder.write(ids, new, _TopKNoise(names, sampling, ends))
    texts = [_continuation(reader, row, ids.shape[1]) for row in found]
    return dict(zip(names, texts, strict=True))


def _ends(reader: Reader) -> list[int]:
    """The ids that end a text: the model's, or else the tokenizer's."""
    own = getattr(getattr(reader.model, "generation_config", None), "eos_token_id", None)
    ends = reader.tokenizer.eos_token_id if own is None else own
    return list(ends) if isinstance(ends, Sequence) else [] if ends is None else [int(ends)]


class _TopKNoise:
    """Chooses for each row among its k largest logits, once Gumbel noise is added to them."""

    def __init__(self, names: Sequence[str], sampling: Sampling, ends: Sequence[int]) -> None:
        self.top_k, self.ends = sampling.top_k, torch.tensor(list(ends), dtype=torch.long)
        seeds = [hashlib.sha256(f"{sampling.seed} {name}".encode()).digest()[:7] for name in names]
        self.draws = [torch.Generator().manual_seed(int.from_bytes(s, "big")) for s in seeds]

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        scores = logits.float().index_fill(-1, self.ends.to(logits.device), -torch.inf)
        best, where = scores.topk(min(self.top_k, scores.shape[-1]), -1)  # (rows, k)
        k, double = best.shape[1], torch.float64
        uniform = torch.stack([torch.rand(k, generator=draw, dtype=double) for draw in self.draws])
        noise = -(-uniform.clamp_min(1e-300).log()).log()
        return where.gather(-1, (best + noise.to(best)).argmax(-1, keepdim=True))[:, 0]


def _continuation(reader: Reader, row: list[int], start: int) -> str:
    """The text after ``start`` tokens, decoded whole: its first token may bring a space."""
    parts = (row, row[:start], row[start:])
    whole, head, tail = (str(reader.tokenizer.decode(p, skip_special_tokens=True)) for p in parts)
    return whole[len(head) :] if whole.startswith(head) else tail
