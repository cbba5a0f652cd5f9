"""What ``auto`` decides for the model and the edits at hand, from what it measures, with reasons.

In: a runner, the tokenised edits of a first batch or their keys, the metric. Out:
:class:`Decision` values, to print and to store in the pack; keys from which
``nullspace.threshold`` finds the threshold. The paper's clamp, ridge, threshold and w are numbers
for three models of 1.5 to 8 billion parameters; key norms and spectra of others differ by orders of
magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from alphaedit_peft.architecture import paper_preset
from alphaedit_peft.editing.prompts import EditRows, TokenRow
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.nullspace import NullSpace
from alphaedit_peft.nullspace.threshold import KeysAround
from alphaedit_peft.settings import PRESETS, EditOptions
from alphaedit_peft.solve_metric import Metric, kind

PROBED = 32  # edits whose prompts are looked at, of a batch


@dataclass(frozen=True)
class Decision:
    """One setting: its name, its value as text, and the reason in a sentence."""

    name: str
    value: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """The decision as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} {self.value}: {self.reason}"


def shown(settings: EditOptions, name: str) -> str:
    """A setting's value as text, with the mode that says how it is read."""
    value, mode = getattr(settings, name), getattr(settings, f"{name}_mode", None)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if mode is None else f"{text} ({mode})"


def in_force(decided: Sequence[Mapping[str, Any]], settings: EditOptions) -> list[Any]:
    """Stored decisions whose settings have not been changed since."""
    return [d for d in decided if shown(settings, str(d["name"])) == d["value"]]


def movable(null_space: NullSpace | None, settings: EditOptions) -> bool:
    """Whether ``auto`` may choose the threshold: nobody chose one, and the spectrum is known.

    A null space at another threshold than the preset's was made so by somebody, and is kept.
    """
    preset = PRESETS["auto"]
    decides = "threshold" in kind(settings.objective).decides
    if null_space is None or settings.preset != "auto" or not decides:
        return False
    given = (null_space.threshold, null_space.threshold_mode)
    known = not any(part.projector_only for part in null_space.parts.values())
    return known and given == (preset["threshold"], preset["threshold_mode"])


def keys_around(runner: Runner, edits: Sequence[EditRows]) -> dict[int, KeysAround]:
    """At every rewrite layer, keys of some edits and of the other tokens of their prompts.

    A prompt's first token is left out: models keep a huge state there, whatever it is. Without any
    other token there is nothing to look at, and the answer is empty.
    """
    some = edits[:: math.ceil(len(edits) / PROBED)]
    rows = [rows.rows[-1] for rows in some if _others(rows.rows[-1])]
    return {
        layer: [
            (keys[row.subject_last], keys[_others(row)])
            for row, keys in zip(rows, runner.token_keys(rows, layer), strict=True)
        ]
        for layer in (runner.layers if rows else ())
    }


def _others(row: TokenRow) -> list[int]:
    return [i for i in range(1, len(row.ids)) if i != row.subject_last]


def decisions(
    runner: Runner,
    metric: Metric,
    taken: tuple[Mapping[int, Tensor], Tensor],
    undecided: Collection[str],
    disturbances: Mapping[float, float],
) -> tuple[Decision, ...]:
    """Settings that were left open, with what was measured of this model for these edits.

    Args:
        runner: with the settings as decided, as ``metric`` is.
        taken: of the edits, keys by layer (n, d_in) and h (n, d), from ``keys_by_layer``.
        undecided: names of the settings that the user left open.
        disturbances: from ``least_disturbing``; empty where the threshold was not chosen here.
    """
    settings = runner.settings
    keys, hidden = taken
    known = paper_preset(runner.model.config) is not None
    depth = f"by depth: the last one lies at 30 % of {runner.architecture.num_blocks} blocks"
    reasons = {"rewrite_layers": "the paper's" if known else depth}
    for name in metric.decides:
        if name != "threshold" or disturbances or movable(metric.null_space, settings):
            reasons[name] = metric.reason(name, keys, disturbances)
    reasons |= _search(runner, hidden)
    return tuple(
        Decision(name, shown(settings, name), reason)
        for name, reason in reasons.items()
        if name in undecided
    )


def _search(runner: Runner, hidden: Tensor) -> dict[str, str]:
    """Clamp, learning rate and stopping, relative to |h| at the last rewrite layer, h (n, d)."""
    settings, last = runner.settings, runner.layers[-1]
    norm = float(hidden.norm(dim=1).median())
    step = norm / hidden.shape[1] ** 0.5
    relative = settings.learning_rate_mode == "relative"
    rate = settings.learning_rate * (step if relative else 1)
    return {
        "clamp_factor": f"|z - h| up to {settings.clamp_factor * norm:.3g}; the edits' median |h| "
        f"after block {last} is {norm:.3g}",
        "learning_rate": f"steps of {rate:.3g} a coordinate, whose size |h| / sqrt(d) is "
        f"{step:.3g}",
        "stop_loss": "a target value goes no further than the target needs, which spares the "
        "subject's other facts",
    }
