"""Settings tried on a few edits, and which of them to take.

In: a base with statistics, a suite of probe cases, a grid. Out: :class:`Tuning`: what every
combination scores, the one to take and the reason. Target values are optimised once for each choice
of rewrite layers and clamp; another ridge or threshold pours them again (``repour``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from alphaedit_peft.architecture import default_rewrite_layers
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.evaluation import Judging, Reader, Suite, evaluate, text_divergence
from alphaedit_peft.evaluation.intervals import Estimate
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.settings import PRESET_VALUES
from alphaedit_peft.studies.base import Base
from alphaedit_peft.studies.trials import Setting, Tried, Tuning

DEPTHS = (0.15, 0.3, 0.45, 0.6)  # where the rewrite layers end, as a share of the blocks
CLAMPS = (0.75, 1.0)
RIDGES = (0.05, 0.25)
THRESHOLDS = (0.01, 0.05)


@dataclass(frozen=True)
class Grid:
    """What is tried: every combination of the four.

    Attributes:
        layers: lists of blocks to rewrite.
        clamps: bounds on |z - h| / |h|.
        ridges: relative to the mean |P k|^2 of the edits.
        thresholds: shares of the keys' energy that the null space may hold.

    Raises:
        ValueError: nothing to try of one of them, or one twice.
    """

    layers: tuple[tuple[int, ...], ...]
    clamps: tuple[float, ...] = CLAMPS
    ridges: tuple[float, ...] = RIDGES
    thresholds: tuple[float, ...] = THRESHOLDS

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}={values} must hold at least one, and each once")

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return len(list(product(self.layers, self.clamps, self.ridges, self.thresholds)))


def layer_choices(num_blocks: int) -> tuple[tuple[int, ...], ...]:
    """Rewrite layers to try: as many as the depth rule takes, ending at several depths."""
    count = len(default_rewrite_layers(num_blocks))
    lasts = [max(0, min(int(depth * num_blocks), num_blocks - 2)) for depth in DEPTHS]
    return tuple(dict.fromkeys(tuple(range(max(0, last - count + 1), last + 1)) for last in lasts))


def tune(
    base: Base,
    suite: Suite,
    grid: Grid,
    config: AlphaEditConfig | None = None,
    *,
    how: Judging | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """Make the suite's edits in every setting of a grid, judge each; the model stays as it was.

    Args:
        base: with a null space that has all layers of the grid.
        suite: the probe cases; its texts, held out, measure drift.
        grid: what to try.
        config: all other settings.
        how: how to judge.
        progress: called with a line of text after each setting.

    Returns:
        What was tried. The same seed (of ``config``) gives the same numbers.

    Raises:
        ValueError: no null space, layers it lacks, or a threshold beyond its reach.
    """
    if base.null_space is None:
        raise ValueError("null_space=None: settings are tried with one; make it of texts first")
    # probes are taken back, so that they fill the model is no reason to warn
    common = replace(config or AlphaEditConfig(), on_conflict="replace", capacity_bound=0.0)
    asked = replace(suite, texts=())
    before = evaluate(base.model, base.tokenizer, asked, how=how)
    tried: list[Tried] = []
    for layers, clamp in product(grid.layers, grid.clamps):
        for found in _pour_all(base, asked, suite.texts, grid, common, (layers, clamp), how):
            tried.append(found)
            progress(f"{len(tried)} of {grid.size}: {found.setting}: {found.score.value:.3f}")
    return Tuning(tuple(tried), before, len(suite.cases))


def _pour_all(
    base: Base,
    suite: Suite,
    texts: Sequence[str],
    grid: Grid,
    common: AlphaEditConfig,
    fixed: tuple[tuple[int, ...], float],
    how: Judging | None,
) -> Iterator[Tried]:
    """Edits made once, then poured with every ridge and threshold."""
    made: int | None = None
    model: AlphaEditModel | None = None
    try:
        for ridge, threshold in product(grid.ridges, grid.thresholds):
            setting = Setting(*fixed, ridge, threshold)
            if model is None or made is None:
                config = replace(common, **setting.changes())
                model = get_alphaedit_model(
                    base.model, config, tokenizer=base.tokenizer, null_space=base.null_space
                )
                size = len(suite.cases)  # one batch: target values then depend on no ridge
                made = len(model.edit(suite.edits, batch_size=size, progress=False).made)
            else:
                model.alphaedit_config.ridge = ridge
                model.alphaedit_config.threshold = threshold
                model.repour()
            yield Tried(
                setting,
                evaluate(model, base.tokenizer, suite, how=how),
                _measured_drift(base, model, texts, how),
                made,
            )
    finally:
        if model is not None:
            model.unload()


def _measured_drift(
    base: Base, model: AlphaEditModel, texts: Sequence[str], how: Judging | None
) -> Estimate | None:
    if not texts:
        return None
    reader = Reader(model, base.tokenizer, (how or Judging()).tokens_per_batch)
    return text_divergence(reader, model.disable_adapter, texts)


def preset_grid(layers: tuple[tuple[int, ...], ...]) -> Grid:
    """Only the layers vary; everything else is as ``auto`` has it."""
    preset = PRESET_VALUES["auto"]
    return Grid(layers, (preset.clamp_factor,), (preset.ridge,), (preset.threshold,))
