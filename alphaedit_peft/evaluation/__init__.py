"""Judge any causal language model over edits: data readers, metrics, judge.

`read_cases` reads a dataset, `embedded_suite` makes cases in the embedded world, `evaluate` runs a
model over them. Nothing here knows how edits are made: a model edited by this package, by another
one or not at all is judged alike.
"""

from alphaedit_peft.evaluation.cases import Case, Question, Suite, facts_of
from alphaedit_peft.evaluation.data import DataError, DataReport, read_cases
from alphaedit_peft.evaluation.drift import text_divergence, text_perplexity
from alphaedit_peft.evaluation.embedded_suite import embedded_suite
from alphaedit_peft.evaluation.judge import Judging, evaluate
from alphaedit_peft.evaluation.summary import CaseScores, Scores
from alphaedit_peft.log_probs import Reader, Reading

__all__ = [
    "Case",
    "CaseScores",
    "DataError",
    "DataReport",
    "Judging",
    "Question",
    "Reader",
    "Reading",
    "Scores",
    "Suite",
    "embedded_suite",
    "evaluate",
    "facts_of",
    "read_cases",
    "text_divergence",
    "text_perplexity",
]
