"""Where a model recalls facts: causal tracing by token and block (ROME, section 2 and appendix B).

In: a causal language model, facts it knows. Out: :class:`Located`: how much of P(target) comes back
when, in a run whose subject is corrupted, one clean state is put back. The indirect effect of a
state is P(restored) - P(corrupted), as a mean over noise samples, then over tokens of a class.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import hooks, tokens
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import Edit
from alphaedit_peft.evaluation.summary import Estimate, bootstrap
from alphaedit_peft.progress import counting
from alphaedit_peft.studies.base import Progress
from alphaedit_peft.studies.tracing import MLP, STATES, Row, Run, Tracer

CLASSES = ("first subject", "middle subject", "last subject", "first after", "further", "last")
LAST_SUBJECT = CLASSES[2]
WINDOW = 0.2  # of the blocks: ROME restores the MLPs of 10 of GPT2-XL's 48 together


@dataclass(frozen=True)
class FactTrace:
    """One fact, traced: the prompt and the continuation whose probability is traced."""

    id: str
    question: str
    target: str
    clean: float  # P(target) untouched
    corrupted: float  # P(target) with a corrupted subject, a mean over the samples
    tokens: tuple[str, ...]  # of the prompt from the subject on; what is before it cannot matter
    classes: tuple[str, ...]  # one of ``CLASSES`` for each token
    effects: Mapping[str, tuple[tuple[float, ...], ...]]  # state -> (tokens, blocks), indirect

    def of_class(self, state: str, name: str) -> tuple[float, ...] | None:
        """Effects by block, (blocks,), a mean over a class's tokens; None where there are none."""
        rows = [row for row, c in zip(self.effects[state], self.classes, strict=True) if c == name]
        return tuple(mean(column) for column in zip(*rows, strict=True)) if rows else None


@dataclass(frozen=True)
class Located:
    """Traces of the facts that a model knows, and how they were made."""

    traces: tuple[FactTrace, ...]
    set_aside: int  # facts it does not know
    deviation: float  # of the embeddings of the facts' subjects, over all entries
    noise: float  # its standard deviation, in units of ``deviation``
    samples: int  # draws of the noise
    window: int  # neighbouring blocks whose MLP outputs are restored together
    blocks: int  # of the model

    @property
    def clean(self) -> Estimate:
        """P(target) untouched, over the facts."""
        return bootstrap([trace.clean for trace in self.traces])

    @property
    def corrupted(self) -> Estimate:
        """P(target) with corrupted subjects, over the facts."""
        return bootstrap([trace.corrupted for trace in self.traces])

    def effect(self, state: str, name: str) -> tuple[Estimate, ...]:
        """Average indirect effect of a class by block, with intervals over facts; or nothing."""
        found = [trace.of_class(state, name) for trace in self.traces]
        rows = [row for row in found if row is not None]
        return tuple(bootstrap(column) for column in zip(*rows, strict=True))

    def effects(self, state: str) -> dict[str, tuple[Estimate, ...]]:
        """``effect`` of every class that occurs."""
        found = {name: self.effect(state, name) for name in CLASSES}
        return {name: values for name, values in found.items() if values}

    @property
    def peak(self) -> int:
        """The block whose MLP restores most at the subject's last token."""
        values = [estimate.value for estimate in self.effect(MLP, LAST_SUBJECT)]
        return values.index(max(values))

    @property
    def near_peak(self) -> tuple[int, ...]:
        """The peak, and blocks whose difference from it, fact by fact, has 0 in its interval."""
        rows = [trace.of_class(MLP, LAST_SUBJECT) or () for trace in self.traces]
        gaps = [
            bootstrap([row[self.peak] - row[block] for row in rows]) for block in range(self.blocks)
        ]
        return tuple(block for block, gap in enumerate(gaps) if gap.low <= 0 <= gap.high)

    @property
    def suggested_layers(self) -> tuple[int, ...]:
        """Consecutive blocks up to the peak, five in deep models, three in others (MEMIT, 4.3).

        One block stays above the last of them, for an edit to act through.
        """
        last = max(0, min(self.peak, self.blocks - 2))
        count = 5 if self.blocks >= 16 else 3  # as in default_rewrite_layers
        return tuple(range(max(0, last - count + 1), last + 1))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        own = asdict(self)
        facts = own.pop("traces")
        effects = {state: self.effects(state) for state in STATES}
        return {
            **own,
            "clean": self.clean.to_json(),
            "corrupted": self.corrupted.to_json(),
            "effects": {
                state: {name: [one.to_json() for one in values] for name, values in found.items()}
                for state, found in effects.items()
            },
            "peak": self.peak,
            "near_peak": list(self.near_peak),
            "suggested_layers": list(self.suggested_layers),
            "facts": list(facts),
        }


