"""What an update protects: the metric M of Delta = R E^T (K^T M K + D)^-1 K^T M.

In: settings, a null space, key moments. Out: a :class:`Metric`, which turns keys into the rows of
``lora_A`` and those rows into a Gram matrix, and answers whatever else depends on M: its statistics
and their bytes, what a pack stores of them, what ``auto`` decides by them, what to turn where an
edit falls short. :class:`Projector` (AlphaEdit): M = P, D = lambda. :class:`Moment` (MEMIT):
M = (w C0)^-1, D = 1, and times P where it is projected (AlphaEdit, section 4.4). Another metric is
one more class and its word in ``KINDS``; nobody else asks which one it is.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.settings import EditOptions, Settings

if TYPE_CHECKING:  # commands on packs ask for a kind alone
    from alphaedit_peft.nullspace import KeyMoments, NullSpace

Statistics: TypeAlias = "NullSpace | KeyMoments"
COLUMNS_AT_ONCE = 1024  # of rows, made float64 for a product; fixed, as sums round by it
KEPT = 0.02  # |P k|^2 / |k|^2 below which projection is to blame for what an edit lacks
SHARE = 0.95  # of its residual that one edit reaches alone, by the w that auto decides


class Given(NamedTuple):
    """What a metric can be made of."""

    null_space: NullSpace | None = None
    key_moments: KeyMoments | None = None


class Metric(ABC):
    """The metric of the solve, layer by layer; keys and rows are (n, d_in)."""

    rows_are_keys: ClassVar[bool] = False
    """Whether rows are projected keys: then G = A A^T, and they tell capacity and removal."""

    projected: ClassVar[bool] = False
    """Whether its rows are projected unless ``projection`` says otherwise."""

    decides: ClassVar[tuple[str, ...]] = ()
    """Settings that ``auto`` decides by these statistics, in the order they are told."""

    rows_depend_on: ClassVar[tuple[str, ...]] = ()
    """Settings that rows are made with: those of two values do not go together."""

    reads: ClassVar[tuple[str, ...] | None] = None
    """Settings that it is made anew for, with the statistics'; None: any."""

    null_space: NullSpace | None
    """What rows are projected with, where they are."""

    @classmethod
    def needs(cls, settings: EditOptions) -> tuple[str, ...]:
        """Which of ``null_space`` and ``key_moments`` it takes."""
        return ("null_space",) if projects(settings) else ()

    @classmethod
    @abstractmethod
    def of(cls, settings: Settings, given: Given) -> Metric:
        """The metric of settings, on what it ``needs``.

        Raises:
            ValueError: settings that exclude each other.
        """

    @property
    @abstractmethod
    def statistics(self) -> tuple[Statistics, ...]:
        """What its numbers come from, the main one first."""

    @classmethod
    def settings_of_rows(cls, settings: EditOptions) -> dict[str, object]:
        """The values of ``rows_depend_on``."""
        return {name: getattr(settings, name) for name in cls.rows_depend_on}

    @abstractmethod
    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K M, the rows that the solve works with."""

    @abstractmethod
    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The new rows of K M K^T, from the rows alone: they round as if made batch by batch.

        Args:
            layer: block number.
            prior: rows in place, (n, d_in).
            batches: new rows, (u, d_in) each.

        Returns:
            For each batch the products of its rows with all up to its own last, (u, n + ... + u),
            in float64.
        """

    def stored(self, layer: int, rows: Tensor) -> Tensor:
        """The rows as they go into ``lora_A``."""
        return rows

    @abstractmethod
    def ridge(self, squares: Tensor) -> float:
        """The entry of D for a batch, from the diagonal of its own G, (u,)."""

    def disturbance(self, layer: int, keys: Tensor) -> float:
        """Median a C0 a^T / |a|^4 over rows a of keys: what reaching |r| = 1 there moves."""
        assert self.null_space is not None, "asked only where rows are keys"
        rows = self.rows(layer, keys).double()
        moved = self.null_space.moment_quadratic(layer, rows).diagonal()
        cost = moved / rows.square().sum(1).square().clamp_min(1e-300)
        return max(float(cost.median()), 1e-300)

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of what it projects or inverts with."""

    def workspace(self, width: int) -> int:
        """Bytes that the solve of a layer of ``width`` takes beside rows and their products."""
        return 8 * width**2

    def decide(self, keys: Mapping[int, Tensor]) -> dict[str, float]:
        """Values, by these keys, of settings among ``decides`` that are open until first edits.

        ``keys`` are the edits', by layer (n, d_in).
        """
        return {}

    def provenance(self) -> dict[str, object]:
        """What a pack stores of the statistics that its rows depend on, for later batches.

        ``digest`` names them, ``tokens`` they were collected over; ``threshold`` and ``mode`` are
        the null space's, None where there is none.
        """
        names, space = [part.digest() for part in self.statistics], self.null_space
        if type(self) not in (Projector, Moment):  # on the same statistics, rows are others
            names.append(type(self).__name__)
        several = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
        return {
            "digest": names[0] if len(names) == 1 else several,
            "tokens": self.statistics[0].tokens,
            "threshold": None if space is None else space.threshold,
            "mode": None if space is None else space.threshold_mode,
        }

    def reason(self, name: str, keys: Mapping[int, Tensor], tried: Mapping[float, float]) -> str:
        """Why the setting ``name``, one of ``decides``, is as it is.

        Args:
            name: of the setting.
            keys: of the edits, by layer (n, d_in).
            tried: threshold -> disturbance; empty where the threshold was not chosen here.
        """
        raise TypeError(
            f"{type(self).__name__} decides {name!r} and does not say why; give it reason()"
        )

    @abstractmethod
    def advice(self, settings: Settings) -> str:
        """What lets layers reach more of their residuals, as something to do."""

    def lost(self, kept: float) -> str:
        """What the metric took of a key, as a clause, where ``kept`` of |k|^2 is too little."""
        return ""


@dataclass(frozen=True)
class Projector(Metric):
    """M = P: rows are projected keys, so G = A A^T (paper Eq. 11-14)."""

    null_space: NullSpace
    ridge_value: float
    relative: bool

    rows_are_keys = projected = True
    decides = ("threshold", "ridge")
    reads = ("history", "ridge", "ridge_mode", "threshold", "threshold_mode")

    @classmethod
    def of(cls, settings: Settings, given: Given) -> Metric:
        """See :class:`Metric`; lambda is ``ridge``."""
        if given.null_space is None:
            raise ValueError("objective='alphaedit' is the projection; projection=False is MEMIT's")
        return cls(given.null_space, settings.ridge, settings.ridge_mode == "relative")

    @property
    def statistics(self) -> tuple[Statistics, ...]:
        """The null space."""
        return (self.null_space,)

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K P."""
        return self.null_space.project(layer, keys)

    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A A^T; P is idempotent, so it equals K P K^T."""
        return products(prior, batches)

    def ridge(self, squares: Tensor) -> float:
        """lambda, as given or relative to the mean |P k|^2."""
        return self.ridge_value * float(squares.mean()) if self.relative else self.ridge_value

    @property
    def held_bytes(self) -> int:
        """The bases'."""
        return sum(part.basis.nbytes for part in self.null_space.parts.values())

    def workspace(self, width: int) -> int:
        """A basis in float64, half as wide as it is long, for the report."""
        return 4 * width**2

    def reason(self, name: str, keys: Mapping[int, Tensor], tried: Mapping[float, float]) -> str:
        """See :class:`Metric`."""
        if name == "threshold":
            return self._why_threshold(keys, tried)
        projected = {layer: self.rows(layer, own) for layer, own in keys.items()}
        sizes = {layer: float(rows.square().sum(1).mean()) for layer, rows in projected.items()}
        if not self.relative:
            return f"|P k|^2 is {', '.join(f'{size:.3g} there' for size in sizes.values())}"
        parts = (f"{self.ridge_value * size:.3g} in layer {n}" for n, size in sizes.items())
        return f"times the mean |P k|^2 of the edits: {', '.join(parts)}"

    def _why_threshold(self, keys: Mapping[int, Tensor], tried: Mapping[float, float]) -> str:
        space = self.null_space
        kept = ", ".join(
            f"{space.null_dimension(layer)} of {space.width(layer)} directions of layer "
            f"{layer} with {self._share(layer, own):.0%} of the edits' squared key length"
            for layer, own in keys.items()
        )
        if not tried:
            return f"keeps {kept}"
        shares = ", ".join(f"{moved:.3f} at {threshold:g}" for threshold, moved in tried.items())
        return (
            f"keeps {kept}; of what it moves its key, an edit then moves its prompt's other tokens "
            f"{shares}: the least, or close to it"
        )

    def _share(self, layer: int, keys: Tensor) -> float:
        """Mean of |P k|^2 / |k|^2."""
        projected = self.rows(layer, keys).square().sum(1)
        return float((projected / keys.square().sum(1).clamp_min(1e-30)).mean())

    def advice(self, settings: Settings) -> str:
        """A lower ridge."""
        return f"lower ridge (now {settings.ridge:g}, {settings.ridge_mode})"

    def lost(self, kept: float) -> str:
        """That projection leaves too little."""
        if kept >= KEPT:
            return ""
        return f"projection leaves {kept:.1%} of its squared key length; raise threshold"


