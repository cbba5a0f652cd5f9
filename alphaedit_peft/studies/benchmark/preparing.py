"""What a benchmark needs before the clock runs: settings, contexts and statistics of a model.

In: a model, a tokenizer. Out: an ``AlphaEditConfig`` with the paper's settings, and
:class:`Statistics`: key moments and a null space, collected over texts of random words or drawn at
random, with the seconds that each part took.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.nullspace.layer import LayerSpace
from alphaedit_peft.placement import computes_on
from alphaedit_peft.studies.benchmark.machine import timed
from alphaedit_peft.studies.benchmark.requests import random_texts

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