def locate(  # noqa: PLR0913
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    config: AlphaEditConfig | None = None,
    *,
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> Located:
    """Trace facts through a model: corrupt the subject, restore one state, see what comes back.

    Traced is ``target_true`` where greedy decoding says it (ROME keeps to what a model knows); of
    an edit without one, the token that the model itself puts next.

    Args:
        model: a bare causal language model of a known family, or named in ``config``.
        tokenizer: a fast one.
        edits: the facts; their ``target_new`` is not used.
        config: names of modules, separator, ``tokens_per_batch``.
        noise: standard deviations of the Gaussian noise on the subject's embeddings, in units of
            that of these embeddings over all facts; ROME's is 3.
        samples: draws of the noise for each fact, by ``seed``.
        window: neighbouring MLP outputs restored together; None: a fifth of the blocks.
        progress: called with a line of text after each fact.

    Raises:
        ValueError: a number out of range, no fact, or none that the model knows.
    """
    settings, architecture = (config or AlphaEditConfig()).resolve(model)
    blocks = architecture.num_blocks
    window = max(1, round(WINDOW * blocks)) if window is None else window
    for name, value, low in (("noise", noise, 0), ("samples", samples, 1), ("window", window, 1)):
        if not low <= value < float("inf"):
            raise ValueError(f"{name}={value} is out of range; use {low} or more")
    tracer = Tracer(model, architecture, settings.tokens_per_batch)
    with torch.no_grad(), hooks.evaluating(model):
        rows = [fact_row(tracer, tokenizer, edit, settings.separator) for edit in edits]
        said = [(edit, known(tracer, row)) for edit, row in zip(edits, rows, strict=True)]
        facts = [(edit, row) for edit, row in said if row is not None]
        if not facts:
            raise ValueError(
                f"the model knows none of the {len(edits)} facts: greedy decoding gives no "
                "target_true; pass facts it knows, or edits without target_true"
            )
        deviation = tracer.deviation([row for _, row in facts])
        traces = []
        with counting("facts traced", len(facts), "fact", bar=False) as bar:
            for number, (edit, row) in enumerate(facts, 1):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {edit.id}".encode()))
                shape = (samples, len(row.subject), tracer.width)
                draws = torch.randn(shape, generator=generator, dtype=torch.float64)
                added = draws * noise * deviation
                traces.append(trace_fact(tracer, tokenizer, edit, row, added, window))
                progress(f"{number} of {len(facts)} facts traced")
                bar.update(1)
    aside = len(edits) - len(facts)
    return Located(tuple(traces), aside, deviation, noise, samples, window, blocks)


def fact_row(tracer: Tracer, tokenizer: PreTrainedTokenizerBase, edit: Edit, separator: str) -> Row:
    """Ids of a fact, with the subject's place; no target of an edit without ``target_true``.

    ValueError: a slow tokenizer, a subject or target that it cannot place in the prompt, or a
    prompt that the model has no positions or ids for.
    """
    tokens.require_offsets(tokenizer)
    text = edit.question
    target: tuple[int, ...] = ()
    ids, offsets = tokens.encode(tokenizer, text)
    if edit.target_true:
        ids, offsets, target = tokens.followed(tokenizer, text, edit.target_true, separator)
    places, _ = tokens.subject_tokens(tokenizer, text, edit.subject_span, (ids, offsets))
    tracer.require_fit(ids + target, text)
    return Row(ids, target, places)


def known(tracer: Tracer, row: Row) -> Row | None:
    """The row with a target that the model says by itself; None where it says another."""
    if not row.target:
        return replace(row, target=(tracer.next_token(row),))
    return row if tracer.says(row) else None


def token_classes(row: Row) -> tuple[str, ...]:
    """The class of every token of the prompt from the subject on.

    A subject of one token has only a last one; a token between the subject and the prompt's last
    is the first after it, or a further one. Where the prompt ends with the subject, no token is
    after it.
    """
    first, last = row.subject[0], row.subject[-1]
    end = len(row.ids) - 1
    names = dict.fromkeys(row.subject, CLASSES[1])
    names |= dict.fromkeys(range(last + 1, end + 1), CLASSES[4])
    names |= {end: CLASSES[5], first: CLASSES[0]}
    if last + 1 < end:
        names[last + 1] = CLASSES[3]
    names[last] = LAST_SUBJECT
    return tuple(names[position] for position in range(first, end + 1))


def trace_fact(
    tracer: Tracer,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    row: Row,
    noise: Tensor,
    window: int,
) -> FactTrace:
    """Every state of one fact restored in turn, under every draw of the noise.

    ``noise`` (samples, subject's tokens, d) is added to the embeddings; of MLP outputs ``window``
    neighbours are restored for block l, l - w // 2 the first.
    """
    clean, states = tracer.clean(row)
    places = range(row.subject[0], len(row.ids))
    samples, blocks = range(len(noise)), range(tracer.architecture.num_blocks)
    runs = [Run(sample) for sample in samples]
    for state, place, block in product(STATES, places, blocks):
        names = tracer.names(state, block, window if state == MLP else 1)
        runs += [Run(sample, names, (place,)) for sample in samples]
    found = tracer.probabilities(row, states, noise, runs)
    corrupted = float(found[: len(samples)].mean())
    shape = (len(STATES), len(places), len(blocks), len(samples))
    effects = found[len(samples) :].reshape(shape).mean(-1) - corrupted  # (states, tokens, blocks)
    by_state = dict(zip(STATES, effects.tolist(), strict=True))
    return FactTrace(
        edit.id,
        edit.question,
        str(tokenizer.decode(list(row.target))).strip(),
        clean,
        corrupted,
        tuple(str(tokenizer.decode([row.ids[place]])) for place in places),
        token_classes(row),
        {state: tuple(map(tuple, lines)) for state, lines in by_state.items()},
    )