@dataclass(frozen=True)
class Moment(Metric):
    """M = (w C0)^-1: rows are K (w C0)^-1 and G = A (w C0) A^T (MEMIT Eq. 14)."""

    moments: KeyMoments
    weight: float | None  # None: not decided yet, so there are no rows either
    null_space: NullSpace | None = None
    _factors: dict[int, Tensor] = field(default_factory=dict)  # Cholesky, once a layer

    decides = rows_depend_on = ("moment_weight",)
    reads = ("history", "moment_weight", "threshold", "threshold_mode")

    @classmethod
    def needs(cls, settings: EditOptions) -> tuple[str, ...]:
        """Key moments; a null space where it is projected."""
        return (*super().needs(settings), "key_moments")

    @classmethod
    def of(cls, settings: Settings, given: Given) -> Metric:
        """See :class:`Metric`; w is ``moment_weight``."""
        assert given.key_moments is not None, "it was needed"
        if projects(settings) and settings.history:
            raise ValueError(
                f"objective={settings.objective!r} with projection=True keeps no history: "
                "projected rows do not tell the keys they came from; set history=False"
            )
        space = given.null_space if projects(settings) else None
        return cls(given.key_moments, settings.moment_weight, space)

    @property
    def statistics(self) -> tuple[Statistics, ...]:
        """Key moments, and the null space where it is projected."""
        return (self.moments,) if self.null_space is None else (self.moments, self.null_space)

    def rows(self, layer: int, keys: Tensor) -> Tensor:
        """K (w C0)^-1."""
        return algebra.memit_rows(keys, self._factor(layer, keys.device))

    def grams(self, layer: int, prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A (w C0) A^T."""
        factor = self._factor(layer, prior.device)
        rows, found = [prior], []
        for batch in batches:
            half = batch.double() @ factor  # (u, d_in)
            cross = products_with(half @ factor.T, rows)
            found.append(torch.cat([cross, half @ half.T], 1))
            rows.append(batch)
        return tuple(found)

    def stored(self, layer: int, rows: Tensor) -> Tensor:
        """The rows, projected where the plug-in is on."""
        return rows if self.null_space is None else self.null_space.project(layer, rows)

    def ridge(self, squares: Tensor) -> float:
        """1, the identity in MEMIT's normal equations."""
        return 1.0

    @property
    def held_bytes(self) -> int:
        """The moments', their Cholesky factors' in float64, and the bases'."""
        parts = {} if self.null_space is None else self.null_space.parts
        moments = sum(moment.nbytes for moment in self.moments.moments.values())
        return 3 * moments + sum(part.basis.nbytes for part in parts.values())

    def decide(self, keys: Mapping[int, Tensor]) -> dict[str, float]:
        """w by which one edit alone reaches ``SHARE`` of its residual, to two digits.

        Alone it reaches g / (g + 1), g = k (w C0)^-1 k^T: w is (1 / SHARE - 1) k C0^-1 k^T, of the
        median key of each layer and the mean over layers.
        """
        sizes = Moment(self.moments, 1.0).gains(keys).values()
        return {"moment_weight": float(f"{(1 / SHARE - 1) * fmean(sizes):.2g}")}

    def gains(self, keys: Mapping[int, Tensor]) -> dict[int, float]:
        """By layer the median of g = k (w C0)^-1 k^T over keys (n, d_in)."""
        rows = {layer: self.rows(layer, own) for layer, own in keys.items()}
        return {n: float((rows[n] * own).sum(1).median()) for n, own in keys.items()}

    def reason(self, name: str, keys: Mapping[int, Tensor], tried: Mapping[float, float]) -> str:
        """See :class:`Metric`."""
        shares = (f"{g / (g + 1):.0%} in layer {layer}" for layer, g in self.gains(keys).items())
        return f"one edit alone reaches, of its residual, {', '.join(shares)}"

    def advice(self, settings: Settings) -> str:
        """A lower w."""
        return f"lower moment_weight (now {self.weight:g})"

    def _factor(self, layer: int, device: torch.device) -> Tensor:
        if self.weight is None:
            raise ValueError(
                "moment_weight=None, and there are edits already: auto decides it at an adapter's "
                "first ones; set the number that they were made with"
            )
        if layer not in self._factors:
            moment = self.moments.moments[layer].to(device)
            self._factors[layer] = algebra.moment_factor(moment, self.weight)
        return self._factors[layer].to(device)


KINDS: dict[str, type[Metric]] = {"alphaedit": Projector, "memit": Moment}


def kind(objective: str) -> type[Metric]:
    """The class of metric that ``objective`` names; refuses one that is unknown."""
    if objective not in tuple(KINDS):
        raise ValueError(f"objective={objective!r} is unknown; use one of {tuple(KINDS)}")
    return KINDS[objective]


def projects(options: EditOptions) -> bool:
    """Whether updates pass through the null-space projector."""
    by_itself = kind(options.objective).projected
    return by_itself if options.projection is None else options.projection


def make_metric(
    settings: Settings, null_space: NullSpace | None, key_moments: KeyMoments | None
) -> Metric:
    """The metric that settings ask for.

    Raises:
        ValueError: statistics that it needs are missing, or settings that exclude each other.
    """
    chosen = kind(settings.objective)
    needed = chosen.needs(settings)
    if "null_space" in needed and null_space is None:
        raise ValueError(
            "no null space was given, and the update must be projected; pass null_space=, or set "
            "null_space in the config, or make one with NullSpace.from_texts; on the command line "
            "--null-space DIR, which 'alphaedit nullspace' writes"
        )
    if "key_moments" in needed and key_moments is None:
        raise ValueError(
            f"objective={settings.objective!r} needs key moments; pass "
            "key_moments=KeyMoments.collect(...), on the command line --key-moments DIR, which "
            "'alphaedit nullspace --moments-out DIR' writes"
        )
    return chosen.of(settings, Given(null_space, key_moments))


def products(prior: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A A^T in float64, the rows of each new batch, as ``Metric.grams``."""
    rows = [prior, *batches]
    spans = list(pairwise(accumulate(len(part) for part in rows)))
    found = tuple(prior.new_zeros(e - s, e, dtype=torch.float64) for s, e in spans)
    for _, exact in _exactly(rows):
        for out, (start, end) in zip(found, spans, strict=True):
            out.addmm_(exact[start:end], exact[:end].T)
    return found


def products_with(left: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Products of ``left`` (u, d_in), float64, with lists of rows, n in all, (u, n)."""
    found = left.new_zeros(len(left), sum(map(len, rows)))
    for columns, exact in _exactly(rows):
        found.addmm_(left[:, columns], exact.T)
    return found


def _exactly(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Some columns after the other of rows (n, d_in) given in parts, (n, at once) in float64.

    Every entry is made float64 once; the tensor is overwritten by the next.
    """
    count, width = sum(map(len, parts)), parts[0].shape[1]
    space = parts[0].new_empty(count, COLUMNS_AT_ONCE, dtype=torch.float64)
    for start in range(0, width, COLUMNS_AT_ONCE):
        columns = slice(start, min(start + COLUMNS_AT_ONCE, width))
        exact = space[:, : columns.stop - start]
        for part, place in zip(parts, exact.split([len(part) for part in parts]), strict=True):
            place.copy_(part[:, columns])
        yield columns, exact
