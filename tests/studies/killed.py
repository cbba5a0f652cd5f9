"""What a test runs in a process of its own: the tiny study, ended by SIGKILL at a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from alphaedit_peft.studies import METHODS, Schedule, sequential
from tests.conftest import tokenizer
from tests.studies.conftest import make_study

TWOS = Schedule(batch_size=2, every=1, order=3)


def main(folder: Path, step: int) -> None:
    """Run the sequence and kill this process when that many steps are reported."""
    reported = []

    def progress(text: str) -> None:
        reported.append(text)
        if len(reported) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    study = make_study(tokenizer.__wrapped__())
    sequential(study, METHODS["alphaedit"], folder, TWOS, progress=progress)
