"""The edited model: a PEFT model whose LoRA adapter is the edits made so far.

In: a base model and an :class:`AlphaEditConfig`, or a base model and a pack. Out:
:class:`AlphaEditModel`, a ``PeftModelForCausalLM``: wrapped and loaded here, it edits itself by
``editable``, merges by ``merging`` and saves what ``adapter`` holds.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.devices import require_whole
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.editing.state import Journal
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.model import lora_layer
from alphaedit_peft.model.fitting import check_fit, check_plain
from alphaedit_peft.model.join_packs import JoinableModel
from alphaedit_peft.model.load import require_path
from alphaedit_peft.model.stack import require_parents
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.files import locate, read_steadily
from alphaedit_peft.pack.format import ADAPTER_CONFIG, PackError
from alphaedit_peft.pack.lora import read_lora


def get_alphaedit_model(
    base: nn.Module,
    config: AlphaEditConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    null_space: NullSpace | None = None,
    key_moments: KeyMoments | None = None,
    adapter_name: str = "default",
) -> AlphaEditModel:
    """Wrap a base model for editing; without edits it computes the same bits as its base.

    Args:
        base: a causal language model from transformers.
        config: see :class:`AlphaEditConfig`; fields left at None are filled for this model.
        tokenizer: loaded from ``base.name_or_path`` at the first edit where not given.
        null_space: loaded from ``config.null_space`` at the first edit where not given.
        key_moments: for ``objective="memit"`` only.
        adapter_name: PEFT's name of the adapter that holds the edits.

    Raises:
        ValueError: a model that cannot be edited, or settings that do not fit it.
        TypeError: a config or statistics of another type.
    """
    resources = _resources(tokenizer, null_space, key_moments)
    return AlphaEditModel(base, config, resources=resources, adapter_name=adapter_name)


class AlphaEditModel(JoinableModel):
    """A causal language model and its edits; make one with :func:`get_alphaedit_model`.

    What PEFT does with a LoRA model works here too: ``generate``, ``set_adapter``, several
    adapters. ``alphaedit_config`` holds the settings, filled for this model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AlphaEditConfig,
        *,
        resources: Resources | None = None,
        adapter_name: str = "default",
        plain_lora: LoraConfig | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the base model is {model!r}; pass a loaded model, such as "
                "AutoModelForCausalLM.from_pretrained(name) gives"
            )
        if not isinstance(config, AlphaEditConfig):
            raise TypeError(
                f"config is a {type(config).__name__}, not an AlphaEditConfig; pass "
                "AlphaEditConfig(), with the settings to change"
            )
        require_whole(model)
        if lora_layer.lora_layers(model):
            raise ValueError(
                f"this {type(model).__name__} carries PEFT adapters already; pass the bare model, "
                "which unload() or merge_and_unload() gives"
            )
        full, architecture = config.resolve(model)
        self._undecided = config.open_settings
        if config.threshold is None:  # the null space brings its own
            full.threshold = full.threshold_mode = None
        own_fingerprint = fingerprint(model, max(full.rewrite_layers or [0]), architecture)
        super().__init__(model, plain_lora or full.lora_config(architecture, 1), adapter_name)
        lora_layer.make_exact(self)
        lora_layer.place_factors(self)
        self.alphaedit_config, self.architecture = full, architecture
        self.base_fingerprint = own_fingerprint
        self.resources = resources or Resources()
        self._journals, self._stamps, self._snapshots = {}, {}, {}
        self._sources, self._compressions = {}, {}
        self._solvers, self._moments = {}, {}
        if plain_lora is None:
            self._start(adapter_name, Journal.empty(self.config.hidden_size))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # noqa: PLR0913
        cls,
        model: nn.Module,
        model_id: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        null_space: NullSpace | None = None,
        key_moments: KeyMoments | None = None,
        adapter_name: str = "default",
        allow_base_mismatch: bool = False,
        missing_parents: str = "error",
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> AlphaEditModel:
        """Load a pack onto its base model.

        A folder without sidecar is a plain LoRA: it loads, with a warning, and cannot be edited.

        Args:
            model: the bare base model.
            model_id: a pack's folder, or a Hub repository.
            tokenizer: as in :func:`get_alphaedit_model`; needed only to go on editing.
            null_space: likewise; it must be the one the edits were made with.
            key_moments: likewise, for MEMIT.
            adapter_name: PEFT's name of the adapter.
            allow_base_mismatch: load onto another base than the pack was made for.
            missing_parents: ``warn`` loads a pack without those it was made on top of.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            subfolder: of the pack within the folder or repository.

        Raises:
            PackError: a damaged pack.
            ValueError: another base, unless ``allow_base_mismatch``; a pack made on top of others,
                which are to be loaded first, unless ``missing_parents="warn"``.
            FileNotFoundError: no such folder, or one without an adapter.
            TypeError: a ``model_id`` that is no path, or statistics of another type.
        """
        require_path(model_id)
        resources = _resources(tokenizer, null_space, key_moments)
        where: dict[str, Any] = {"revision": revision, "token": token, "subfolder": subfolder}
        try:
            pack = EditPack.from_pretrained(model_id, **where)
        except FileNotFoundError as error:
            return cls._from_plain_lora(model, model_id, where, adapter_name, error)
        check_fit(pack, model, allow_base_mismatch)
        require_parents("this pack", pack.parents, [], [], missing_parents)
        edited = cls(model, pack.config, resources=resources, adapter_name=adapter_name)
        for layer in edited.alphaedit_config.rewrite_layers or ():
            edited._write(layer, pack.factors[edited.architecture.rewrite_name(layer)])
        edited._keep_pack(pack, model_id)
        return edited.eval()

    @classmethod
    def _from_plain_lora(
        cls,
        model: nn.Module,
        model_id: str | Path,
        where: dict[str, Any],
        adapter_name: str,
        error: FileNotFoundError,
    ) -> AlphaEditModel:
        folder = locate(model_id, **where)
        if not (folder / ADAPTER_CONFIG).is_file():
            raise error
        factors, _ = read_steadily(folder, read_lora)
        check_plain(factors, model, folder)
        lora_config = LoraConfig.from_pretrained(str(folder))
        lora_config.inference_mode = True
        lora_config.target_modules = set(factors)
        edited = cls(model, AlphaEditConfig(), adapter_name=adapter_name, plain_lora=lora_config)
        try:
            found = edited.load_adapter(str(folder), adapter_name)
            if found.missing_keys or found.unexpected_keys:
                raise PackError(f"{folder}: its tensors changed while they were read; load again")
        except BaseException:
            edited.unload()
            raise
        warnings.warn(
            f"{model_id} has no sidecar folder 'alphaedit/': it is loaded as a plain LoRA, which "
            "can be used and merged but not edited",
            stacklevel=3,
        )
        return edited.eval()


def _resources(
    tokenizer: PreTrainedTokenizerBase | None,
    null_space: NullSpace | None,
    key_moments: KeyMoments | None,
) -> Resources:
    if not isinstance(null_space, NullSpace | None):
        raise TypeError(
            f"null_space={null_space!r} is a {type(null_space).__name__}, not a NullSpace; pass "
            "NullSpace.from_pretrained(path), or name the path in config.null_space"
        )
    if not isinstance(key_moments, KeyMoments | None):
        raise TypeError(
            f"key_moments={key_moments!r} is a {type(key_moments).__name__}, not a KeyMoments; "
            "pass KeyMoments.from_pretrained(path)"
        )
    return Resources(tokenizer, null_space, key_moments)
