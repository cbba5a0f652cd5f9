"""What editing needs besides the model: tokenizer, null space, key moments, found when needed.

In: what the caller passed, and a config that may name the rest. Out: the objective and the
tokenizer, or a sentence that says what is missing and how to give it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphaedit_peft import embedded
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.fingerprint import BaseFingerprint, require_same_base
from alphaedit_peft.metric import AlphaEdit, Memit, Objective, make_objective
from alphaedit_peft.nullspace import KeyMoments, NullSpace

RELEVANT = (  # the settings that an objective depends on
    *("objective", "projection", "history", "moment_weight", "null_space"),
    *("ridge", "ridge_mode", "threshold", "threshold_mode"),
)


@dataclass
class Resources:
    """Tokenizer, null space and key moments of one model; what is missing is found at first use.

    They can be exchanged at any time, as settings can: the next use goes by what is there then.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    null_space: NullSpace | None = None
    key_moments: KeyMoments | None = None
    _objective: Objective | None = None
    _made_of: tuple[object, ...] = ()
    _digests: WeakKeyDictionary[NullSpace | KeyMoments, str] = field(
        default_factory=WeakKeyDictionary
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

    def find_objective(self, config: AlphaEditConfig, base: BaseFingerprint) -> Objective:
        """The objective of a resolved config, on statistics checked to be of this base.

        Raises:
            ValueError: statistics are missing, of another model, or lack a rewrite layer.
        """
        if self._objective is None or self._made_of != self._ingredients(config, base):
            layers = config.rewrite_layers or []
            if self.null_space is None and config.projects and config.null_space is not None:
                self.null_space = NullSpace.from_pretrained(config.null_space, fingerprint=base)
            if self.null_space is not None:
                self.null_space.check_base(base, layers)
                self.null_space = _at_threshold(self.null_space, config)
            if self.key_moments is not None:
                _check_moments(self.key_moments, base, layers)
            self._objective = make_objective(config, self.null_space, self.key_moments)
            self._made_of = self._ingredients(config, base)
        return self._objective

    def provenance(self) -> dict[str, object] | None:
        """What a pack records of the statistics that its rows depend on; None before their use.

        ``digest`` names them, ``tokens`` they were collected over; ``threshold`` and ``mode`` are
        the null space's, None where there is none.
        """
        objective = self._objective
        if not isinstance(objective, (AlphaEdit, Memit)):
            return None
        space = objective.null_space
        digest = "" if space is None else self._digest(space)
        statistics: NullSpace | KeyMoments | None = space
        if isinstance(objective, Memit):
            statistics = objective.moments
            both = (self._digest(statistics) + digest).encode()
            digest = hashlib.sha256(both).hexdigest()[:16] if digest else self._digest(statistics)
        return {
            "digest": digest,
            "tokens": None if statistics is None else statistics.tokens,
            "threshold": None if space is None else space.threshold,
            "mode": None if space is None else space.threshold_mode,
        }

    def _digest(self, statistics: NullSpace | KeyMoments) -> str:
        """A digest that reads all numbers, so only once for each value."""
        if statistics not in self._digests:
            self._digests[statistics] = statistics.digest()
        return self._digests[statistics]

    def _ingredients(self, config: AlphaEditConfig, base: BaseFingerprint) -> tuple[object, ...]:
        """What the objective is made of; statistics compare by identity."""
        settings = (getattr(config, name) for name in RELEVANT)
        layers = tuple(config.rewrite_layers or ())
        return (self.null_space, self.key_moments, base, layers, *settings)


def _check_moments(moments: KeyMoments, base: BaseFingerprint, layers: list[int]) -> None:
    missing = sorted(set(layers) - set(moments.layers))
    if missing:
        raise ValueError(
            f"these key moments are of layers {list(moments.layers)}, the config wants {layers}: "
            f"{missing} are missing; collect them for these layers"
        )
    if moments.fingerprint is not None:
        require_same_base(moments.fingerprint, base, "these key moments")


def _at_threshold(null_space: NullSpace, config: AlphaEditConfig) -> NullSpace:
    """The null space at the config's threshold, or the config at the null space's if it has none.

    A threshold that the user set wins; where none was set, the artefact's own is recorded.
    """
    if config.threshold is None:
        config.threshold = null_space.threshold
        config.threshold_mode = null_space.threshold_mode
    mode = config.threshold_mode or null_space.threshold_mode
    if (config.threshold, mode) == (null_space.threshold, null_space.threshold_mode):
        return null_space
    return null_space.with_threshold(config.threshold, mode)
