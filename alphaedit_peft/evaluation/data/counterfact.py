"""CounterFact and multi_counterfact records, and the texts that CounterFact's consistency needs.

In: records with ``requested_rewrite``, ``paraphrase_prompts``, ``neighborhood_prompts``,
``generation_prompts``. Out: cases. The layout is that of ROME's and MEMIT's data; the ids of
targets may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alphaedit_peft.edits import Edit
from alphaedit_peft.evaluation.cases import Case, Question
from alphaedit_peft.evaluation.data.records import DataError, Record, read_json

Snippets = Mapping[tuple[str, str], tuple[str, ...]]


def is_counterfact(record: Record) -> bool:
    """Whether a record looks like CounterFact's."""
    return "requested_rewrite" in record.values


def counterfact_case(record: Record, snippets: Snippets | None = None) -> Case:
    """The case of one record.

    Args:
        record: in CounterFact's layout. ``attribute_prompts`` are read past: the metrics of the
            papers do not use them.
        snippets: reference texts by relation id and target id (``read_snippets``).

    Raises:
        DataError: a field that is missing or wrong.
    """
    rewrite = record.record("requested_rewrite")
    new, true = (rewrite.record(name) for name in ("target_new", "target_true"))
    try:
        edit = Edit(
            subject=rewrite.text("subject"),
            prompt=rewrite.text("prompt"),
            target_new=new.text("str"),
            target_true=true.text("str"),
        )
    except DataError:
        raise
    except ValueError as error:
        raise rewrite.error("prompt", f": {error}") from error
    references: tuple[str, ...] = ()
    if snippets is not None:
        key = (rewrite.text("relation_id"), new.text("id"))
        if key not in snippets:
            raise rewrite.error("target_new.id", f"={key[1]!r} has no snippets for {key[0]}")
        references = snippets[key]
    return Case(
        edit=edit,
        paraphrases=record.texts("paraphrase_prompts"),
        neighborhood=tuple(
            Question(prompt, true.text("str")) for prompt in record.texts("neighborhood_prompts")
        ),
        generation=record.texts("generation_prompts"),
        references=references,
    )


def read_snippets(path: str | Path) -> Snippets:
    """CounterFact's ``attribute_snippets.json``: texts by (relation id, target id).

    Raises:
        DataError: a file of another layout.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    entries = read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{Path(path).name} holds a {type(entries).__name__}, not a list")
    for number, values in enumerate(entries):
        entry = Record.of(values, Path(path).name, number)
        texts = tuple(sample.text("text") for sample in entry.records("samples"))
        key = (entry.text("relation_id"), entry.text("target_id"))
        found[key] = found.get(key, ()) + texts
    return found
