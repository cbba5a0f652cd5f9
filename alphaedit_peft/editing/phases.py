"""Where the time of an edit run goes: wall seconds, summed by phase.

In: a model, and ``with phases.timed(name)`` around parts of the work. Out: ``seconds`` by phase. A
phase within another one counts for itself alone, so that nothing is counted twice. On a GPU the
work is waited for at every border, since it runs on after the call that ordered it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

PHASES = ("contexts", "keys", "targets", "solve", "write", "score")


class Phases:
    """A stopwatch with a sum for each phase.

    ``contexts``: sampled texts and tokens; ``keys``: forwards for keys and hidden states, and what
    is decided from them; ``targets``: the optimisation of z; ``solve``: the linear systems;
    ``write``: factors put into the model; ``score``: probabilities, and the figures of the report.
    """

    def __init__(self, devices: Collection[torch.device] = ()) -> None:
        """Time work on these devices; those that are no GPU need no waiting for."""
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._phase: str | None = None
        self._since = 0.0

    @classmethod
    def of(cls, model: nn.Module) -> Phases:
        """A stopwatch for work on the devices that a model's weights are on."""
        return cls({parameter.device for parameter in model.parameters()})

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
        around = self._phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(around)

    def _switch(self, phase: str | None) -> None:
        for device in self._gpus:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self._phase is not None:
            self._sums[self._phase] += now - self._since
        self._phase, self._since = phase, now


def in_words(seconds: Mapping[str, float]) -> str:
    """The sum, and the phases from the longest down: "12.3 s: targets 9.1, keys 3.2"."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {value:.1f}" for name, value in longest)
    return f"{sum(seconds.values()):.1f} s: {parts}"
