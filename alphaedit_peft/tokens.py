"""Texts to token ids and padded batches, for whatever runs a model over prompts and continuations.

In: texts, a fast tokenizer. Out: ids of a prompt and of what follows it, a subject's tokens, padded
batches. One law holds for every row: the prompt's ids are those that the tokenizer gives the prompt
by itself, and the target's complete them to the text. Padding is made here, on the right, whatever
the tokenizer's own setting, which is never touched.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alphaedit_peft.messages import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 80  # characters of a prompt in an error
# Padded tokens that take as long as one more pass of fewer: thin products and calls on a CPU, the
# launches of hundreds of kernels on a GPU.
PASS_COST = {"cpu": 32, "cuda": 512}
CONTENT = "\ue000"  # stands for a message, to see where a chat template puts it

Offsets = list[tuple[int, int]]


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a slow tokenizer: it does not say which characters its tokens stand for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets, which place the "
            "subject and the target; load a fast one (AutoTokenizer.from_pretrained(..., "
            "use_fast=True))"
        )


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template, where prompts are to go through one."""
    if not tokenizer.chat_template:
        name = type(tokenizer).__name__
        raise ValueError(
            f"chat_template=True, but tokenizer {name} has no chat template; set one or use "
            "chat_template=False"
        )


def in_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int]:
    """A user's message in the chat template, ready for the answer, and where it begins there.

    The template brings its own special tokens and spaces.

    Raises:
        ValueError: a template that fails, or changes the message.
    """
    rendered = _chat(tokenizer, text)
    before, _, after = _chat(tokenizer, CONTENT).rpartition(CONTENT)
    before = before.replace(CONTENT, text)
    if rendered != before + text + after:
        raise ValueError(
            f"the chat template changes the prompt {shown(text, SHOWN)}; strip its spaces, or set "
            "a template that takes it as it is"
        )
    return rendered, len(before)


def _chat(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    said: list[dict[str, str]] = [{"role": "user", "content": content}]
    try:
        found = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja's own, or what the template raises
        raise ValueError(
            f"the chat template of tokenizer {type(tokenizer).__name__} does not take a user's "
            f"message alone: {shown(str(error), SHOWN)}; set another one or use "
            "chat_template=False"
        ) from error
    return str(found)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True
) -> tuple[tuple[int, ...], Offsets]:
    """Ids and character offsets of a text; ``special`` adds BOS where the tokenizer does.

    The ids are ``tokenizer(text).input_ids``, without a closing EOS or SEP that the tokenizer adds,
    since a continuation is to follow.
    """
    # verbose=False: no advice about lengths, ``require_fit`` sees to them
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    length, opened = len(ids), int(ids[:1] == [tokenizer.bos_token_id])
    while length > opened and added[length - 1]:
        length -= 1
    return tuple(ids[:length]), encoded["offset_mapping"][:length]


