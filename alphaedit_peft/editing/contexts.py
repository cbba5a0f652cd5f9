"""Texts put before a prompt, so that an edit holds wherever it is met, not only bare.

In: the base model and a seed. Out: short texts that the model itself writes (section 2.2 of the
paper: contexts x_j sampled from the model), reproducible, recorded in the pack, and never kept in a
global. The model's and torch's random state are left as they were.

A draw from probabilities p is argmax p / q with q exponential, as ``torch.multinomial`` does it; q
comes from one stream in the order of contexts and tokens. So, but for rounding, a seed's contexts
are the same however they are put into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMode

from alphaedit_peft import hooks
from alphaedit_peft.devices import reads_ids_on
from alphaedit_peft.settings import EditOptions

STARTS = ("The", "Therefore", "Because", "I", "You")
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
    device, length = reads_ids_on(model), options.context_length
    starts = [_opening(tokenizer, STARTS[i % len(STARTS)]) for i in range(options.num_contexts)]
    settings = GenerationConfig(
        do_sample=True,
        top_k=5,
        max_new_tokens=length,
        min_new_tokens=length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id or 0,
    )

    def written(some: Sequence[list[int]], decode: Callable[..., Any] | None = None) -> Any:
        """Starts (rows, tokens) gone on from; ``decode`` stands in for the model's own choice."""
        ids = torch.tensor(some, device=device)
        return model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            custom_generate=decode,
        )

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        hooks.evaluating(model),
    ):
        _seed(device, options.seed)
        rows = _together(written, starts, options)
        if rows is None:
            rows = [written([start])[0] for start in starts]
    texts = [_sentence(tokenizer, row) for row in rows]
    return tuple(dict.fromkeys(text for text in texts if text))


def _opening(tokenizer: PreTrainedTokenizerBase, start: str) -> list[int]:
    """Ids of a text to go on from: without the EOS that some tokenizers close a text with."""
    encoded = tokenizer(start, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while len(ids) > 1 and added[len(ids) - 1]:
        ids.pop()
    return ids


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators that drawing on a device uses, and no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


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


class _Drawn(LogitsProcessor):
    """Leaves one token possible in each row, drawn from the probabilities; runs as the last."""

    def __init__(self, streams: _Streams, numbers: Sequence[int]) -> None:
        self.streams, self.numbers = streams, numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocab) to 0 for the token drawn and -inf for all others."""
        probabilities = scores.softmax(-1)
        good = probabilities.isfinite().all(-1)
        if not good.all():
            ids = input_ids[~good][0].tolist()
            raise ValueError(
                f"the model's logits for token ids {ids} are not finite; the base model's weights "
                "hold NaN or infinity, or its dtype is too narrow"
            )
        q = torch.empty_like(scores)
        generators = self.streams.generators(q[:1])
        for row, number in enumerate(self.numbers):  # a batch of rows would take other numbers
            q[row : row + 1].exponential_(generator=generators[number])
        drawn = (probabilities / q).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def _together(
    written: Callable[..., Any], starts: Sequence[list[int]], options: EditOptions
) -> list[Tensor] | None:
    """Ids of all contexts; None, before anything is run, where ``_sample`` says so."""
    streams = _Streams(options.seed, len(starts), options.context_length)
    lengths = [len(start) for start in starts]
    found: dict[int, Tensor] = {}
    for length in dict.fromkeys(lengths):  # equally long ones need no padding
        alike = [i for i, other in enumerate(lengths) if other == length]
        fitting = options.tokens_per_batch // (length + options.context_length)
        step = min(max(1, fitting), MOST_ROWS)
        for some in (alike[i : i + step] for i in range(0, len(alike), step)):
            rows = written([starts[i] for i in some], partial(_sample, _Drawn(streams, some)))
            if rows is None:
                return None
            found |= dict(zip(some, rows, strict=True))
    return [found[i] for i in range(len(starts))]


def _sample(
    drawn: _Drawn,
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    **rest: Any,
) -> Tensor | None:
    """transformers' own decoding loop that takes what is ``drawn``; None where it will not do.

    Rows cannot go together where the model's own settings ask for beams or the like, it runs
    without a cache of transformers', or has another decoding loop. ``generate`` calls this with
    what it has made of the settings and the model's own, such as a temperature; processors that it
    is given itself would run before those.
    """
    samples = generation_config.get_generation_mode() == GenerationMode.SAMPLE
    once = generation_config.num_return_sequences == 1
    # without it a family carries its state in a way of its own; RWKV's mixes the rows of a batch
    cached = isinstance(rest.get("past_key_values"), Cache)
    if not (samples and once and cached and hasattr(model, "_sample")):
        return None
    generation_config.do_sample = False  # it is drawn already: take the one that is possible
    return model._sample(
        input_ids,
        logits_processor=LogitsProcessorList([*logits_processor, drawn]),
        generation_config=generation_config,
        **rest,
    )


def _sentence(tokenizer: PreTrainedTokenizerBase, row: Tensor) -> str:
    text = str(tokenizer.decode(row, skip_special_tokens=True))
    # braces would read as a slot for the subject; line breaks end a prompt in many chat formats
    text = " ".join(text.replace("{", " ").replace("}", " ").split())
    return text.rstrip(".") + "." if text else ""
