"""Runs any causal language model over prompts and continuations.

In: a model, its fast tokenizer, (prompt, continuation) pairs or texts. Out: :class:`Reading` for
pairs, log-probabilities for texts, continuations for prompts. Rows are sorted by length, padded on
the right by itself, and the model's head sees only the places that are asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import hooks, tokens
from alphaedit_peft.devices import brings_to_gpu
from alphaedit_peft.evaluation.metrics import Reading

ADVICE = "shorten the prompt"


@dataclass(frozen=True)
class Continuation:
    """A prompt and what should follow it, as token ids."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return self.prompt + self.target[:-1]


@dataclass(frozen=True)
class TextBatch:
    """A batch of whole texts.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, (batch, tokens).
        places: (row, position) of every token but each text's last.
        following: the id that follows each place.
        texts: the number of the text that each place is in.
    """

    inputs: dict[str, Tensor]
    places: list[tuple[int, int]]
    following: list[int]
    texts: list[int]


@dataclass(frozen=True)
class Reader:
    """A model and how to run it.

    Args:
        model: a causal language model: from transformers, from PEFT, or any module that takes
            ``input_ids`` and ``attention_mask`` and gives ``logits``.
        tokenizer: its fast tokenizer; no setting of it is touched.
        tokens_per_batch: most tokens in a batch, padding included.
        separator: stands between a prompt and its continuation, where neither brings a space.

    Raises:
        ValueError: a tokenizer without offsets, or a batch of no token.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int = 4096
    separator: str = " "

    def __post_init__(self) -> None:
        tokens.require_offsets(self.tokenizer)
        if self.tokens_per_batch < 1:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} holds no token; use 1 or more"
            )

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings, or of any parameter."""
        find = getattr(self.model, "get_input_embeddings", None)
        weight = find().weight if find else next(self.model.parameters(), torch.empty(0))
        return torch.device("cpu") if weight.device.type == "meta" else weight.device

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None where it does not say."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    def batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tokens.PaddedBatch]:
        """Token rows in padded batches, as few as go where each pass brings weights to a GPU."""
        few = brings_to_gpu(self.model)
        return tokens.batches(rows, self.tokens_per_batch, self.device, few=few)

    def encode(self, prompt: str, target: str) -> Continuation:
        """Ids of a prompt and its continuation, tokenised once, together.

        Raises:
            ValueError: a side without tokens, or more than the model takes.
        """
        suffix = tokens.separator_between(prompt, target, self.separator) + target
        ids, _, border = tokens.joined(self.tokenizer, prompt, suffix)
        if border == len(ids) or not tokens.encode(self.tokenizer, target.strip(), False)[0]:
            raise ValueError(f"continuation {target!r} has no token; check the tokenizer")
        if border == 0:
            raise ValueError(
                f"prompt {prompt!r} has no token, so nothing foretells what follows it"
            )
        row = Continuation(ids[:border], ids[border:])
        self._require_fit(row.ids, max(ids), prompt)
        return row

    def read(self, pairs: Sequence[tuple[str, str]]) -> list[Reading]:
        """What the model says about each continuation; equal pairs are run once.

        Args:
            pairs: (prompt, continuation).

        Returns:
            One reading a pair, in order.

        Raises:
            ValueError: as ``encode``, or a model that gives NaN.
        """
        distinct = list(dict.fromkeys(pairs))
        rows = [self.encode(*pair) for pair in distinct]
        found: dict[tuple[str, str], Reading] = {}
        for batch in self.batches([row.ids for row in rows]):
            where = [
                (i, p)
                for i, k in enumerate(batch.indices)
                for p in range(len(rows[k].prompt) - 1, len(rows[k].ids))
            ]
            log_probs = self.log_probs(batch.inputs, where)  # (all target tokens, vocab)
            targets = torch.tensor([t for k in batch.indices for t in rows[k].target])
            chosen = log_probs.gather(1, targets.to(log_probs.device)[:, None])[:, 0].tolist()
            top = log_probs.argmax(-1).tolist()
            start = 0
            for k in batch.indices:
                part = slice(start, start + len(rows[k].target))
                found[distinct[k]] = Reading(rows[k].target, tuple(chosen[part]), tuple(top[part]))
                start = part.stop
        return [found[pair] for pair in pairs]

    @torch.no_grad()
    def log_probs(self, inputs: dict[str, Tensor], where: Sequence[tuple[int, int]]) -> Tensor:
        """Log-probabilities of the next token at (row, position) pairs, (pairs, vocab).

        Args:
            inputs: ``input_ids`` and ``attention_mask``, (batch, tokens).
            where: which places; the head is run on these alone.

        Raises:
            ValueError: the model gives NaN there.
        """
        head = hooks.head_name(self.model)
        gathering = (
            nullcontext() if head is None else hooks.gathering_logits(self.model, head, where)
        )
        with hooks.evaluating(self.model), gathering:
            logits = self.model(**inputs, use_cache=False).logits
        if head is None:
            rows, places = zip(*where, strict=True)
            logits = logits[list(rows), list(places)][None]
        logits = logits[0] if logits.dtype == torch.float64 else logits[0].float()
        if logits.isnan().any():
            raise ValueError(
                f"{type(self.model).__name__} gives logits that are NaN; its weights hold NaN or "
                "infinity, or its dtype is too narrow"
            )
        return logits.log_softmax(-1)

    def text_batches(self, texts: Sequence[str]) -> Iterator[TextBatch]:
        """Batches over whole texts, every token foretold from those before it.

        A text is cut where the model's positions end; one of a single token asks nothing.

        Raises:
            ValueError: no text with two tokens or more.
        """
        encoded = [tokens.encode(self.tokenizer, text)[0][: self.positions] for text in texts]
        rows = [(i, ids) for i, ids in enumerate(encoded) if len(ids) > 1]
        if not rows:
            raise ValueError(f"{len(texts)} texts hold no token to foretell; give longer ones")
        for i, ids in rows:
            self._require_fit(ids, max(ids), texts[i])
        every = [ids for _, ids in rows]
        for batch in self.batches(every):
            places = [
                (k, p) for k, row in enumerate(batch.indices) for p in range(len(every[row]) - 1)
            ]
            yield TextBatch(
                batch.inputs,
                places,
                following=[every[batch.indices[k]][p + 1] for k, p in places],
                texts=[rows[batch.indices[k]][0] for k, _ in places],
            )

    def _require_fit(self, ids: Sequence[int], largest: int, text: str) -> None:
        find = getattr(self.model, "get_input_embeddings", None)
        vocabulary = len(find().weight) if find else largest + 1
        tokens.require_fit(ids, largest, text, (self.positions, vocabulary), ADVICE)
