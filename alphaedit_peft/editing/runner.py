"""What an edit run works with: model, tokenizer, layout and settings, under one name.

In: the base model (its rewrite modules may be LoRA layers), settled settings. Out: :class:`Runner`,
which names the model's blocks and head, and puts rows of tokens into batches for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from alphaedit_peft import hooks
from alphaedit_peft.architecture import Architecture, position_switches
from alphaedit_peft.devices import brings_to_gpu, reads_ids_on
from alphaedit_peft.editing.prompts import Renderer, TokenRow
from alphaedit_peft.settings import Settings
from alphaedit_peft.tokens import PaddedBatch, batches, positions_of

PHASES = ("contexts", "keys", "targets", "solve", "write", "score")


class Phases:
    """A stopwatch with a sum for each phase.

    ``contexts``: sampled texts and tokens; ``keys``: forwards for keys and hidden states, and what
    is decided from them; ``targets``: the optimisation of z; ``solve``: the linear systems;
    ``write``: factors put into the model; ``score``: probabilities, and the figures of the report.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        """Time work on a model: what is asked of its GPUs is waited for."""
        devices = () if model is None else {weight.device for weight in model.parameters()}
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._sums = dict.fromkeys(PHASES, 0.0)
        self.phase: str | None = None  # of the innermost block that runs
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far, of the phases that have ended."""
        return dict(self._sums)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time of this block for ``phase``, also where the block fails.

        Raises:
            ValueError: an unknown phase.
        """
        if phase not in self._sums:
            raise ValueError(f"phase {phase!r} is unknown; use one of {PHASES}")
        around = self.phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(around)

    def _switch(self, phase: str | None) -> None:
        for device in self._gpus:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self.phase is not None:
            self._sums[self.phase] += now - self._since
        self.phase, self._since = phase, now


@dataclass(frozen=True)
class Runner:
    """A model ready to be edited; ``contexts`` are texts put before.

    ``phases`` sums the time of what is done on it.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    architecture: Architecture
    contexts: tuple[str, ...]
    phases: Phases = field(default_factory=Phases, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The rewrite layers, ascending; z is optimised after the last one."""
        return tuple(self.settings.rewrite_layers)

    def within(self, tokens_per_batch: int, target_tokens: int) -> Runner:
        """The same with other bounds, on a forward pass and on what is optimised at once."""
        bounds = {"tokens_per_batch": tokens_per_batch, "target_tokens": target_tokens}
        return replace(self, settings=Settings(**{**self.settings.to_json(), **bounds}))

    @property
    def renderer(self) -> Renderer:
        """Writes out and tokenises prompts for this model."""
        positions = positions_of(self.model)
        vocabulary = len(self.model.get_input_embeddings().weight)  # type: ignore[operator]
        return Renderer(self.tokenizer, self.settings, (positions, vocabulary))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return reads_ids_on(self.model)

    @property
    def blocks(self) -> list[str]:
        """Names of all blocks."""
        return [self.architecture.block_name(i) for i in range(self.architecture.num_blocks)]

    @property
    def blocks_below(self) -> list[str]:
        """Names of the blocks up to the last rewrite layer L, L's among them."""
        return self.blocks[: self.layers[-1] + 1]

    @property
    def head_name(self) -> str:
        """Name of the module that turns hidden states into logits.

        Raises:
            ValueError: a model without an output head.
        """
        name = hooks.head_name(self.model)
        if name is None:
            raise ValueError(f"{type(self.model).__name__} has no output head; pass a causal LM")
        return name

    @property
    def dtype(self) -> torch.dtype:
        """Of the input embeddings."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight.dtype

    @property
    def autocast(self) -> torch.dtype | None:
        """What ``settings.autocast`` names, for a float32 model; None for any other.

        One in half precision gains nothing, and autocast leaves float64 as it is.
        """
        name = self.settings.autocast
        return None if name is None or self.dtype != torch.float32 else getattr(torch, name)

    def upper_weights(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Weights and biases of the products above L, the head's among them, to copy for autocast.

        An offloaded weight is nowhere while its block does not run, and is cast when it does.
        """
        if self.autocast is None:
            return
        for name in [*self.blocks[self.layers[-1] + 1 :], self.head_name]:
            for module in self.model.get_submodule(name).modules():
                if type(module) not in (nn.Linear, Conv1D):
                    continue
                for part, weight in module.named_parameters(recurse=False):
                    if weight.dtype == torch.float32 and not weight.is_meta:
                        yield module, part, weight

    @property
    def switches(self) -> tuple[int, ...]:
        """Lengths above which rows are read with other rotary tables."""
        return position_switches(self.model.config)

    def all_short(self, lengths: Iterable[int]) -> bool:
        """Whether no row is above a switch, so that a cache of its beginning is true for it."""
        return not self.switches or max(lengths) <= self.switches[0]

    @property
    def few_passes(self) -> bool:
        """Whether a pass is dearer than any padding: it brings offloaded weights to a GPU."""
        return brings_to_gpu(self.model)

    def batches(
        self, rows: Sequence[Sequence[int]], behind: Sequence[int] = ()
    ) -> Iterator[PaddedBatch]:
        """Token rows in padded batches of at most ``tokens_per_batch`` tokens.

        ``behind`` are the tokens that each row follows in a cache, which count too.
        """
        most = self.settings.tokens_per_batch
        few, switches = self.few_passes, self.switches
        return batches(rows, most, self.device, behind, few=few, switches=switches)

    def token_keys(self, rows: Sequence[TokenRow], layer: int) -> list[Tensor]:
        """Inputs of a rewrite module at every token, for each row (tokens, d_in)."""
        name = self.architecture.rewrite_name(layer)
        found: dict[int, Tensor] = {}
        for batch in self.batches([row.ids for row in rows]):
            inputs = hooks.capture_inputs(self.model, batch.inputs, [name], self.blocks[layer])
            for i, index in enumerate(batch.indices):
                found[index] = at_least_float32(inputs[name][i, : len(rows[index].ids)])
        return [found[i] for i in range(len(rows))]


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float64 where they are, else in float32."""
    return values if values.dtype == torch.float64 else values.float()
