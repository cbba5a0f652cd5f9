"""The editors that studies compare, as values: settings for this package's own, or a function.

In: a name. Out: a :class:`Method`, and ``opened`` on a base an editor that makes edits, saves its
state and goes on from it. All but fine-tuning run through the same code: the same prompts, target
values and solve, so that a comparison shows what an objective protects and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import hooks
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.prompts import TokenRow
from alphaedit_peft.editing.runner import Runner
from alphaedit_peft.edits import Edit
from alphaedit_peft.model import AlphaEditModel, get_alphaedit_model
from alphaedit_peft.safe_files import MAX_TENSOR_BYTES, opened_tensors, refusing, shown_name
from alphaedit_peft.saving import replace_folder
from alphaedit_peft.settings import EditOptions, Settings
from alphaedit_peft.studies.base import Base

# MEMIT's share of one key's residual is g / (g + 1), g = k^T C^-1 k / w, and g averages d_in / w:
# with so small a w it is 1, and the update is ROME's (Eq. 2): the equality constraint of one key
ROME_WEIGHT = 1e-6
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")


# another editor: new values of the parameters that change, by name; the model stays as it is
Writer = Callable[[Base, AlphaEditConfig, Sequence[Edit]], dict[str, Tensor]]


@dataclass(frozen=True)
class FineTuning:
    """Settings of fine-tuning; ROME's for GPT2-XL."""

    layer: int | None = None  # whose rewrite module is trained; None: the first rewrite layer
    steps: int = 25  # passes over the edits of a batch
    learning_rate: float = 5e-4  # Adam's
    bound: float = 5e-4  # most that an entry of the weight may change in a batch
    stop_loss: float = 1e-2  # done when the mean loss is below this

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.layer is not None and self.layer < 0):
            raise ValueError(f"steps={self.steps}, layer={self.layer}: use steps >= 1, layer >= 0")
        for name in ("learning_rate", "bound", "stop_loss"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is out of range; use a number above 0")


@dataclass(frozen=True)
class FineTuned:
    """The writer of fine-tuning, with its settings; see :func:`fine_tune`."""

    settings: FineTuning = FineTuning()

    def __call__(
        self, base: Base, config: AlphaEditConfig, edits: Sequence[Edit]
    ) -> dict[str, Tensor]:
        """New values of one weight."""
        return fine_tune(base.model, base.tokenizer, edits, config, self.settings)


@dataclass(frozen=True)
class Method:
    """An editor under the name it has in tables and folders."""

    name: str
    about: str  # one sentence
    settings: Mapping[str, Any] = field(default_factory=dict)  # of AlphaEditConfig, over a study's
    one_at_a_time: bool = False  # make the edits of a batch one after the other
    last_layer: bool = False  # rewrite the last rewrite layer only
    writer: Writer | None = None  # of another kind; settings are then for its prompts alone

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} cannot name a folder; use letters, digits, '-', '_', '.', '='"
            )

    def config(self, model: Any, common: AlphaEditConfig) -> AlphaEditConfig:
        """The settings of a run, filled for the model but for the null space's threshold."""
        full, _ = replace(common, **self.settings).resolve(model)
        if common.threshold is None and "threshold" not in self.settings:
            full.threshold = full.threshold_mode = None  # the null space brings its own
        if self.last_layer and full.rewrite_layers:
            full.rewrite_layers = full.rewrite_layers[-1:]
        return full

    def with_settings(self, **changes: Any) -> Method:
        """The same method with other settings, of AlphaEditConfig or of fine-tuning.

        ValueError: a setting that it does not have, or a value out of range.
        """
        own = self.writer.settings if isinstance(self.writer, FineTuned) else None
        known = sorted(EditOptions().to_json() if own is None else asdict(own))
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ValueError(f"{self.name} has no settings {unknown}; it has {', '.join(known)}")
        if own is not None:
            return replace(self, writer=FineTuned(replace(own, **changes)))
        EditOptions(**changes)  # refuses what cannot be
        return replace(self, settings={**self.settings, **changes})

    def to_json(self) -> dict[str, Any]:
        """Name and settings as plain JSON values, for provenance."""
        found: dict[str, Any] = {"name": self.name, "settings": dict(self.settings)}
        found |= {"one_at_a_time": self.one_at_a_time, "last_layer": self.last_layer}
        if isinstance(self.writer, FineTuned):
            found["writer"] = asdict(self.writer.settings)
        elif self.writer is not None:
            found["writer"] = repr(self.writer)
        return found


METHODS = {
    method.name: method
    for method in (
        Method("alphaedit", "updates confined to the null space (Fang et al., 2025)"),
        Method(
            "memit",
            "MEMIT as released: earlier edits are not protected (Meng et al., 2023)",
            {"objective": "memit", "history": False},
        ),
        Method(
            "memit-history",
            "MEMIT with the keys of earlier edits in the solve",
            {"objective": "memit", "history": True},
        ),
        Method(
            "memit-projection",
            "MEMIT's update projected into the null space, AlphaEdit's plug-in",
            {"objective": "memit", "history": False, "projection": True},
        ),
        Method(
            "rome",
            "ROME's rank-one constraint, one edit at a time in one layer (Meng et al., 2022)",
            {"objective": "memit", "history": False, "moment_weight": ROME_WEIGHT},
            one_at_a_time=True,
            last_layer=True,
        ),
        Method(
            "finetuning",
            "one layer's weights fine-tuned within a bound (FT-L of Meng et al., 2022)",
            writer=FineTuned(),
        ),
    )
}


