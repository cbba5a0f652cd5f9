"""Where records come from: a JSON or JSON Lines file, or a dataset by its name.

In: a path, the name of a dataset for ``datasets.load_dataset``, or records at hand. Out: records
as plain JSON values, with a name for error messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alphaedit_peft.evaluation.data.fields import DataError


def raw_records(
    source: str | Path | Iterable[Mapping[str, Any]], split: str | None = None
) -> tuple[str, list[Any]]:
    """A name for the source, and its records.

    Args:
        source: a file (``.jsonl`` has one object a line, others hold a JSON list), the name of a
            Hub dataset or a folder that ``datasets`` reads, or an iterable of dicts.
        split: of a dataset; must be given there, and only there.

    Raises:
        DataError: no JSON, or no list of objects.
        FileNotFoundError: no such file, and no split that would make it a dataset.
        ImportError: a dataset, without ``datasets`` installed.
    """
    if not isinstance(source, (str, Path)):
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise DataError(
                f"source={source!r} is a {type(source).__name__}, not a list of records"
            )
        return type(source).__name__, list(source)
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise DataError(f"split={split!r} is for datasets, but {path} is a file; leave it out")
        return path.name, _lines(path) if path.suffix == ".jsonl" else _whole(path)
    if split is None:
        raise FileNotFoundError(
            f"{path} is no file; to read a dataset of that name, give its split too, such as train"
        )
    return f"{source}:{split}", _dataset(str(source), split)


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it is no JSON in UTF-8.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{Path(path).name} is not JSON in UTF-8: {error}") from error


def _whole(path: Path) -> list[Any]:
    found = read_json(path)
    if not isinstance(found, list):
        raise DataError(f"{path.name} holds a {type(found).__name__}, not a list of records")
    return found


def _lines(path: Path) -> list[Any]:
    records = []
    try:
        # newline="\n": JSON strings may hold other line separators
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    records.append(_line(path, number, line))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not text in UTF-8: {error}") from error
    return records


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path.name}, line {number} is not JSON: {error}") from error


def _dataset(name: str, split: str) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"source={name!r} is no file, and to read it as a dataset needs `pip install datasets`"
        ) from error
    return list(load_dataset(name, split=split))
