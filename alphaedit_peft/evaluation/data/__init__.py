"""Datasets of edits, read into cases: CounterFact, MQuAKE, zsRE, KnowEdit and one's own."""

from alphaedit_peft.evaluation.data.layouts import LAYOUTS, read_cases
from alphaedit_peft.evaluation.data.sources import DataReport
from alphaedit_peft.text_files import DataError

__all__ = ["LAYOUTS", "DataError", "DataReport", "read_cases"]