def find_methods(names: Iterable[str]) -> tuple[Method, ...]:
    """Methods of the table, in the given order.

    Raises:
        ValueError: an unknown name, one twice, or none.
    """
    wanted = tuple(names)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        raise ValueError(f"methods {unknown} are unknown; there are {', '.join(METHODS)}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"methods={list(wanted)} name one twice; name each once")
    return tuple(METHODS[name] for name in wanted)


@contextmanager
def opened(
    base: Base, method: Method, common: AlphaEditConfig, state: Path | None = None
) -> Iterator[Editor]:
    """An editor on a base, from the beginning or from a saved state; the base is restored.

    Raises:
        ValueError: statistics that the method needs are missing, a state of another base.
    """
    config = method.config(base.model, common)
    kind = PackEditor if method.writer is None else WeightEditor
    editor = kind(base, method, config, state)
    try:
        yield editor
    finally:
        editor.close()


class PackEditor:
    """Edits by this package, all of a batch or one by one: the state is a pack."""

    model: AlphaEditModel

    def __init__(
        self, base: Base, method: Method, config: AlphaEditConfig, state: Path | None
    ) -> None:
        self._one_at_a_time = method.one_at_a_time
        given: dict[str, Any] = {"tokenizer": base.tokenizer, "null_space": base.null_space}
        given["key_moments"] = base.key_moments
        if state is None:
            self.model = get_alphaedit_model(base.model, config, **given)
        else:
            self.model = AlphaEditModel.from_pretrained(base.model, state, **given)

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits, or as many batches of one; how many, the others were set aside."""
        size = 1 if self._one_at_a_time else len(edits)
        return len(self.model.edit(edits, batch_size=size, progress=False).made)

    def save(self, folder: Path) -> None:
        """Write the state that ``opened`` goes on from; the folder appears whole or not at all."""
        self.model.save_pretrained(folder)

    def close(self) -> None:
        """Give the base its original bits back."""
        self.model.unload()


WEIGHTS = "weights.safetensors"


class WeightEditor:
    """Edits by a function that gives new weights: the state is these weights."""

    model: nn.Module

    def __init__(
        self, base: Base, method: Method, config: AlphaEditConfig, state: Path | None
    ) -> None:
        assert method.writer is not None, "only a method with a writer has such an editor"
        self.model, self._write = base.model, partial(method.writer, base, config)
        self._original: dict[str, Tensor] = {}
        if state is not None:
            self._put(self._read(state / WEIGHTS))

    def edit(self, edits: Sequence[Edit]) -> int:
        """Make a batch of edits, all of them."""
        self._put(self._write(edits))
        return len(edits)

    def save(self, folder: Path) -> None:
        """As that of ``PackEditor``."""
        now = {name: self.model.get_parameter(name).detach().cpu() for name in self._original}
        replace_folder(folder, {WEIGHTS: partial(save_file, now)})

    def close(self) -> None:
        """Put the original weights back."""
        self._put(self._original)

    def _read(self, path: Path) -> dict[str, Tensor]:
        with opened_tensors(path, MAX_TENSOR_BYTES) as file, refusing(path):
            for name, stored in file.tensors.items():
                if stored.shape != self.model.get_parameter(name).shape:
                    raise ValueError(f"{shown_name(name)} {stored.shape} is not this model's")
            return {name: file.read(name) for name in file.tensors}

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            weight = self.model.get_parameter(name)
            self._original.setdefault(name, weight.detach().clone())
            weight.copy_(values)


Editor = PackEditor | WeightEditor


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    config: AlphaEditConfig,
    settings: FineTuning,
) -> dict[str, Tensor]:
    """Fine-tune one rewrite module within a bound on the bare prompts of edits (FT-L).

    Minimises over W' (Zhu et al., 2020; ROME appendix E.1; MEMIT appendix B.1), by Adam with the
    entries of W' - W clamped after every step, where W is the weight at the start of the batch,

        mean over edits of -log P(target | prompt)    subject to |W' - W|_inf <= bound.

    ``model`` is left as it is; ``config`` is for prompts (separator, chat template), the first
    rewrite layer, batch sizes.

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
    for batch in runner.batches(ids):
        weights = {name: (weight.float() + change).to(weight.dtype)}
        where = [(i, p) for i, k in enumerate(batch.indices) for p in rows[k].target_positions]
        shares = [1 / len(rows[k].target) for k in batch.indices for _ in rows[k].target]
        targets = torch.tensor([t for k in batch.indices for t in rows[k].target])
        with hooks.gathering_logits(runner.model, runner.head_name, where):
            inputs = {**batch.inputs, "use_cache": False}
            logits = functional_call(runner.model, weights, kwargs=inputs).logits[0]
        targets = targets.to(logits.device)
        lost = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        yield (lost * lost.new_tensor(shares)).sum() / len(rows)
