"""Kinds of artefacts, how each is made and read, and what must come of a mutated one.

In: a kind's name and a case's number, which alone decide the mutation. Out: "loaded" or "refused".
A file that loads holds what is sane: finite numbers and shapes that agree, and it saves itself as
what it is. One that does not is refused by a ValueError or OSError of one sentence that names the
file. Anything else is an AssertionError, or the wrong exception itself.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.evaluation.results import JsonLines
from alphaedit_peft.evaluation.summary import CaseScores, gather
from alphaedit_peft.nullspace import (
    KeyMoments,
    NullSpace,
    read_covariances,
    read_projector,
    read_second_moments,
)
from alphaedit_peft.nullspace.moments import Checkpoint as Sums
from alphaedit_peft.nullspace.moments import Sums as Running
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.files import StoredPack, read_pack
from alphaedit_peft.report import pack_page, read_findings, scores_markdown, scores_page
from alphaedit_peft.studies.protocols import Checkpoint
from tests.fuzz.mutations import mutated
from tests.pack.conftest import make_pack

LONGEST = 400  # characters of an error
HUGE = 3 * 2**30  # bytes of a file that is mostly a hole
SEEDS = Path(__file__).parent / "seeds"
HOW = {"level": 0.9, "seed": 1}
HEAD = {"method": {"name": "ours"}, "schedule": {"order": 0}, "judging": HOW}


@dataclass(frozen=True)
class Kind:
    """A kind of artefact."""

    make: Callable[[Path], object]  # the valid files of one, in a folder
    read: Callable[[Path, Path], object]  # the folder, and one to save in again


def _make_null_space(folder: Path) -> None:
    _moments().null_space(0.5, "energy").save_pretrained(folder)


def _read_null_space(folder: Path, again: Path) -> None:
    found = NullSpace.from_pretrained(folder)
    found.summary()
    for layer in found.layers:
        assert bool(found.project(layer, torch.ones(2, found.width(layer))).isfinite().all())
    found.save_pretrained(again)
    kept = NullSpace.from_pretrained(again)
    assert (kept.digest(), kept.provenance) == (found.digest(), found.provenance)


def _read_moments(folder: Path, again: Path) -> None:
    _moments_again(KeyMoments.from_pretrained(folder), again)


def _moments_again(found: KeyMoments, again: Path) -> None:
    assert all(bool(moment.isfinite().all()) for moment in found.moments.values())
    found.save_pretrained(again)
    kept = KeyMoments.from_pretrained(again)
    assert (kept.digest(), kept.tokens) == (found.digest(), found.tokens)


def _moments() -> KeyMoments:
    keys = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    keys = keys * torch.logspace(0, -2, 6)
    moment = keys.T @ keys / 200
    return KeyMoments({0: moment, 2: moment + 0.1 * torch.eye(6)}, 200, {0: "a", 2: "b"})


def _make_npz(folder: Path) -> None:
    total = (_moments().moments[0] * 200).numpy()
    values = {"mom2.mom2": total, "mom2.count": 200, "sample_size": 9, "mom2.constructor": "x"}
    np.savez(folder / "x.npz", **values)


def _make_projectors(folder: Path) -> None:
    torch.save(torch.diag(torch.tensor([1.0] * 4 + [0.0] * 2)).repeat(2, 1, 1), folder / "x.pt")


def _read_projectors(folder: Path, again: Path) -> None:
    found = read_projector(folder / "x.pt", [0, 2])
    found.save_pretrained(again)
    assert NullSpace.from_pretrained(again).digest() == found.digest()


def _make_sums(folder: Path) -> None:
    sums = Running({"a": torch.eye(3), "b": torch.ones(2, 2)}, 9, 3, 2, "ab")
    Sums(folder / "sums.safetensors", {"modules": ["a", "b"], "fingerprint": None}).write(sums)


def _read_sums(folder: Path, again: Path) -> None:
    place = Sums(folder / "sums.safetensors", {"modules": ["a", "b"], "fingerprint": None})
    found = place.read()
    assert all(matrix.isfinite().all() for matrix in found.matrices.values())


def _make_pack(folder: Path) -> None:
    make_pack(3).save_pretrained(folder)


def _make_compressed(folder: Path) -> None:
    make_pack(4).compress(rank=2, dtype=torch.bfloat16).save_pretrained(folder)


def _read_pack(folder: Path, again: Path) -> None:
    found = EditPack.from_pretrained(folder)
    assert read_pack(folder, StoredPack).digest() == found.digest()
    found.summary()
    assert pack_page(found)
    found.save_pretrained(again)
    kept = EditPack.from_pretrained(again)
    assert (kept.digest(), kept.provenance) == (found.digest(), found.provenance)


def _cases() -> list[CaseScores]:
    tops, texts = {"neighborhood": [[1, 2], [3]]}, {"generation": ["a b"]}
    scores = [{"efficacy": 1.0, "specificity": 0.5}, {"efficacy": 0.0, "specificity": 1.0}]
    return [CaseScores(str(i), f"d{i}", some, tops, texts) for i, some in enumerate(scores)]


def _lines(path: Path, *values: object) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def _make_runs(folder: Path) -> None:
    whole = gather(_cases(), 0.9, 1)
    (folder / "before.json").write_text(json.dumps({"study": {}, "scores": whole.to_json()}))
    judged = Checkpoint(2, 2, whole.metrics, {"efficacy": (1.0, 0.0)}).to_json()
    made = [{"batch": i, "made": 1, "seconds": 0.5} for i in (1, 2)]
    for name, last in (("ours-0", {"judged": judged}), ("ours-1", {"judged": judged})):
        (folder / name).mkdir()
        _lines(folder / name / "results.jsonl", {"run": HEAD}, *made, last)
    single = [{"case": case.to_json(), "made": 1, "seconds": 0.1} for case in _cases()]
    (folder / "one-0").mkdir()
    other = {**HEAD, "method": {"name": "one"}}
    _lines(folder / "one-0" / "results.jsonl", {"run": other}, *single)


def _make_comparison(folder: Path) -> None:
    whole = gather(_cases(), 0.9, 1)
    point = Checkpoint(2, 2, whole.metrics, {"efficacy": (1.0, 0.0)}).to_json()
    run = {"head": HEAD, "checkpoints": [point, {**point, "batches": 4}], "made": 2, "seconds": 1.0}
    before = {name: estimate.to_json() for name, estimate in whole.metrics.items()}
    values = {"seeds": [0], "before": before, "methods": {"ours": {"runs": [run, run]}}}
    (folder / "comparison.json").write_text(json.dumps(values))


def _read_runs(folder: Path, again: Path) -> None:
    _shown(folder)


def _shown(path: Path) -> None:
    found = read_findings([path])
    assert scores_markdown(found)
    assert scores_page(found)


def _make_judged(folder: Path) -> None:
    for name in ("judged.jsonl", "judged.before.jsonl"):
        _lines(
            folder / name,
            {"judging": {"level": 0.9, "seed": 1}},
            *map(CaseScores.to_json, _cases()),
        )


def _read_judged(folder: Path, again: Path) -> None:
    _shown(folder / "judged.jsonl")
    again.mkdir()
    copy = again / "judged.jsonl"
    shutil.copyfile(folder / "judged.jsonl", copy)
    lines = JsonLines(copy, "judging", HOW).read()
    assert JsonLines(copy, "judging", HOW).read() == lines


def _make_config(folder: Path) -> None:
    AlphaEditConfig(rewrite_layers=[1, 2], contexts=["", "The"], ridge=0.1).save_pretrained(folder)


def _read_config(folder: Path, again: Path) -> None:
    found = AlphaEditConfig.from_pretrained(folder)
    found.save_pretrained(again)
    assert AlphaEditConfig.from_pretrained(again).to_json() == found.to_json()


KINDS = {
    "pack": Kind(_make_pack, _read_pack),
    "compressed": Kind(_make_compressed, _read_pack),
    "null-space": Kind(_make_null_space, _read_null_space),
    "key-moments": Kind(lambda folder: _moments().save_pretrained(folder), _read_moments),
    "npz": Kind(_make_npz, lambda f, a: _moments_again(read_second_moments({0: f / "x.npz"}), a)),
    "covariances": Kind(
        lambda folder: save_file({"a": _moments().moments[0]}, folder / "x.safetensors"),
        lambda f, a: _moments_again(read_covariances(f / "x.safetensors", {0: "a"}, 200), a),
    ),
    "pt": Kind(_make_projectors, _read_projectors),
    "sums": Kind(_make_sums, _read_sums),
    "config": Kind(_make_config, _read_config),
    "runs": Kind(_make_runs, _read_runs),
    "comparison": Kind(_make_comparison, lambda f, a: _shown(f / "comparison.json")),
    "judged": Kind(_make_judged, _read_judged),
}


class Trial:
    """A valid artefact of one kind in a temporary folder, and what becomes of its mutations."""

    def __init__(self, name: str) -> None:
        self.name, self.kind = name, KINDS[name]

    def __enter__(self) -> Trial:
        self._place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.folder = self._place / "artefact"
        self.folder.mkdir()
        self.kind.make(self.folder)
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".md")
        self.files = {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in sorted(files)}
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._place)

    def case(self, number: int) -> str:
        """Change a file as the number says, and see; the valid file is put back."""
        draw = Random(f"{self.name} {number}")
        name = draw.choice([*self.files])
        if draw.random() < 0.03:
            return self._replaced(name, lambda path: _strange(path, draw))
        return self.with_file(name, mutated(name, self.files[name], draw))

    def with_file(self, name: str, data: bytes) -> str:
        """The outcome where one of the files has other bytes."""
        return self._replaced(name, lambda path: path.write_bytes(data))

    def _replaced(self, name: str, write: Callable[[Path], object]) -> str:
        path = self.folder / name
        path.unlink()
        try:
            write(path)
            return self.outcome()
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(self.files[name])
            shutil.rmtree(self._place / "again", ignore_errors=True)

    def outcome(self) -> str:
        """ "loaded" or "refused"; anything else is raised."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                self.kind.read(self.folder, self._place / "again")
                found = "loaded"
            except (ValueError, OSError) as error:
                text = str(error)
                names = {Path(name).name for name in self.files} | {str(self.folder)}
                assert len(text) <= LONGEST, f"{len(text)} characters: {text[:300]}"
                if not any(name in text for name in names):
                    raise
                found = "refused"
        assert len(told) <= 2, [str(warning.message) for warning in told]
        return found


def _strange(path: Path, draw: Random) -> None:
    """Something else than a plain file in its place."""
    kind = draw.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("/etc/passwd")
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, HUGE)
