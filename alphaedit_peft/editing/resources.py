"""What editing needs besides the model: tokenizer, null space, key moments, found when needed.

In: what the caller passed, and a config that may name the rest. Out: the objective and the
tokenizer, or a sentence that says what is missing and how to give it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphaedit_peft import embedded
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.objective import Objective, make_objective
from alphaedit_peft.fingerprint import BaseFingerprint, require_same_base
from alphaedit_peft.nullspace import KeyMoments, NullSpace


@dataclass
class Resources:
    """Tokenizer, null space and key moments of one model; what is missing is found at first use."""

    tokenizer: PreTrainedTokenizerBase | None = None
    null_space: NullSpace | None = None
    key_moments: KeyMoments | None = None
    _objective: Objective | None = None
    _digest: tuple[NullSpace, str] | None = None

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
        if self._objective is None:
            layers = config.rewrite_layers or []
            if self.null_space is None and config.projects and config.null_space is not None:
                self.null_space = NullSpace.from_pretrained(config.null_space)
            if self.null_space is not None:
                self.null_space.check_base(base, layers)
                self.null_space = _at_threshold(self.null_space, config)
            if self.key_moments is not None:
                _check_moments(self.key_moments, base, layers)
            self._objective = make_objective(config, self.null_space, self.key_moments)
        return self._objective

    def provenance(self) -> dict[str, object] | None:
        """What a pack records of the null space; None without one."""
        space = self.null_space
        if space is None:
            return None
        if self._digest is None or self._digest[0] is not space:
            self._digest = space, space.digest()  # it reads the whole basis, so only once
        facts = {"tokens": space.tokens, "threshold": space.threshold}
        return {"digest": self._digest[1], **facts, "mode": space.threshold_mode}


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
