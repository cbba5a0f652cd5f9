"""What editing needs besides the model: tokenizer, null space, key moments, found when needed.

In: what the caller passed, and a config that may name the rest. Out: the metric and the
tokenizer, or a sentence that says what is missing and how to give it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphaedit_peft import embedded
from alphaedit_peft.fingerprint import BaseFingerprint, require_same_base
from alphaedit_peft.messages import shown
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.settings import EditOptions, Settings
from alphaedit_peft.solve_metric import Metric, kind, make_metric

READ_BY_ALL = ("objective", "rewrite_layers", "projection", "null_space")


@dataclass
class Resources:
    """Tokenizer, null space and key moments of one model; what is missing is found at first use.

    They can be exchanged at any time, as settings can: the next use goes by what is there then.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    null_space: NullSpace | None = None
    key_moments: KeyMoments | None = None
    _metric: Metric | None = None
    _made_of: tuple[object, ...] = ()
    _rows_depend_on: dict[str, object] = field(default_factory=dict)  # settings, by name

    def __post_init__(self) -> None:
        for name, wanted in (("null_space", NullSpace), ("key_moments", KeyMoments)):
            value = getattr(self, name)
            if not isinstance(value, wanted | None):
                also = ", or name the path in config.null_space" if name == "null_space" else ""
                raise TypeError(
                    f"{name}={shown(value, 100)} is a {type(value).__name__}, not a "
                    f"{wanted.__name__}; pass {wanted.__name__}.from_pretrained(path){also}"
                )

    def find_tokenizer(self, model: nn.Module) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded from the model's own name where it was not given.

        Raises:
            ValueError: none was given and none can be loaded.
        """
        if self.tokenizer is None:
            name = getattr(model, "name_or_path", "")
            try:
                place = embedded.folder() if name == embedded.NAME else name
                self.tokenizer = AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"no tokenizer was given, and none can be loaded from base.name_or_path="
                    f"{name!r}; pass tokenizer="
                ) from error
        return self.tokenizer

    def find_metric(self, settings: EditOptions, base: BaseFingerprint) -> Metric:
        """The metric of settings, on statistics checked to be of this base.

        Raises:
            ValueError: statistics are missing, of another model, or lack a rewrite layer.
        """
        if self._metric is None or self._made_of != self._ingredients(settings, base):
            layers = settings.rewrite_layers or []
            needed = "null_space" in kind(settings.objective).needs(settings)
            if self.null_space is None and needed and settings.null_space is not None:
                self.null_space = NullSpace.from_pretrained(settings.null_space, fingerprint=base)
            if self.null_space is not None:
                self.null_space.check_base(base, layers)
                self.null_space = _at_threshold(self.null_space, settings)
            if self.key_moments is not None:
                _check_moments(self.key_moments, base, layers)
            self._metric = make_metric(Settings.of(settings), self.null_space, self.key_moments)
            self._made_of = self._ingredients(settings, base)
            self._rows_depend_on = self._metric.settings_of_rows(settings)
        return self._metric

    def provenance(self) -> dict[str, object] | None:
        """What a pack stores of what its rows depend on; None before the metric's use."""
        if self._metric is None:
            return None
        return self._metric.provenance() | self._rows_depend_on

    def _ingredients(self, settings: EditOptions, base: BaseFingerprint) -> tuple[object, ...]:
        """What the metric is made of; statistics compare by identity."""
        said = settings.to_json()
        read = kind(settings.objective).reads
        chosen = said if read is None else {name: said[name] for name in (*READ_BY_ALL, *read)}
        return (self.null_space, self.key_moments, base, repr(chosen))


def _check_moments(moments: KeyMoments, base: BaseFingerprint, layers: list[int]) -> None:
    missing = sorted(set(layers) - set(moments.layers))
    if missing:
        raise ValueError(
            f"these key moments are of layers {list(moments.layers)}, the config wants {layers}: "
            f"{missing} are missing; collect them for these layers"
        )
    if moments.fingerprint is not None:
        require_same_base(moments.fingerprint, base, "these key moments")


def _at_threshold(null_space: NullSpace, settings: EditOptions) -> NullSpace:
    """The null space at the config's threshold, or the config at the null space's if it has none.

    A threshold that the user set wins; where none was set, the artefact's own is recorded.
    """
    if settings.threshold is None:
        settings.threshold = null_space.threshold
        settings.threshold_mode = null_space.threshold_mode
    mode = settings.threshold_mode or null_space.threshold_mode
    if (settings.threshold, mode) == (null_space.threshold, null_space.threshold_mode):
        return null_space
    return null_space.with_threshold(settings.threshold, mode)