def followed(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str,
    separator: str = " ",
    special: bool = True,
) -> tuple[tuple[int, ...], Offsets, tuple[int, ...]]:
    """Ids of a prompt, their offsets, and ids of the target that follows it.

    The prompt's ids are those of the prompt alone. The target's are the rest of the whole text's
    where these begin with the prompt's; else those of the target alone, without the space that some
    tokenizers put before any text: so that both decode to what the whole text does.

    Args:
        separator: stands between the two, where neither brings a space.
        special: see ``encode``.

    Raises:
        ValueError: a target without tokens, or one that this tokenizer cannot put after the prompt.
    """
    suffix = separator_between(prompt, target, separator) + target
    ids, offsets = encode(tokenizer, prompt, special)
    whole, spans = encode(tokenizer, prompt + suffix, special)
    fitting = [whole[len(ids) :]]
    # one token for all that is unknown hides what it takes of the suffix
    unknown = ids[-1:] == (tokenizer.unk_token_id,)
    if whole[: len(ids)] != ids or (unknown and spans[len(ids) - 1][1] > len(prompt)):
        said = (_decoded(tokenizer, whole), _decoded(tokenizer, ids) + suffix)
        own = [following for following in _alone(tokenizer, suffix) if following]
        fitting = [following for following in own if _decoded(tokenizer, ids + following) in said]
    if not fitting:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has no tokens that put {shown(suffix, SHOWN)} "
            f"right after {shown(prompt, SHOWN)}; let a word end where the prompt does, or set a "
            "separator"
        )
    if not _decoded(tokenizer, fitting[0]).strip():
        raise ValueError(f"target {shown(target, SHOWN)} has no token; check the tokenizer")
    return ids, offsets, fitting[0]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _alone(tokenizer: PreTrainedTokenizerBase, suffix: str) -> Iterator[tuple[int, ...]]:
    """Ids of a suffix by itself, as the tokenizer gives them and without the first character."""
    ids = encode(tokenizer, suffix, special=False)[0]
    yield ids
    first = tokenizer.convert_ids_to_tokens(list(ids[:1]))
    with suppress(Exception):  # the library's own, from a vocabulary that lacks a character
        found = tokenizer.backend_tokenizer.model.tokenize("".join(first)[1:])
        yield (*(token.id for token in found), *ids[1:])


def subject_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    span: tuple[int, int],
    encoded: tuple[tuple[int, ...], Offsets],
    special: bool = True,
) -> tuple[range, str]:
    """Places of a subject's tokens in a text, and what the last of them holds beyond the subject.

    At the last one is an edit's key. Where it ends is seen from the offsets, and from the text that
    ends with the subject, since a tokenizer may trim offsets or change characters.

    Args:
        span: characters [start, end) of the subject; outer white space is the prompt's.
        encoded: ids and offsets of the text; ``special`` as they were made with.

    Returns:
        The places, and punctuation or space that is merged into the last token, such as ")?".

    Raises:
        ValueError: a subject without tokens, or whose last token holds more of a word.
    """
    ids, offsets = encoded
    start, end = span
    subject = shown(text[start:end], SHOWN)
    within = [i for i, (a, b) in enumerate(offsets) if a < end and b > max(start, a)]
    if not within:
        raise ValueError(
            f"subject {subject} has no token in {shown(text, SHOWN)}; check the tokenizer"
        )
    places = range(within[0], within[-1] + 1)
    head = encode(tokenizer, text[:end], special)[0]
    beyond = text[end : offsets[within[-1]][1]]
    if not beyond and head != ids[: places.stop]:
        beyond = _decoded(tokenizer, ids[: places.stop]).removeprefix(_decoded(tokenizer, head))
    if any(unicodedata.category(c)[0] in "LMNC" for c in beyond if not c.isspace()):
        last = _decoded(tokenizer, ids[places.stop - 1 : places.stop])
        raise ValueError(
            f"subject {subject} ends within a token in {shown(text, SHOWN)}: {last!r} holds more "
            "of a word; let the subject end where a word does"
        )
    return places, beyond


def positions_of(model: nn.Module) -> int | None:
    """How many positions a model's config states; None where it states none."""
    return getattr(text_config(getattr(model, "config", None)), "max_position_embeddings", None)


def text_config(config: Any) -> Any:
    """The part of a model's config that is about text, of one that also sees or hears."""
    return getattr(config, "get_text_config", lambda: config)()


def separator_between(text: str, target: str, separator: str) -> str:
    """What stands between a prompt and its continuation: nothing where either brings a space."""
    return "" if text[-1:].isspace() or target[:1].isspace() else separator


