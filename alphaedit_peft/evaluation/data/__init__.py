"""Datasets of edits, read into cases: CounterFact, zsRE, KnowEdit, and this package's own JSONL."""

from alphaedit_peft.evaluation.data.layouts import LAYOUTS, read_cases
from alphaedit_peft.evaluation.data.records import DataError, DataReport

__all__ = ["LAYOUTS", "DataError", "DataReport", "read_cases"]
