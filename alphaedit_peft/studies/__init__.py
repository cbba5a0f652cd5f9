"""Studies: edits made by a protocol, judged, and editors compared on the same cases.

`Study` says what is studied, `METHODS` lists editors, `sequential`, `at_once` and `single` run one
of them, `compare` several over several orders of the cases, each with the settings that `choose`
found for it on other cases. Runs live in folders and can be killed
and taken up.
"""

from alphaedit_peft.studies.base import Base, Study, file_digest
from alphaedit_peft.studies.compare import Comparison, choose, compare
from alphaedit_peft.studies.methods import (
    METHODS,
    FineTuned,
    FineTuning,
    Method,
    find_methods,
    fine_tune,
)
from alphaedit_peft.studies.protocols import Checkpoint, Run, Schedule, at_once, sequential, single

__all__ = [
    "METHODS",
    "Base",
    "Checkpoint",
    "Comparison",
    "FineTuned",
    "FineTuning",
    "Method",
    "Run",
    "Schedule",
    "Study",
    "at_once",
    "choose",
    "compare",
    "file_digest",
    "find_methods",
    "fine_tune",
    "sequential",
    "single",
]
