"""The benchmark: seconds and memory of edits, beside the floor of their arithmetic.

`benchmark` measures a `Subject` by a `Plan`: AlphaEdit and MEMIT by phase, the plain way, what
packs cost in use. `random_model` makes models of a known shape, `growth` curves over edits, widths
and sizes.
"""

from alphaedit_peft.studies.benchmark.curves import FULL, SMALL, Grid, Growth, growth
from alphaedit_peft.studies.benchmark.measure import benchmark
from alphaedit_peft.studies.benchmark.subject import (
    LENGTHS,
    SHAPES,
    Statistics,
    Subject,
    benchmark_config,
    collect_statistics,
    made_up_edits,
    random_model,
    random_statistics,
    read_shape,
    shape_config,
    stand_in_tokenizer,
)
from alphaedit_peft.studies.benchmark.timings import (
    OBJECTIVES,
    Batch,
    Findings,
    Floor,
    Forward,
    PlainSession,
    Plan,
    Session,
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
