"""Constrained fine-tuning, the cheap baseline (FT-L): Adam on one weight matrix within a bound.

In: a model, edits. Out: the new value of one rewrite module's weight; the model itself is not
touched. Equation (Zhu et al., 2020; ROME appendix E.1; MEMIT appendix B.1): minimise over W'

    mean over edits of -log P(target | prompt)    subject to |W' - W|_inf <= bound,

by Adam, with the entries of W' - W clamped after every step. W is the weight as it is at the start
of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import hooks
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.prompts import TokenRow
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.edits import Edit
from alphaedit_peft.settings import Settings
from alphaedit_peft.tokens import PaddedBatch, batches


@dataclass(frozen=True)
class FineTuning:
    """Settings of fine-tuning.

    Attributes:
        layer: the block whose rewrite module is trained; None: the first rewrite layer.
        steps: passes over the edits of a batch.
        learning_rate: Adam's; ROME's 5e-4 for GPT2-XL.
        bound: most that an entry of the weight may change in a batch; ROME's 5e-4 for GPT2-XL.
        stop_loss: done when the mean loss is below this; 1e-2 in the code of ROME.

    Raises:
        ValueError: a number out of range.
    """

    layer: int | None = None
    steps: int = 25
    learning_rate: float = 5e-4
    bound: float = 5e-4
    stop_loss: float = 1e-2

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.layer is not None and self.layer < 0):
            raise ValueError(f"steps={self.steps}, layer={self.layer}: use steps >= 1, layer >= 0")
        for name in ("learning_rate", "bound", "stop_loss"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is out of range; use a number above 0")


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    config: AlphaEditConfig,
    settings: FineTuning,
) -> dict[str, Tensor]:
    """Fine-tune one rewrite module on some edits, on their bare prompts.

    Args:
        model: a causal language model; left as it is.
        tokenizer: its fast tokenizer.
        edits: made together.
        config: for prompts (separator, chat template), the first rewrite layer, batch sizes.
        settings: rate, bound, steps.

    Returns:
        The new weight under its parameter's name, in its own layout and dtype.

    Raises:
        ValueError: no edit, a layer outside the model, a prompt the model cannot take, or a loss
            that is not finite.
    """
    if not edits:
        raise ValueError("edits=[] is empty; give at least one edit")
    full, architecture = config.resolve(model)
    layer = full.rewrite_layers[0] if settings.layer is None else settings.layer  # type: ignore[index]
    architecture.check_layers([layer])
    name = f"{architecture.rewrite_name(layer)}.weight"
    weight = model.get_parameter(name).detach()
    runner = Runner(model, tokenizer, Settings.of(full), architecture, ())
    rows = [runner.renderer.edit_rows(edit, ()).rows[0] for edit in edits]
    change = torch.zeros_like(weight, dtype=torch.float32, requires_grad=True)
    adam = torch.optim.Adam([change], lr=settings.learning_rate)
    with hooks.evaluating(model), torch.enable_grad():
        for _ in range(settings.steps):
            total, gradient = 0.0, torch.zeros_like(change)
            for loss in _losses(runner, rows, name, weight, change):
                gradient += torch.autograd.grad(loss, change)[0]  # no other parameter's .grad
                total += float(loss.detach())
            if total != total:
                raise ValueError(
                    f"the loss of {len(rows)} edits became nan while {name} was fine-tuned; lower "
                    f"learning_rate={settings.learning_rate}"
                )
            if total < settings.stop_loss:
                break
            change.grad = gradient
            adam.step()
            with torch.no_grad():
                change.clamp_(-settings.bound, settings.bound)
    return {name: (weight.float() + change.detach()).to(weight.dtype)}


def _losses(
    runner: Runner, rows: Sequence[TokenRow], name: str, weight: Tensor, change: Tensor
) -> Iterator[Tensor]:
    """The mean over rows of -log P(target), each batch's part of it on its own."""
    ids = [row.scoring_ids for row in rows]
    for batch in batches(ids, runner.settings.tokens_per_batch, runner.device):
        yield _loss(runner, rows, batch, {name: (weight.float() + change).to(weight.dtype)})


def _loss(
    runner: Runner, rows: Sequence[TokenRow], batch: PaddedBatch, weights: dict[str, Tensor]
) -> Tensor:
    where = [(i, p) for i, k in enumerate(batch.indices) for p in rows[k].target_positions]
    shares = [1 / len(rows[k].target) for k in batch.indices for _ in rows[k].target]
    targets = torch.tensor([t for k in batch.indices for t in rows[k].target])
    with hooks.gathering_logits(runner.model, runner.head_name, where):
        inputs = {**batch.inputs, "use_cache": False}
        logits = functional_call(runner.model, weights, kwargs=inputs).logits[0]
    targets = targets.to(logits.device)
    lost = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return (lost * torch.tensor(shares, device=lost.device)).sum() / len(rows)
