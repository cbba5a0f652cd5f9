"""Data for tests, from the shared folder and from the package; a script run as a reader would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaedit_peft import Edit, embedded
from tests.conftest import ROOT

FIGURES = ROOT / "docs" / "figures"


def run(script: Path, *words: object, cwd: Path = ROOT) -> str:
    """What a script prints, run as a reader would run it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_lm(folder: Path, dtype: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def embedded_edits(count: int, step: int) -> list[Edit]:
    """Every ``step``-th of so many edits of the embedded model; skips where it has no weights."""
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")
    wanted = [record["requested_rewrite"] for record in embedded.records(count)[::step]]
    return [Edit(w["subject"], w["prompt"], w["target_new"]["str"]) for w in wanted]


def counterfact(folder: Path, known_to: str | None = None) -> list[dict]:
    """CounterFact records; those that a model was trained on where ``known_to`` names it."""
    records = json.loads((folder / "counterfact_600.json").read_text())
    if known_to is None:
        return records
    ids = set(json.loads((folder / known_to / "case_ids.json").read_text()))
    return [record for record in records if record["case_id"] in ids]


def counterfact_edit(record: dict) -> Edit:
    rewrite = record["requested_rewrite"]
    return Edit(
        subject=rewrite["subject"],
        prompt=rewrite["prompt"],
        target_new=rewrite["target_new"]["str"],
        target_true=rewrite["target_true"]["str"],
        paraphrases=tuple(record["paraphrase_prompts"]),
        neighborhood=tuple(record["neighborhood_prompts"]),
    )


def zsre_edits(folder: Path, count: int) -> list[Edit]:
    """zsRE questions whose subject stands in them once."""
    records = json.loads((folder / "zsre_eval_700.json").read_text())
    found = [
        Edit(
            subject=r["subject"],
            prompt=r["src"].replace(r["subject"], "{}"),
            target_new=r["alt"],
            target_true=r["answers"][0],
            paraphrases=(r["rephrase"],),
        )
        for r in records
        if r["src"].count(r["subject"]) == 1 and r["alt"].strip()
    ]
    return found[:count]


def wikitext(folder: Path, part: str = "valid") -> list[str]:
    text = (folder / f"wikitext2_{part}.txt").read_text().replace("<unk>", "")
    return [line for line in text.split("\n") if len(line) > 50]
