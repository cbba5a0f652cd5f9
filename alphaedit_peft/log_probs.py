"""Log-probabilities of continuations and texts under any causal language model, in one place.

In: a model, token rows (a prompt's ids and those that follow), or texts with a fast tokenizer. Out:
:class:`Score` or :class:`Reading` of each continuation, log-probabilities at the places of a text.
Rows of like length go together, padded on the right, and the model's head sees only the places that
are asked about:

    log p(o | x) = sum_t log P(o_t | x, o_<t)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks, tokens
from alphaedit_peft.architecture import position_switches
from alphaedit_peft.devices import brings_to_gpu, reads_ids_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVICE = "shorten the prompt"

Batches = Callable[[Sequence[Sequence[int]]], Iterator[tokens.PaddedBatch]]


@dataclass(frozen=True)
class Continuation:
    """A prompt's token ids, and those of what should follow it."""

    ids: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def scoring_ids(self) -> tuple[int, ...]:
        """What the model reads to foretell every target token: all but the last one."""
        return self.ids + self.target[:-1]

    @property
    def target_positions(self) -> range:
        """Positions in ``scoring_ids`` whose logits foretell the target tokens."""
        return range(len(self.ids) - 1, len(self.ids) - 1 + len(self.target))

    def places(self, switches: Sequence[int]) -> list[range]:
        """``target_positions``, cut where the ids up to one are more than a switch.

        The ids up to a range's end foretell what is in it: P(o_t | x, o_<t) is of a model that has
        read so many tokens (``architecture.position_switches``).
        """
        at = self.target_positions
        borders = [at.start, *(s for s in switches if at.start < s < at.stop), at.stop]
        return list(map(range, borders, borders[1:]))

    def foretold_at(self, places: range) -> tuple[int, ...]:
        """The ids that some of ``target_positions`` foretell."""
        first = len(self.ids) - 1
        return self.target[places.start - first : places.stop - first]


@dataclass(frozen=True)
class Score:
    """How a model takes a target: summed log-probability, its length, greedy agreement."""

    log_prob: float
    num_tokens: int
    greedy: bool

    @property
    def probability(self) -> float:
        """P(target | prompt), the product over the target's tokens."""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class Reading:
    """What a model said about a continuation, token by token, with the true tokens before each.

    Attributes:
        target: the continuation's token ids, at least one.
        log_probs: log P of each, natural logarithm.
        top: the most probable id in the place of each.

    Raises:
        ValueError: fields of unequal length, or empty.
    """

    target: tuple[int, ...]
    log_probs: tuple[float, ...]
    top: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = (len(self.target), len(self.log_probs), len(self.top))
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                f"target, log_probs and top have lengths {lengths}; give each token all"
            )

    @property
    def mean_log_prob(self) -> float:
        """(1/m) sum_t log P(o_t | x, o_<t)."""
        return sum(self.log_probs) / len(self.log_probs)

    @property
    def mean_probability(self) -> float:
        """Exp of the mean log-probability: the geometric mean over the tokens."""
        return math.exp(self.mean_log_prob)

    @property
    def recalled(self) -> bool:
        """Whether greedy decoding says the whole continuation: o_t = argmax for all t."""
        return self.top == self.target

    @property
    def token_accuracy(self) -> float:
        """(1/m) sum_t [o_t = argmax], each given the right tokens before it (zsRE's accuracy)."""
        hits = sum(a == b for a, b in zip(self.top, self.target, strict=True))
        return hits / len(self.target)


def score(model: nn.Module, rows: Sequence[Continuation], batches: Batches) -> list[Score]:
    """Log-probability of each row's target, and whether greedy decoding would say it.

    Args:
        batches: pads token rows; how is its matter, and decides the last bits.

    Raises:
        ValueError: the model gives NaN.
    """
    found: dict[int, Score] = {}
    for k, log_probs, top in _foretold(model, rows, batches):
        if log_probs.isnan().any():
            raise ValueError(
                f"the model's logits for token ids {rows[k].ids} are not finite; the base model's "
                "weights hold NaN or infinity, or its dtype is too narrow"
            )
        target = rows[k].target
        found[k] = Score(float(log_probs.sum()), len(target), tuple(top.tolist()) == target)
    return [found[k] for k in range(len(rows))]


