"""What became of each edit of a batch, and why one did not take.

In: target values as found, shares as poured, log-probabilities before and after. Out: an
:class:`EditResult` for each new edit; where greedy decoding does not say the target, the result
names what the numbers point to, and the setting to turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.bench import Bench, Score
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.pour import Poured
from alphaedit_peft.editing.prompts import EditRows
from alphaedit_peft.editing.report import EditResult
from alphaedit_peft.editing.targets import Targets

SAID = 0.5  # a target value works if greedy decoding says the target after this share of prompts
REACHED = 0.8  # share of z - h below which the layers, not the target value, are to blame
KEPT = 0.02  # |P k|^2 / |k|^2 below which the projection is


@dataclass(frozen=True)
class Scores:
    """How the model takes an edit's target: before the batch, after it, and after paraphrases."""

    before: Score
    after: Score
    paraphrases: tuple[Score, ...] = ()


def outcome(
    bench: Bench,
    first_row: int,
    groups: Sequence[Group],
    found: Targets,
    poured: Poured,
    scores: Mapping[str, Scores],
) -> dict[str, EditResult]:
    """A result for each new edit of the groups, by id; carried edits have none.

    Args:
        bench: for the layers and settings.
        first_row: the row of ``lora_A`` that the first group got.
        groups: as solved.
        found: their target values.
        poured: how far the layers reach.
        scores: by id, of the new edits.
    """
    results = {}
    for g, group in enumerate(groups):
        for member in group.members:
            if member.edit.id not in scores:
                continue
            score = scores[member.edit.id]
            results[member.edit.id] = EditResult(
                member.edit,
                row=first_row + g,
                probability_before=score.before.probability,
                probability_after=score.after.probability,
                likeliest=score.after.greedy,
                loss=float(found.losses[g]),
                steps=int(found.steps[g]),
                clamped=float(found.clamped[g]),
                shares=dict(zip(bench.layers, poured.shares[:, g].tolist(), strict=True)),
                total_share=float(poured.total[g]),
                paraphrases=tuple(found.greedy for found in score.paraphrases),
                why_not="" if score.after.greedy else why_not(bench.config, found, poured, g),
            )
    return results


def score_after(
    bench: Bench, edits: Sequence[EditRows], before: Sequence[Score]
) -> dict[str, Scores]:
    """Scores of edits that are in the model now, by id, with those of their paraphrases."""
    after = bench.score([rows.rows[0] for rows in edits])
    asked = [
        bench.renderer.target_row(text, rows.edit.target_new)
        for rows in edits
        for text in rows.edit.paraphrases
    ]
    said = iter(bench.score(asked) if asked else ())
    return {
        rows.edit.id: Scores(old, new, tuple(next(said) for _ in rows.edit.paraphrases))
        for rows, old, new in zip(edits, before, after, strict=True)
    }


def why_not(config: AlphaEditConfig, found: Targets, poured: Poured, group: int) -> str:
    """Why a group's target is not the likeliest, as far as the numbers tell, and what to turn."""
    loss, steps = float(found.losses[group]), int(found.steps[group])
    said, size = float(found.said[group]), float(found.clamped[group])
    assert config.clamp_factor is not None, "resolve the config first"
    assert config.stop_loss is not None, "resolve the config first"
    if said < SAID and loss < config.stop_loss:
        return (
            f"its target value was taken at loss {loss:.2f}, before it says the target; lower "
            f"stop_loss (now {config.stop_loss:g})"
        )
    if said < SAID and size >= 0.99 * config.clamp_factor:
        return (
            f"its target value stopped at the clamp with loss {loss:.2f}; raise clamp_factor (now "
            f"{config.clamp_factor:g})"
        )
    if said < SAID:
        return (
            f"its target value still had loss {loss:.2f} after {steps} steps; raise steps or "
            "learning_rate"
        )
    held = _what_held(config, poured)
    share, kept = float(poured.total[group]), float(poured.kept[:, group].min())
    if share < REACHED and kept < KEPT and config.objective == "alphaedit":
        return (
            f"the layers reached {share:.0%} of its residual, and projection leaves {kept:.1%} of "
            f"its squared key length; raise threshold, or {held}"
        )
    if share < REACHED:
        return f"the layers reached {share:.0%} of its residual; {held}"
    return (
        f"its target value was reached ({share:.0%}), but the batch also moves the prompt's other "
        "tokens; raise ridge, rewrite other layers, or make fewer edits at once"
    )


def _what_held(config: AlphaEditConfig, poured: Poured) -> str:
    """What keeps the layers from the residual, as something to do."""
    if poured.guarded:
        layers = ", ".join(map(str, poured.guarded))
        return (
            f"the norm guard raised the ridge of layers {layers}, so make edits with nearly one "
            f"key apart, or raise norm_guard (now {config.norm_guard:g})"
        )
    if config.objective == "memit":
        return f"lower moment_weight (now {config.moment_weight:g})"
    return f"lower ridge (now {config.ridge:g}, {config.ridge_mode})"
