"""The benchmark: seconds and memory of edits, beside the floor of their arithmetic.

`benchmark` measures a `Subject` by a `Plan`: AlphaEdit and MEMIT by phase, the plain way, what
packs cost in use. `random_model` makes models of a known shape, `growth` curves over edits, widths
and sizes.
"""

from alphaedit_peft.studies.benchmark.findings import (
    Batch,
    Findings,
    Floor,
    Forward,
    PlainSession,
    Session,
)
from alphaedit_peft.studies.benchmark.growing import FULL, SMALL, Grid, Growth, growth
from alphaedit_peft.studies.benchmark.measuring import benchmark
from alphaedit_peft.studies.benchmark.plan import OBJECTIVES, Plan
from alphaedit_peft.studies.benchmark.preparing import (
    Statistics,
    Subject,
    benchmark_config,
    collect_statistics,
    random_statistics,
)
from alphaedit_peft.studies.benchmark.requests import LENGTHS, made_up_edits
from alphaedit_peft.studies.benchmark.shapes import (
    SHAPES,
    random_model,
    read_shape,
    shape_config,
    stand_in_tokenizer,
)

__all__ = [
    "FULL",
    "LENGTHS",
    "OBJECTIVES",
    "SHAPES",
    "SMALL",
    "Batch",
    "Findings",
    "Floor",
    "Forward",
    "Grid",
    "Growth",
    "PlainSession",
    "Plan",
    "Session",
    "Statistics",
    "Subject",
    "benchmark",
    "benchmark_config",
    "collect_statistics",
    "growth",
    "made_up_edits",
    "random_model",
    "random_statistics",
    "read_shape",
    "shape_config",
    "stand_in_tokenizer",
]
