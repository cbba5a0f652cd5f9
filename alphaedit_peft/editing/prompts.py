"""From edits to token rows: where the subject ends, where the target begins, which ids.

In: edits, a fast tokenizer, the contexts. Out: :class:`TokenRow`, a prompt's ids with the position
of the subject's last token. Which ids, and where the subject ends in them, ``tokens`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphaedit_peft import tokens
from alphaedit_peft.edits import Edit, filled
from alphaedit_peft.log_probs import Continuation
from alphaedit_peft.settings import EditOptions


@dataclass(frozen=True)
class TokenRow(Continuation):
    """One tokenised prompt: its ids, those to follow, and the subject's last token in it."""

    subject_last: int

    @property
    def key_row(self) -> TokenRow:
        """The row cut after the subject: keys are causal, so nothing behind it matters."""
        return TokenRow(self.ids[: self.subject_last + 1], (), self.subject_last)


@dataclass(frozen=True)
class EditRows:
    """An edit, tokenised: ``rows[0]`` is the bare prompt, the others follow a context each.

    ``prefix`` is the bare text up to the subject's end: edits that share it share their key.
    ``anchors`` are prompts of the edit and the config whose answers are kept. ``beyond`` is what
    the subject's last token holds besides it, in the bare prompt.
    """

    edit: Edit
    prefix: str
    rows: tuple[TokenRow, ...]
    kl_row: TokenRow
    anchors: tuple[TokenRow, ...] = ()
    beyond: str = ""


@dataclass(frozen=True)
class Renderer:
    """Writes out prompts as the model reads them, and tokenises them.

    ``limits`` are the model's: how many positions it has (None: any), how many token ids it knows.

    Raises:
        ValueError: a tokenizer without offsets, or without a chat template where one is wanted.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: EditOptions
    limits: tuple[int | None, int] | None = None

    def __post_init__(self) -> None:
        tokens.require_offsets(self.tokenizer)
        if self.settings.chat_template:
            tokens.require_chat_template(self.tokenizer)

    def edit_rows(self, edit: Edit, contexts: Sequence[str]) -> EditRows:
        """Tokenise an edit's prompt bare and behind every context, and its KL prompt.

        Raises:
            ValueError: a subject or a target that the tokenizer cannot place in the prompt (see
                ``tokens``), or a prompt that the model has no positions or token ids for.
        """
        subject, target = edit.subject, edit.target_new
        prompts = [edit.prompt] + [
            context + tokens.separator_between(context, edit.question, " ") + edit.prompt
            for context in contexts
        ]
        rows, beyond = zip(*(self._row(p, subject, target) for p in prompts), strict=True)
        kl_row = self._row(self.settings.kl_prompt, subject)[0].key_row
        text, (_, end) = self._render(edit.prompt, subject)
        anchors = dict.fromkeys([*edit.anchors, *(self.settings.anchors or ())])
        kept = tuple(self._row(a, subject)[0] for a in anchors if a != edit.prompt)
        return EditRows(edit, text[:end], rows, kl_row, kept, beyond[0])

    def target_row(self, question: str, target: str) -> Continuation:
        """Tokenise a whole prompt with its continuation, for scoring; no subject in it."""
        text = self._render("{}", question)[0]
        ids, _, following = self._followed(text, target)
        return Continuation(ids, following)

    def _render(self, prompt: str, subject: str) -> tuple[str, tuple[int, int]]:
        """The text the model reads, and the subject's characters [start, end) in it."""
        text, (start, end) = filled(prompt, subject)
        if not self.settings.chat_template:
            return text, (start, end)
        rendered, before = tokens.in_chat(self.tokenizer, text)
        return rendered, (before + start, before + end)

    def _followed(
        self, text: str, target: str | None
    ) -> tuple[tuple[int, ...], tokens.Offsets, tuple[int, ...]]:
        """Ids of a rendered text and its target, refused where the model cannot take them."""
        chat = self.settings.chat_template  # a template brings its own BOS and space
        if target is None:
            ids, offsets = tokens.encode(self.tokenizer, text, not chat)
            following: tuple[int, ...] = ()
        else:
            separator = "" if chat else self.settings.separator
            ids, offsets, following = tokens.followed(
                self.tokenizer, text, target, separator, not chat
            )
        if self.limits is not None:
            row = Continuation(ids, following)
            advice = "shorten it, or the contexts before it (context_length)"
            largest = max(ids + following, default=0)
            tokens.require_fit(row.scoring_ids, largest, text, self.limits, advice)
        return ids, offsets, following

    def _row(self, prompt: str, subject: str, target: str | None = None) -> tuple[TokenRow, str]:
        """A prompt's row, and what the subject's last token holds beyond the subject."""
        text, span = self._render(prompt, subject)
        ids, offsets, following = self._followed(text, target)
        special = not self.settings.chat_template
        places, beyond = tokens.subject_tokens(self.tokenizer, text, span, (ids, offsets), special)
        return TokenRow(ids, following, places[-1]), beyond
