"""How far hidden states move when an edited model reads prompts, as numbers and as a picture.

In: a model without and with its edits, prompts. Out: :class:`Shift`: hidden states at each prompt's
last token after one block, before and after, on the two axes along which they vary most (principal
components, by SVD), and the length of each move in the whole space. AlphaEdit's figure 6 shows such
states; there they are drawn by t-SNE, whose distances mean little, here by a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alphaedit_peft import hooks, tokens
from alphaedit_peft.log_probs import Reader
from alphaedit_peft.messages import shown
from alphaedit_peft.report.charts import scatter_chart
from alphaedit_peft.report.page import Markup, Section, paragraph, side_by_side, table
from alphaedit_peft.tables import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alphaedit_peft.model import AlphaEditModel


@dataclass(frozen=True, eq=False)
class Shift:
    """Hidden states of the same prompts before and after, after one block.

    Attributes:
        where: which block, in words.
        before: group -> (n, 2), coordinates on the first two principal components.
        after: likewise.
        relative: group -> (n,), |after - before| / |before| in the whole space.
        spread: mean distance of the states before from their mean, by |before|'s mean: what moves
            can be compared with.
        explained: share of the variance along each of the two components.
    """

    where: str
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    relative: Mapping[str, Tensor]
    spread: float
    explained: tuple[float, float]


def pack_shift(
    edited: AlphaEditModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[str]],
) -> tuple[Shift, ...]:
    """How far a loaded pack moves prompts' states, after its last rewrite layer and the last block.

    Args:
        edited: the model with its pack; it is left as it is.
        prompts: group -> whole prompts, such as those that should stay and those that were edited.

    Raises:
        ValueError: a pack without rewrite layers, as ``last_states``, or as ``shift_between``.
    """
    layers = edited.alphaedit_config.rewrite_layers
    if not layers:
        raise ValueError("this adapter does not say which blocks it rewrites; load an edit pack")
    numbers = dict.fromkeys((max(layers), edited.architecture.num_blocks - 1))
    blocks = [edited.architecture.block_name(number) for number in numbers]
    groups = {name: list(texts) for name, texts in prompts.items() if texts}
    base = edited.get_base_model()
    with edited.disable_adapter():
        before = {n: last_states(base, tokenizer, texts, blocks) for n, texts in groups.items()}
    after = {n: last_states(base, tokenizer, texts, blocks) for n, texts in groups.items()}
    which = ("the last that is rewritten", "the model's last")
    names = [f"After block {n}, {said}" for n, said in zip(numbers, which, strict=False)]
    return tuple(
        shift_between(name, *({n: of[n][i] for n in groups} for of in (before, after)))
        for i, name in enumerate(names)
    )


def last_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    blocks: Sequence[str],
) -> list[Tensor]:
    """Hidden states at each prompt's last token after some blocks, (n, d) each, float32.

    Args:
        blocks: their names in ``model.named_modules()``.

    Raises:
        ValueError: no prompt, or one that is empty or too long for the model.
    """
    reader = Reader(model, tokenizer)
    rows = [tokens.encode(tokenizer, prompt)[0] for prompt in prompts]
    if not rows:
        raise ValueError("prompts=[] show nothing; give at least one")
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"prompt {shown(prompt)} has no token; leave it out")
        reader.require_fit(row, max(row), prompt)
    found: list[dict[int, Tensor]] = [{} for _ in blocks]
    with hooks.evaluating(model):
        for batch in reader.batches(rows):
            for states, block in zip(found, blocks, strict=True):
                # (batch, tokens, d)
                hidden = hooks.hidden_of(hooks.capture_output(model, batch.inputs, block))
                for i, index in enumerate(batch.indices):
                    states[index] = hidden[i, len(rows[index]) - 1].float().cpu()
    return [torch.stack([states[i] for i in range(len(rows))]) for states in found]


def shift_between(where: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Shift:
    """Project states before and after onto the two components of all of them together.

    The centred states X = U S V^T give coordinates X V_2 and shares s_i^2 / sum s^2.

    Args:
        where: which block, in words.
        before: group -> (n, d), n at least 1.
        after: the same groups and shapes.

    Raises:
        ValueError: other groups or shapes, or fewer than two states.
    """
    shapes = {name: states.shape for name, states in before.items()}
    if shapes != {name: states.shape for name, states in after.items()}:
        raise ValueError(f"before has {shapes}, and after other groups or shapes; ask the same")
    first, then = ({name: s.double() for name, s in of.items()} for of in (before, after))
    every = torch.cat([*first.values(), *then.values()])  # (2 n, d)
    if len(every) < 4:
        raise ValueError(f"{len(every) // 2} prompt spans no plane; give at least two")
    middle = every.mean(0)
    _, sizes, axes = torch.linalg.svd(every - middle, full_matrices=False)
    plane = axes[:2].T  # (d, 2)
    total = sizes.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares = (sizes[:2].square() / total).tolist()
    start = torch.cat([*first.values()])
    away = (start - start.mean(0)).norm(dim=1).mean() / start.norm(dim=1).mean()
    return Shift(
        where,
        {name: (states - middle) @ plane for name, states in first.items()},
        {name: (states - middle) @ plane for name, states in then.items()},
        {n: (then[n] - states).norm(dim=1) / states.norm(dim=1) for n, states in first.items()},
        float(away),
        (shares[0], shares[1]),
    )


def shift_section(shifts: Sequence[Shift]) -> Section:
    """A chart a block, and how far the prompts of each group moved."""
    charts = []
    for found in shifts:
        first, second = (f"{100 * share:.0f} % of variance" for share in found.explained)
        groups = {
            name: list(zip(states.tolist(), found.after[name].tolist(), strict=True))
            for name, states in found.before.items()
        }
        labels = f"first component, {first}", f"second component, {second}"
        charts.append(scatter_chart(found.where, groups, x_label=labels[0], y_label=labels[1]))
    text = (
        "Hidden states at each prompt's last token: a ring without the edits, a dot with them, "
        "on the two directions along which all of them vary most. A move is |after - before| / "
        "|before| in the whole space, so also what the picture cannot show; the spread is how far "
        "prompts lie from their middle on the same scale."
    )
    content = side_by_side(charts) + table(*moves(shifts)) + paragraph(text)
    return Section("What moved inside", Markup(content))


def moves(shifts: Sequence[Shift]) -> Table:
    """How far the prompts of each group moved, and how far apart they were, a row a block."""
    rows = []
    for found in shifts:
        for name, relative in found.relative.items():
            far = relative.tolist()
            shares = [f"{100 * share:.2f} %" for share in (median(far), max(far), found.spread)]
            rows.append((found.where, name, len(far), *shares))
    columns = ["where", "prompts", ">how many", ">median move", ">largest move"]
    return Table([*columns, ">spread without edits"], rows)