def require_fit(
    ids: Sequence[int], largest: int, text: str, limits: tuple[int | None, int], advice: str
) -> None:
    """Refuse a row ``ids`` that the model has no positions or no embeddings for.

    Args:
        ids: what the model is to read.
        largest: the largest token id in it and in what is to follow.
        text: the prompt, shown in the error.
        limits: how many positions the model has (None: any), and how many token ids it knows.
        advice: what to shorten.
    """
    (positions, vocabulary), prompt = limits, shown(text, SHOWN)
    if positions is not None and len(ids) > positions:
        raise ValueError(
            f"prompt {prompt} and its target have {len(ids)} tokens, the model has {positions} "
            f"positions; {advice}"
        )
    if largest >= vocabulary:
        raise ValueError(
            f"prompt {prompt} or its target has token id {largest}, the model has ids "
            f"0..{vocabulary - 1}; use the tokenizer that belongs to the model"
        )


@dataclass(frozen=True)
class PaddedBatch:
    """Rows padded on the right: ``inputs`` for the model, and which rows these are."""

    inputs: dict[str, Tensor]
    indices: list[int]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Ids (batch, tokens) padded with 0 on the right, and their attention mask."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches(
    rows: Sequence[Sequence[int]],
    tokens_per_batch: int,
    device: torch.device,
    behind: Sequence[int] = (),
    *,
    few: bool = False,
    switches: Sequence[int] = (),
) -> Iterator[PaddedBatch]:
    """Padded batches of at most ``tokens_per_batch`` tokens, rows of like length together.

    A row longer than that makes a batch of its own. The other arguments: see ``by_length``.
    """
    lengths = [len(row) for row in rows]
    for batch in by_length(lengths, device, tokens_per_batch, behind, few=few, switches=switches):
        yield PaddedBatch(padded([rows[i] for i in batch], device), batch)


def pass_cost(device: torch.device) -> int:
    """Tokens that take as long as one more pass of fewer; see ``PASS_COST``."""
    return PASS_COST.get(device.type, PASS_COST["cuda"])


def by_length(
    lengths: Sequence[int],
    device: torch.device,
    most: float = float("inf"),
    behind: Sequence[int] = (),
    *,
    few: bool = False,
    switches: Sequence[int] = (),
) -> list[list[int]]:
    """Indices in batches to be padded to their longest, from the shortest up.

    The borders are those with the least work, where a further pass costs as much as some padding,
    ``PASS_COST`` tokens of it; then batches of more than ``most`` padded tokens are cut. Tokens
    that rows follow in a cache, ``behind`` each, count there too: they take room, if no time.
    ``few`` makes as few batches as it can: where each pass brings weights to a GPU, it costs more
    than any padding. Rows on either side of one of ``switches`` (``position_switches``), with what
    is behind them, never share a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    sides: dict[int, list[int]] = {}
    for i in order:
        whole = lengths[i] + (behind[i] if behind else 0)
        sides.setdefault(bisect_left(switches, whole), []).append(i)
    cost, found = pass_cost(device), []
    cuts = ([side] if few else _least_padding(side, lengths, cost) for side in sides.values())
    for some in chain.from_iterable(cuts):
        batch: list[int] = []
        width = 0
        for index in some:
            before = behind[index] if behind else 0
            if batch and (len(batch) + 1) * (max(width, before) + lengths[index]) > most:
                found.append(batch)
                batch, width = [], 0
            batch.append(index)
            width = max(width, before)
        found.append(batch)
    return found


def _least_padding(order: Sequence[int], lengths: Sequence[int], cost: int) -> list[Sequence[int]]:
    """Cut a sorted order where padded tokens plus ``cost`` a batch are fewest."""
    ends = [k for k in range(1, len(order)) if lengths[order[k - 1]] < lengths[order[k]]]
    ends.append(len(order))
    best, cut = {0: 0}, {}  # the least work up to an end, and where its last batch starts
    for end in ends if order else []:
        longest = lengths[order[end - 1]]
        work = {start: least + cost + (end - start) * longest for start, least in best.items()}
        cut[end] = min(work, key=lambda start: work[start])
        best[end] = work[cut[end]]
    found: list[Sequence[int]] = []
    end = len(order)
    while end:
        found.insert(0, order[cut[end] : end])
        end = cut[end]
    return found
