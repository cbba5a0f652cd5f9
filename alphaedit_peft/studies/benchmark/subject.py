"""What a benchmark needs before the clock runs: settings, contexts and statistics of a model.

In: a model, a tokenizer. Out: an ``AlphaEditConfig`` with the paper's settings, and
:class:`Statistics`: key moments and a null space, collected over texts of random words or drawn at
random, with the seconds that each part took.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import computes_on
from alphaedit_peft.edits import Edit
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.nullspace.spectrum import LayerSpace
from alphaedit_peft.studies.benchmark.machine import timed
from alphaedit_peft.tokens import encode, require_offsets

TOKENS_PER_DIRECTION = 2  # enough for a moment that can be inverted; its quality plays no part
RAISED = 1e-3  # of the mean eigenvalue, added to every one
MODE = "rank"


@dataclass(frozen=True, eq=False)
class Statistics:
    """A null space and key moments of one model, and the seconds that making them took."""

    null_space: NullSpace
    key_moments: KeyMoments | None = None
    origin: str = "given"
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: a bare model with its tokenizer, and the settings of its edits.

    Attributes:
        name: for the record.
        model: bare; it is left with the bits it had.
        tokenizer: of the model, fast.
        config: not resolved; see ``benchmark_config``.
        random: whether the weights are random.
    """

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: AlphaEditConfig
    random: bool = True

    @property
    def weights(self) -> Tensor:
        """The input embeddings: they tell the model's dtype; empty where kept elsewhere."""
        return self.model.get_input_embeddings().weight  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return computes_on(self.model.get_input_embeddings())  # type: ignore[operator]


def benchmark_config(
    rewrite_layers: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    stop_loss: float = 0.0,
    autocast: str | None = None,
    seed: int = 0,
) -> AlphaEditConfig:
    """The paper's settings, but that every step is run.

    No edit of a random model would reach the paper's ``stop_loss``, so the loss at which an edit is
    done is 0 by default, for every model and on both sides of a comparison. Nothing is warned of.

    Args:
        rewrite_layers: None: the paper's of a model of that shape, or by depth.
        steps: loss evaluations; None: the paper's of a model of that shape, or 25.
        stop_loss: the loss at which an edit is done.
        autocast: see ``AlphaEditConfig``.
        seed: of the contexts.

    Raises:
        ValueError: as ``AlphaEditConfig``.
    """
    values = {"autocast": autocast} if autocast else {}
    config = AlphaEditConfig.from_json({"preset": "paper", **values})
    return replace(
        config,
        rewrite_layers=None if rewrite_layers is None else list(rewrite_layers),
        steps=steps,
        stop_loss=stop_loss,
        seed=seed,
        on_conflict="replace",
        capacity_bound=0,
    )


