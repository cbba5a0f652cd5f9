"""From edits to token rows: where the subject ends, where the target begins, which ids.

In: edits, a fast tokenizer, the contexts. Out: :class:`TokenRow`, a prompt's ids with the position
of the subject's last token, and padded batches of them. Positions come from the tokenizer's
offsets; a prompt and its target are tokenised once, together; padding is made here, on the right,
whatever the tokenizer's own setting, which is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import SLOT, Edit

SHOWN = 80  # characters of a prompt in an error


@dataclass(frozen=True)
class TokenRow:
    """One tokenised prompt: its ids, the subject's last token in them, and the ids to follow."""

    ids: tuple[int, ...]
    subject_last: int
    target: tuple[int, ...] = ()

    @property
    def key_row(self) -> TokenRow:
        """The row cut after the subject: keys are causal, so nothing behind it matters."""
        return TokenRow(self.ids[: self.subject_last + 1], self.subject_last)

    @property
    def scoring_ids(self) -> tuple[int, ...]:
        """Ids whose forward pass predicts every target token: the prompt and target[:-1]."""
        return self.ids + self.target[:-1]

    @property
    def target_positions(self) -> range:
        """Positions in ``scoring_ids`` whose logits predict the target tokens."""
        return range(len(self.ids) - 1, len(self.ids) - 1 + len(self.target))


@dataclass(frozen=True)
class EditRows:
    """An edit, tokenised: ``rows[0]`` is the bare prompt, the others follow a context each.

    ``prefix`` is the bare text up to the subject's end: edits that share it share their key.
    """

    edit: Edit
    prefix: str
    rows: tuple[TokenRow, ...]
    kl_row: TokenRow


@dataclass(frozen=True)
class Renderer:
    """Writes out prompts as the model reads them, and tokenises them.

    ``limits`` are the model's: how many positions it has (None: any), how many token ids it knows.

    Raises:
        ValueError: a tokenizer without offsets, or without a chat template where one is wanted.
    """

    tokenizer: PreTrainedTokenizerBase
    config: AlphaEditConfig
    limits: tuple[int | None, int] | None = None

    def __post_init__(self) -> None:
        name = type(self.tokenizer).__name__
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer {name} gives no character offsets, which place the subject; load a "
                "fast one (AutoTokenizer.from_pretrained(..., use_fast=True))"
            )
        if self.config.chat_template and not self.tokenizer.chat_template:
            raise ValueError(
                f"chat_template=True, but tokenizer {name} has no chat template; set one or use "
                "chat_template=False"
            )

    def edit_rows(self, edit: Edit, contexts: Sequence[str]) -> EditRows:
        """Tokenise an edit's prompt bare and behind every context, and its KL prompt.

        Raises:
            ValueError: a target without tokens, a subject the tokenizer does not see, or a prompt
                that the model has no positions or token ids for.
        """
        prompts = [edit.prompt] + [f"{context} {edit.prompt}" for context in contexts]
        rows = tuple(self._row(prompt, edit.subject, edit.target_new) for prompt in prompts)
        kl_row = self._row(self.config.kl_prompt, edit.subject, None).key_row
        text, start = self._render(edit.prompt, edit.subject)
        return EditRows(edit, text[: start + len(edit.subject)], rows, kl_row)

    def target_row(self, question: str, target: str) -> TokenRow:
        """Tokenise a whole prompt with its continuation, for scoring; no subject in it.

        Raises:
            ValueError: as ``edit_rows``.
        """
        return self._row(SLOT, question, target)

    def _render(self, prompt: str, subject: str) -> tuple[str, int]:
        """The text the model reads, and the character at which the subject starts."""
        text = prompt.replace(SLOT, subject)
        start = prompt.index(SLOT)
        if not self.config.chat_template:
            return text, start
        message = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        if not isinstance(rendered, str) or text not in rendered:
            raise ValueError(f"the chat template changes the prompt {text!r}; strip its spaces")
        return rendered, rendered.rindex(text) + start

    def _row(self, prompt: str, subject: str, target: str | None) -> TokenRow:
        text, start = self._render(prompt, subject)
        end = start + len(subject)
        suffix = "" if target is None else self._separator(text, target) + target
        ids, offsets = self._encode(text + suffix)
        border = next((i for i, (_, b) in enumerate(offsets) if b > len(text)), len(ids))
        if border < len(ids) and offsets[border][0] < len(text):
            # a token runs over the border: tokenise both sides apart, as they meet in generation
            ids, offsets = self._encode(text)
            border, ids = len(ids), ids + self._encode(suffix, special=False)[0]
        within = [i for i, (a, b) in enumerate(offsets) if a < end and b > max(start, a)]
        if not within:
            raise ValueError(f"subject {subject!r} has no token in {text!r}; check the tokenizer")
        row = TokenRow(ids[:border], within[-1])
        if target is None:
            return self._within_limits(row, text)
        if border == len(ids) or not self._encode(target.strip(), special=False)[0]:
            raise ValueError(f"target_new={target!r} has no token; check the tokenizer")
        return self._within_limits(replace(row, target=ids[border:]), text)

    def _within_limits(self, row: TokenRow, text: str) -> TokenRow:
        if self.limits is None:
            return row
        positions, vocabulary = self.limits
        length, largest = len(row.scoring_ids), max(row.ids + row.target)
        shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        if positions is not None and length > positions:
            raise ValueError(
                f"prompt {shown!r} and its target have {length} tokens, the model has {positions} "
                "positions; shorten it, or the contexts before it (context_length)"
            )
        if largest >= vocabulary:
            raise ValueError(
                f"prompt {shown!r} or its target has token id {largest}, the model has ids "
                f"0..{vocabulary - 1}; use the tokenizer that belongs to the model"
            )
        return row

    def _separator(self, text: str, target: str) -> str:
        joined = text[-1:].isspace() or target[:1].isspace() or self.config.chat_template
        return "" if joined else self.config.separator

    def _encode(
        self, text: str, special: bool | None = None
    ) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Ids and character offsets; BOS once (a chat template brings its own), no closing EOS."""
        wanted = not self.config.chat_template if special is None else special
        encoded = self.tokenizer(text, add_special_tokens=wanted, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        while (
            ids and offsets[-1][0] == offsets[-1][1] and ids[-1] in self.tokenizer.all_special_ids
        ):
            ids.pop()
            offsets.pop()
        return tuple(ids), offsets


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
    rows: Sequence[Sequence[int]], tokens_per_batch: int, device: torch.device
) -> Iterator[PaddedBatch]:
    """Padded batches of at most ``tokens_per_batch`` tokens, rows sorted by length.

    A row longer than that makes a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index]) > tokens_per_batch:
            yield PaddedBatch(padded([rows[i] for i in batch], device), batch)
            batch = []
        batch.append(index)
    if batch:
        yield PaddedBatch(padded([rows[i] for i in batch], device), batch)