def _foretold(
    model: nn.Module, rows: Sequence[Continuation], batches: Batches
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A row's number, log P of each of its target's m tokens, and the argmax there, (m,) each."""
    switches = position_switches(getattr(model, "config", None))
    parts = [(k, places) for k, row in enumerate(rows) for places in row.places(switches)]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in batches([rows[k].scoring_ids[: places.stop] for k, places in parts]):
        some = [parts[i] for i in batch.indices]
        where = [(i, place) for i, (_, places) in enumerate(some) for place in places]
        log_probs = log_probs_at(model, batch.inputs, where)  # (all target tokens, vocab)
        wanted = [token for k, places in some for token in rows[k].foretold_at(places)]
        targets = torch.tensor(wanted, device=log_probs.device)
        chosen = log_probs.gather(1, targets[:, None])[:, 0]
        sizes = [len(places) for _, places in some]
        each = zip(chosen.split(sizes), log_probs.argmax(-1).split(sizes), strict=True)
        found |= dict(zip(batch.indices, each, strict=True))
    for k, own in groupby(range(len(parts)), lambda i: parts[i][0]):
        chosen, top = map(torch.cat, zip(*(found[i] for i in own), strict=True))
        yield k, chosen, top


@torch.no_grad()
def log_probs_at(
    model: nn.Module, inputs: dict[str, Tensor], where: Sequence[tuple[int, int]]
) -> Tensor:
    """Log-probabilities of the next token at (row, position) pairs, float32 or better.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, (batch, tokens).
        where: which places; the head is run on these alone.

    Returns:
        (pairs, vocab).
    """
    with hooks.evaluating(model):
        logits, _ = hooks.logits_at(model, {**inputs, "use_cache": False}, where)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1)


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
        chat_template: put prompts through the tokenizer's chat template, as a user's message; the
            continuation is then the beginning of the answer, without a separator.

    Raises:
        ValueError: a tokenizer without offsets or a chat template, or a batch of no token.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int = 4096
    separator: str = " "
    chat_template: bool = False

    def __post_init__(self) -> None:
        tokens.require_offsets(self.tokenizer)
        if self.chat_template:
            tokens.require_chat_template(self.tokenizer)
        if self.tokens_per_batch < 1:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} holds no token; use 1 or more"
            )

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return reads_ids_on(self.model)

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None where it does not say."""
        return tokens.positions_of(self.model)

    def batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tokens.PaddedBatch]:
        """Token rows in padded batches, as few as go where each pass brings weights to a GPU."""
        few = brings_to_gpu(self.model)
        switches = position_switches(getattr(self.model, "config", None))
        return tokens.batches(rows, self.tokens_per_batch, self.device, few=few, switches=switches)

    def encode(self, prompt: str, target: str) -> Continuation:
        """Ids of a prompt and its continuation, as ``tokens.followed`` gives them.

        Raises:
            ValueError: as there; a prompt without tokens, or more than the model takes.
        """
        text, chat = self._asked(prompt), self.chat_template
        separator = "" if chat else self.separator
        ids, _, following = tokens.followed(self.tokenizer, text, target, separator, not chat)
        if not ids:
            raise ValueError(
                f"prompt {prompt!r} has no token, so nothing foretells what follows it"
            )
        row = Continuation(ids, following)
        self.require_fit(row.scoring_ids, max(ids + following), prompt)
        return row

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Ids of a prompt alone, as ``encode`` gives them."""
        return tokens.encode(self.tokenizer, self._asked(prompt), not self.chat_template)[0]

    def _asked(self, prompt: str) -> str:
        return tokens.in_chat(self.tokenizer, prompt)[0] if self.chat_template else prompt

    def require_fit(self, ids: Sequence[int], largest: int, text: str) -> None:
        """Raise ValueError for more ids than positions, or one without an embedding."""
        find = getattr(self.model, "get_input_embeddings", None)
        vocabulary = len(find().weight) if find else largest + 1
        tokens.require_fit(ids, largest, text, (self.positions, vocabulary), ADVICE)

    def read(self, pairs: Sequence[tuple[str, str]]) -> list[Reading]:
        """A reading of each (prompt, continuation), in order; equal pairs are run once.

        Raises:
            ValueError: as ``encode``, or a model that gives NaN.
        """
        distinct = list(dict.fromkeys(pairs))
        rows = [self.encode(*pair) for pair in distinct]
        found: dict[tuple[str, str], Reading] = {}
        for k, log_probs, top in _foretold(self.model, rows, self.batches):
            told = self._require_numbers(log_probs).tolist()
            found[distinct[k]] = Reading(rows[k].target, tuple(told), tuple(top.tolist()))
        return [found[pair] for pair in pairs]

    def log_probs(self, inputs: dict[str, Tensor], where: Sequence[tuple[int, int]]) -> Tensor:
        """As ``log_probs_at`` of this model; raises ValueError where that gives NaN."""
        return self._require_numbers(log_probs_at(self.model, inputs, where))

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
            self.require_fit(ids, max(ids), texts[i])
        for batch in self.batches([ids for _, ids in rows]):
            some = [rows[index] for index in batch.indices]
            places = [(k, p) for k, (_, ids) in enumerate(some) for p in range(len(ids) - 1)]
            following = [some[k][1][p + 1] for k, p in places]
            yield TextBatch(batch.inputs, places, following, [some[k][0] for k, _ in places])

    def _require_numbers(self, log_probs: Tensor) -> Tensor:
        if log_probs.isnan().any():
            raise ValueError(
                f"{type(self.model).__name__} gives logits that are NaN; its weights hold NaN or "
                "infinity, or its dtype is too narrow"
            )
        return log_probs
