"""The demonstration, run once: its folder and findings serve the tests of all commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alphaedit_peft import embedded
from alphaedit_peft.cli import app


@pytest.fixture(scope="session")
def embedded_model() -> str:
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")
    return "embedded"


@pytest.fixture(scope="session")
def shown(embedded_model, tmp_path_factory):
    """(folder, findings) of the demonstration: null space, pack, and what was measured."""
    import warnings

    from alphaedit_peft.cli.demo_run import demonstrate

    folder = tmp_path_factory.mktemp("demo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return folder, demonstrate(folder)


@pytest.fixture
def run():
    """Run a command in this process."""

    def runs(*words: object, code: int = 0):
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exit_code != code:
            print(result.output, result.stderr, result.exception)
        assert result.exit_code == code
        return result

    return runs


@pytest.fixture
def run_json(run):
    """Run a command with ``--json`` and read what it prints."""
    return lambda *words, code=0: json.loads(run(*words, "--json", code=code).stdout)


@pytest.fixture
def shell():
    """Run a command as a user does, in a process of its own."""

    def runs(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "alphaedit_peft.cli", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **environment},
            check=False,
        )

    return runs


def write_lines(path: Path, *edits: dict) -> Path:
    path.write_text("".join(json.dumps(edit) + "\n" for edit in edits), encoding="utf-8")
    return path


@pytest.fixture
def edits_file(tmp_path) -> Path:
    """Two edits of the embedded world that the demonstration does not make."""
    found = []
    for record in embedded.records()[120:128:7]:
        wanted = record["requested_rewrite"]
        found.append(
            {
                "subject": wanted["subject"],
                "prompt": wanted["prompt"],
                "target_new": wanted["target_new"]["str"],
            }
        )
    return write_lines(tmp_path / "edits.jsonl", *found)
