"""Texts put before a prompt, so that an edit holds wherever it is met, not only bare.

In: the base model and a seed. Out: short texts that the model itself writes (section 2.2 of the
paper: contexts x_j sampled from the model), reproducible, recorded in the pack, and never kept in a
global. The model's and torch's random state are left as they were, and of the model's own
generation settings none counts.

A token is drawn from the ``TOP_K`` likeliest, EOS aside. A draw from probabilities p is argmax
p / q with q exponential, as ``torch.multinomial`` does it; q comes from one stream in the order of
contexts and tokens. So, but for rounding, a seed's contexts are the same however they are put into
batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import tokens
from alphaedit_peft.decoding import Decoder
from alphaedit_peft.devices import reads_ids_on
from alphaedit_peft.settings import EditOptions

STARTS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5
MOST_ROWS = 64  # written together: each has logits over the whole vocabulary, several times


def sample_contexts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: EditOptions
) -> tuple[str, ...]:
    """The configured contexts, or ``num_contexts`` texts that the model writes.

    Each begins with one of ``STARTS`` in turn and ends in a full stop. The random numbers come from
    ``options.seed`` alone, and a context's own do not depend on which others are written with it;
    ``options.tokens_per_batch`` bounds how many are.

    Returns:
        Distinct texts; fewer than asked for where the model repeats itself or writes nothing.

    Raises:
        ValueError: a model whose probabilities are not finite.
    """
    if options.contexts is not None:
        return tuple(options.contexts)
    openings = [list(tokens.encode(tokenizer, start)[0]) for start in STARTS]
    starts = [openings[i % len(openings)] for i in range(options.num_contexts)]
    streams = _Streams(options.seed, len(starts), options.context_length)
    lengths = [len(start) for start in starts]
    found: dict[int, list[int]] = {}
    decoder = Decoder(model)
    for length in dict.fromkeys(lengths):  # equally long ones need no padding
        alike = [i for i, other in enumerate(lengths) if other == length]
        fitting = options.tokens_per_batch // (length + options.context_length)
        step = min(max(1, fitting), MOST_ROWS)
        for some in (alike[i : i + step] for i in range(0, len(alike), step)):
            ids = torch.tensor([starts[i] for i in some], device=reads_ids_on(model))
            drawn = _Drawn(streams, some, tokenizer.eos_token_id)
            rows = decoder.write(ids, options.context_length, drawn)
            found |= dict(zip(some, rows, strict=True))
    texts = [_sentence(tokenizer, found[i]) for i in range(len(starts))]
    return tuple(dict.fromkeys(text for text in texts if text))


class _Streams:
    """Each context's random numbers, drawn as if contexts were written one after another."""

    def __init__(self, seed: int, count: int, length: int) -> None:
        self.seed, self.count, self.length = seed, count, length
        self._generators: list[torch.Generator] = []

    def generators(self, scratch: Tensor) -> list[torch.Generator]:
        """By context, a generator at the place where one single generator comes to it.

        At first ``scratch`` (1, vocab) is drawn as often as all contexts will.
        """
        if self._generators:
            return self._generators
        source = torch.Generator(scratch.device).manual_seed(self.seed)
        for number in range(self.count):
            for _ in range(self.length if number else 0):
                scratch.exponential_(generator=source)
            own = torch.Generator(scratch.device)
            own.set_state(source.get_state())
            self._generators.append(own)
        return self._generators


class _Drawn:
    """Chooses a token for each row, drawn from the probabilities of the ``TOP_K`` likeliest."""

    def __init__(self, streams: _Streams, numbers: Sequence[int], end: int | None) -> None:
        self.streams, self.numbers, self.end = streams, numbers, end

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """From ids (rows, tokens) and logits (rows, vocab) to (rows,)."""
        scores = logits.float()
        if self.end is not None:
            scores = scores.index_fill(-1, torch.tensor(self.end).to(scores.device), -torch.inf)
        least = scores.topk(min(TOP_K, scores.shape[-1]), -1).values[:, -1:]
        probabilities = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        good = probabilities.isfinite().all(-1)
        if not good.all():
            first = ids[~good.to(ids.device)][0].tolist()
            raise ValueError(
                f"the model's logits for token ids {first} are not finite; the base model's "
                "weights hold NaN or infinity, or its dtype is too narrow"
            )
        q = torch.empty_like(scores)
        generators = self.streams.generators(q[:1])
        for row, number in enumerate(self.numbers):  # a batch of rows would take other numbers
            q[row : row + 1].exponential_(generator=generators[number])
        return (probabilities / q).argmax(-1)


def _sentence(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(row), skip_special_tokens=True))
    # braces would read as a slot for the subject; line breaks end a prompt in many chat formats
    text = " ".join(text.replace("{", " ").replace("}", " ").split())
    return text.rstrip(".") + "." if text else ""
