"""Kinds of artefacts and of files that users give: how a valid one is made, and how each is read.

In: a folder to write in, or one to read and another to save in again. A file that loads holds what
is sane: finite numbers and shapes that agree, and it saves itself as what it is; else reading
raises.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.edits import read_edits, write_edits
from alphaedit_peft.evaluation import read_cases
from alphaedit_peft.evaluation.results import JsonLines
from alphaedit_peft.evaluation.summary import CaseScores, gather
from alphaedit_peft.nullspace import (
    KeyMoments,
    NullSpace,
    read_covariances,
    read_projector,
    read_second_moments,
)
from alphaedit_peft.nullspace.corpus import file_texts
from alphaedit_peft.nullspace.moments import Checkpoint as Sums
from alphaedit_peft.nullspace.moments import Sums as Running
from alphaedit_peft.pack import EditPack
from alphaedit_peft.pack.files import StoredPack, read_pack
from alphaedit_peft.report import pack_page, read_findings, scores_markdown, scores_page
from alphaedit_peft.studies.protocols import Checkpoint, RunFolder
from tests.evaluation.data.test_layouts import COUNTERFACT, MQUAKE, OWN, RECENT, ZSRE
from tests.pack.conftest import edit, make_pack

HOW = {"level": 0.9, "seed": 1}
HEAD = {"method": {"name": "ours"}, "schedule": {"order": 0}, "judging": HOW}


@dataclass(frozen=True)
class Kind:
    """A kind of artefact."""

    make: Callable[[Path], object]  # the valid files of one, in a folder
    read: Callable[[Path, Path], object]  # the folder, and one to save in again
    pipes: bool = False  # may be given as a pipe, whose end is waited for


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
    for name, head in (("ours-0", HEAD), ("one-0", {**HEAD, "method": {"name": "one"}})):
        (again / name).mkdir(parents=True)
        shutil.copy(folder / name / "results.jsonl", again / name)
        RunFolder(again / name, head).begin()


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


def _make_edits(folder: Path) -> None:
    edits = [edit(number) for number in range(3)]
    write_edits(edits, folder / "edits.jsonl")
    (folder / "list.json").write_text(json.dumps([one.to_dict() for one in edits]))
    with (folder / "edits.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["subject", "prompt", "target_new"])
        rows.writerows((one.subject, one.prompt, one.target_new) for one in edits)


def _read_edits(folder: Path, again: Path) -> None:
    again.mkdir()
    for path in sorted(folder.iterdir()):
        found = read_edits(path)
        write_edits(found, again / "edits.jsonl")
        assert read_edits(again / "edits.jsonl") == found


LAYOUTS = {
    "counterfact": COUNTERFACT,
    "mquake": MQUAKE,
    "zsre": ZSRE,
    "knowedit": RECENT,
    "own": OWN,
}


def _make_cases(folder: Path) -> None:
    for name, record in LAYOUTS.items():
        (folder / f"{name}.json").write_text(json.dumps([record, record]))
    _lines(folder / "lines.jsonl", OWN, OWN)


def _read_cases(folder: Path, again: Path) -> None:
    for path in sorted(folder.iterdir()):
        found, report = read_cases(path)
        assert len(str(report)) < 3000
        for case in found:
            json.dumps(case.to_dict(), ensure_ascii=False, allow_nan=False).encode()


def _make_texts(folder: Path) -> None:
    (folder / "texts.txt").write_text("One line.\nAnother é.\n\nA third.\n", encoding="utf-8")
    _lines(folder / "texts.jsonl", {"text": "one"}, {"text": "two"})


def _read_texts(folder: Path, again: Path) -> None:
    for path in sorted(folder.iterdir()):
        assert all(isinstance(text, str) for text in file_texts(str(path), "text"))


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
    "edits": Kind(_make_edits, _read_edits, pipes=True),
    "cases": Kind(_make_cases, _read_cases, pipes=True),
    "texts": Kind(_make_texts, _read_texts, pipes=True),
}
