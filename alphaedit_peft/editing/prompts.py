"""From edits to token rows: where the subject ends, where the target begins, which ids.

In: edits, a fast tokenizer, the contexts. Out: :class:`TokenRow`, a prompt's ids with the position
of the subject's last token. Positions come from the tokenizer's offsets; a prompt and its target
are tokenised once, together (see ``tokens``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphaedit_peft import tokens
from alphaedit_peft.edits import SLOT, Edit
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
    ``anchors`` are prompts of the edit and the config whose answers are kept.
    """

    edit: Edit
    prefix: str
    rows: tuple[TokenRow, ...]
    kl_row: TokenRow
    anchors: tuple[TokenRow, ...] = ()


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
        if self.settings.chat_template and not self.tokenizer.chat_template:
            name = type(self.tokenizer).__name__
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
        kl_row = self._row(self.settings.kl_prompt, edit.subject, None).key_row
        text, start = self._render(edit.prompt, edit.subject)
        anchors = dict.fromkeys([*edit.anchors, *(self.settings.anchors or ())])
        kept = tuple(self._row(a, edit.subject, None) for a in anchors if a != edit.prompt)
        return EditRows(edit, text[: start + len(edit.subject)], rows, kl_row, kept)

    def target_row(self, question: str, target: str) -> TokenRow:
        """Tokenise a whole prompt with its continuation, for scoring; no subject in it."""
        return self._row(SLOT, question, target)

    def _render(self, prompt: str, subject: str) -> tuple[str, int]:
        """The text the model reads, and the character at which the subject starts."""
        text = prompt.replace(SLOT, subject)
        start = prompt.index(SLOT)
        if not self.settings.chat_template:
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
        suffix, plain = target or "", not self.settings.chat_template  # a template brings its BOS
        if target is not None and plain:
            suffix = tokens.separator_between(text, target, self.settings.separator) + target
        ids, offsets, border = tokens.joined(self.tokenizer, text, suffix, plain)
        subject_last = tokens.last_token(offsets, start, end)
        if subject_last is None:
            raise ValueError(f"subject {subject!r} has no token in {text!r}; check the tokenizer")
        row = TokenRow(ids[:border], ids[border:], subject_last)
        if target is not None and not (
            row.target and tokens.encode(self.tokenizer, target.strip(), False)[0]
        ):
            raise ValueError(f"target_new={target!r} has no token; check the tokenizer")
        if self.limits is not None:
            advice = "shorten it, or the contexts before it (context_length)"
            tokens.require_fit(row.scoring_ids, max(ids), text, self.limits, advice)
        return row