def collect_statistics(subject: Subject, tokens: int | None = None, seed: int = 0) -> Statistics:
    """Key moments over texts of random words, and the null space that keeps half the directions.

    Half is the dearest choice: a thinner null space, or a thinner complement, projects in less. A
    thousandth of the mean eigenvalue is added to each, so that MEMIT can invert moments of so few
    and such even texts.

    Args:
        subject: the model.
        tokens: how many; None: twice the width of the rewrite modules.
        seed: of the texts.

    Raises:
        ValueError: fewer tokens than the rewrite modules are wide, or a model or tokenizer that
            cannot be used.
    """
    width = _width(subject)
    wanted = TOKENS_PER_DIRECTION * width if tokens is None else tokens
    texts = random_texts(subject.tokenizer, wanted, seed=seed)
    moments: list[KeyMoments] = []
    spaces: list[NullSpace] = []

    def collect() -> None:
        moments.append(
            KeyMoments.collect(
                subject.model,
                subject.tokenizer,
                texts,
                subject.config,
                max_tokens=wanted,
                progress=False,
            )
        )
        for moment in moments[0].moments.values():
            moment.diagonal().add_(RAISED * moment.diagonal().mean())

    def decompose() -> None:
        with warnings.catch_warnings():  # that ten tokens for each direction are advised
            warnings.simplefilter("ignore", UserWarning)
            spaces.append(moments[0].null_space(width // 2, MODE, reach=1.0))

    seconds = {
        "collected": timed(collect, subject.device),
        "decomposed": timed(decompose, subject.device),
    }
    return Statistics(spaces[0], moments[0], f"{moments[0].tokens} tokens, random words", seconds)


def random_statistics(subject: Subject, seed: int = 0) -> Statistics:
    """A random half of all directions as null space, and moments of random keys: made quickly.

    For widths whose eigenvectors take long. The shapes, and so the times of edits, are those of
    collected statistics.

    Raises:
        ValueError: a model that cannot be edited.
    """
    full, architecture = subject.config.resolve(subject.model)
    width, layers = _width(subject), full.rewrite_layers or []
    random = torch.Generator(subject.device).manual_seed(seed)
    moments, parts = {}, {}

    def make() -> None:
        for layer in layers:
            keys = torch.randn(2 * width, width, generator=random, device=subject.device)
            parts[layer] = random_half(width, random)
            moments[layer] = (keys.T @ keys / (2 * width)).cpu()

    seconds = {"drawn": timed(make, subject.device)}
    names = {layer: architecture.rewrite_name(layer) for layer in layers}
    space = NullSpace(parts, width - width // 2, MODE, 2 * width)
    return Statistics(space, KeyMoments(moments, 2 * width, names), "random keys", seconds)


def random_half(width: int, random: torch.Generator) -> LayerSpace:
    """A random half of all directions, drawn where the generator is, and rising eigenvalues."""
    drawn = torch.randn(width, width // 2, generator=random, device=random.device)
    return LayerSpace(torch.linalg.qr(drawn).Q.cpu(), torch.linspace(0, 1, width), False)


def _width(subject: Subject) -> int:
    """d_in of the rewrite modules."""
    full, architecture = subject.config.resolve(subject.model)
    first = (full.rewrite_layers or [0])[0]
    weight: Tensor = subject.model.get_submodule(architecture.rewrite_name(first)).weight  # type: ignore[assignment]
    return int(weight.shape[0 if architecture.conv1d else 1])


FEWEST, ENOUGH = 8, 2000  # words to make edits of
SPACES = "ĠĊ▁"  # what stands for white space in vocabularies
BEFORE = "is"  # a word to put in front when words are tried


@dataclass(frozen=True)
class Lengths:
    """How many tokens the parts of an edit have: one of each tuple, equally likely."""

    before: tuple[int, ...]
    subject: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]


# Quartiles of GPT-2 tokens. CounterFact: nothing mostly, 3 to 5, 2 to 4, 1; zsRE: 3 to 5, 3 to 5,
# 1 to 3, 2 to 4.
LENGTHS = {
    "counterfact": Lengths((0, 0, 0, 3), (3, 4, 5), (3, 4, 5), (1,)),
    "zsre": Lengths((3, 4, 5), (3, 4, 5), (2, 3, 4), (2, 3, 4)),
}


def made_up_edits(
    tokenizer: PreTrainedTokenizerBase, count: int, requests: str = "counterfact", seed: int = 0
) -> tuple[Edit, ...]:
    """Edits of random words, each about a subject of its own.

    Args:
        tokenizer: a fast one; the words are tokens of its vocabulary.
        count: how many.
        requests: whose lengths, a name of ``LENGTHS``.
        seed: of the choice; torch's and Python's random state play no part.

    Raises:
        ValueError: an unknown name, a slow tokenizer, or too few words for so many edits.
    """
    if requests not in LENGTHS:
        raise ValueError(f"requests={requests!r} is unknown; use one of {sorted(LENGTHS)}")
    lengths, random = LENGTHS[requests], Random(seed)
    words = known_words(tokenizer, random)
    possible = sum(len(words) ** length for length in set(lengths.subject))
    if 2 * count > possible:
        raise ValueError(
            f"{len(words)} words make {possible} subjects, too few to draw {count} different ones; "
            "take fewer edits, or give edits of your own"
        )
    edits: dict[str, Edit] = {}
    while len(edits) < count:
        before, subject, after, target = (
            " ".join(random.choices(words, k=random.choice(choices)))
            for choices in (lengths.before, lengths.subject, lengths.after, lengths.target)
        )
        edits.setdefault(subject, Edit(subject, f"{before} {{}} {after}".strip(), target))
    return tuple(edits.values())


def random_texts(
    tokenizer: PreTrainedTokenizerBase, tokens: int, length: int = 100, seed: int = 0
) -> list[str]:
    """Texts of ``length`` random words, at least ``tokens`` in all."""
    random = Random(seed)
    words = known_words(tokenizer, random)
    return [" ".join(random.choices(words, k=length)) for _ in range(-(-tokens // length))]


def known_words(tokenizer: PreTrainedTokenizerBase, random: Random) -> list[str]:
    """Up to 2,000 words that are one token each behind another word.

    Raises:
        ValueError: a slow tokenizer, or one with hardly a word.
    """
    require_offsets(tokenizer)
    vocabulary = sorted(tokenizer.get_vocab())
    alone = len(encode(tokenizer, BEFORE, special=False)[0])
    found: list[str] = []
    for token in random.sample(vocabulary, len(vocabulary)):
        word = token.strip(SPACES)
        if not (len(word) > 1 and word.isascii() and word.isalnum()):
            continue
        if len(encode(tokenizer, f"{BEFORE} {word}", special=False)[0]) == alone + 1:
            found.append(word)
        if len(found) == ENOUGH:
            break
    found = list(dict.fromkeys(found))
    if len(found) < FEWEST:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} has {len(found)} words of one token, too few to "
            "make edits up; give edits of your own"
        )
    return found
