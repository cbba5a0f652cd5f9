"""What a study works on: a base model with its statistics, the cases, and how to judge them.

In: a model, its tokenizer, a null space, key moments, a suite. Out: :class:`Base` and
:class:`Study`, values that every protocol takes, and the provenance that goes with every result.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from alphaedit_peft import safe_files, saving
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.editing.prompts import Renderer
from alphaedit_peft.evaluation import Judging, Scores, Suite, evaluate
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.progress import counting
from alphaedit_peft.safe_files import Field
from alphaedit_peft.settings import Settings

Progress = Callable[[str], object]  # told a line of text after each step


@dataclass(frozen=True, eq=False)
class Base:
    """An unedited model from transformers, and the statistics that methods need.

    ``tokenizer`` is a fast one; what projects takes the null space, MEMIT and ROME key moments.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    null_space: NullSpace | None = None
    key_moments: KeyMoments | None = None

    @classmethod
    def from_texts(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[Any] | str,
        config: AlphaEditConfig | None = None,
        *,
        max_tokens: int | None = None,
        progress: bool = False,
    ) -> Base:
        """Collect key moments over texts, and make the null space of them.

        ``config`` has rewrite layers and threshold; the rest, and errors, are as those of
        ``KeyMoments.collect`` and ``NullSpace.from_moments``.
        """
        full, _ = (config or AlphaEditConfig()).resolve(model)
        moments = KeyMoments.collect(
            model, tokenizer, texts, full, max_tokens=max_tokens, progress=progress
        )
        return cls(model, tokenizer, moments.null_space(config=full), moments)

    def require_rows(self, suite: Suite, config: AlphaEditConfig) -> None:
        """Refuse edits that the tokenizer cannot place, before anything is run; ValueError."""
        renderer = Renderer(self.tokenizer, Settings.of(config.resolve(self.model)[0]))
        for edit in suite.edits:
            renderer.edit_rows(edit, ())


@dataclass(frozen=True, eq=False)
class Study:
    """What runs have in common, whatever the method.

    In ``config``, where every method starts, the later of two records that contradict each other
    wins by default, since data sets hold such pairs.
    """

    base: Base
    suite: Suite  # the cases, and what else is asked
    config: AlphaEditConfig = field(default_factory=lambda: AlphaEditConfig(on_conflict="replace"))
    how: Judging | None = None  # None: prompts as in ``config``, all else by default
    generate: bool = False  # whether the model also writes (see ``evaluate``); slow
    data: Mapping[str, Any] = field(default_factory=dict)  # its origin, as JSON, for provenance

    @property
    def judging(self) -> Judging:
        """How to judge: as ``how`` says, or ``config``."""
        return self.how or Judging.of(self.config)

    def judge(
        self, model: nn.Module, suite: Suite, results: Path | None, before: Scores | None = None
    ) -> Scores:
        """A model judged over a suite in this study's way; see ``evaluate``."""
        return evaluate(
            model,
            self.base.tokenizer,
            suite,
            baseline=before,
            generate=self.generate,
            results=results,
            how=self.judging,
        )

    def provenance(self) -> dict[str, Any]:
        """All that the numbers depend on but method and schedule, as plain JSON values."""
        full, architecture = self.config.resolve(self.base.model)
        made_for = fingerprint(self.base.model, max(full.rewrite_layers or [0]), architecture)
        space, moments = self.base.null_space, self.base.key_moments
        weights = next(self.base.model.parameters())
        return {
            "versions": versions(),
            "base": made_for.to_json(),
            "dtype": dtype_name(weights.dtype),
            "device": weights.device.type,
            "null_space": None if space is None else space.digest(),
            "key_moments": None if moments is None else moments.digest(),
            "data": {**self.data, "digest": suite_digest(self.suite)},
            "cases": len(self.suite.cases),
            "judging": {**self.judging.to_json(), "generate": self.generate},
        }


def judged_before(study: Study, folder: Path) -> Scores:
    """The unedited model's scores on all cases; kept in ``before.json`` and read from there.

    ValueError: the file is of another study.
    """
    path, made_of = folder / "before.json", json.loads(json.dumps(study.provenance()))
    if path.exists():
        found = safe_files.read_json(path, limit=safe_files.MAX_RESULTS_BYTES)
        with safe_files.refusing(path):
            safe_files.check_fields(found, {"study": Field(dict), "scores": Field(dict)})
            scores = Scores.from_json(found["scores"])
        if found["study"] != made_of:
            wrong = [name for name in made_of if found["study"].get(name) != made_of[name]]
            raise ValueError(
                f"{path} is of another study: {', '.join(wrong)} differ; name another folder"
            )
        return scores
    study.base.require_rows(study.suite, study.config)
    folder.mkdir(parents=True, exist_ok=True)
    with counting("the unedited model judged", 1, "model", bar=False):
        scores = study.judge(study.base.model, study.suite, folder / "before-cases.jsonl")
    text = json.dumps({"study": made_of, "scores": scores.to_json()}, ensure_ascii=False)
    saving.replace_file(path, text + "\n")
    return scores


def versions() -> dict[str, str]:
    """Of this package, of the libraries that numbers depend on, and of Python."""
    more = {"peft": version("peft"), "numpy": version("numpy")}
    return safe_files.versions() | more | {"python": platform.python_version()}


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def suite_digest(suite: Suite) -> str:
    """Sixteen hex digits of everything a suite asks, in its order."""
    asked = [case.digest for case in suite.cases]
    content = [asked, [asdict(question) for question in suite.unedited], list(suite.texts)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex: what a data set is known by."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
