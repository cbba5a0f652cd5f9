"""Texts as batches of token ids, for the pass that collects key moments.

In: an iterable of texts, a ``datasets`` object, or the name of a text file or Hub dataset; and a
tokenizer. Out: right-padded batches of at most ``tokens_per_batch`` ids, padding included. Special
tokens are the tokenizer's own default (a text begins with BOS where the tokenizer adds one) and
count as keys like any other token; padding is marked in the mask and never counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from alphaedit_peft.hub import answers_told
from alphaedit_peft.messages import shown
from alphaedit_peft.records import json_kind, read_record
from alphaedit_peft.text_files import fault, read_lines

TEXTS_AT_ONCE = 64
BATCHES_BUFFERED = 16  # windows of about this many batches are sorted by length, to pad less
Row = tuple[list[int], int]  # token ids, and how many texts were read up to their end
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")  # repo, repo:config, repo:config:split


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids (rows, tokens), the mask of real ones, and how many texts were read."""

    ids: Tensor
    mask: Tensor
    texts: int

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return int(self.mask.sum())


def read_texts(texts: Any, text_column: str = "text") -> Iterable[str]:
    """The texts of a corpus.

    That is an iterable of texts; a ``datasets.Dataset`` or ``IterableDataset``, whose
    ``text_column`` holds them; or a name: of a text file (one text a line, or a JSON object with
    ``text_column`` a line), or of a Hub dataset as ``repo``, ``repo:config`` or
    ``repo:config:split`` (streamed; split ``train`` unless given).

    Raises:
        ValueError: a dataset without that column or with several splits, no such name, or a file
            that is no text.
        TypeError: something that holds no texts.
        ImportError: a dataset's name without ``datasets`` installed.
    """
    if isinstance(texts, str) and os.path.exists(texts) and not os.path.isdir(texts):
        return file_texts(texts, text_column)
    if isinstance(texts, str):
        texts = _load_dataset(texts)
    if isinstance(texts, Mapping):
        raise ValueError(f"the corpus has splits {list(texts)}; pass one of them")
    if hasattr(texts, "column_names"):
        columns = texts.column_names  # None where a stream does not know them yet
        if columns is not None and text_column not in columns:
            raise ValueError(
                f"text_column={shown(text_column, 60)} is not among the columns {shown(columns)}"
            )
        return _column(texts, text_column)
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts={shown(texts)} is a {type(texts).__name__}; pass a list of texts")
    return texts


def file_texts(path: str, column: str = "text") -> Iterator[str]:
    """The lines of a text file; of JSON objects, one a line, what their ``column`` holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no text, or a line that is none of the objects.
    """
    kind = None
    for number, line in read_lines(path):
        if number == 1:
            kind = list if line.strip() == "[" else json_kind(line)
        if kind is list:
            raise fault(path, "it is a JSON list", "write its texts one a line")
        if kind is not dict:
            yield line
        elif line.strip():
            record = read_record(line, path, number)
            text = record.values.get(column)
            yield text if isinstance(text, str) else record.text(column)  # which says what is wrong


def expected_tokens(texts: Any, tokenizer: Any, text_column: str = "text") -> int | None:
    """About how many tokens a text file or a list of texts holds, by some of them; else None."""
    if isinstance(texts, str) and os.path.isfile(texts):
        some = list(islice(read_texts(texts, text_column), TEXTS_AT_ONCE))
        with open(texts, "rb") as file:
            share = sum(map(len, islice(file, TEXTS_AT_ONCE))) / max(1, os.path.getsize(texts))
    elif isinstance(texts, Sequence) and not isinstance(texts, str):
        some = list(texts[:: -(-len(texts) // TEXTS_AT_ONCE) or 1])
        share = len(some) / max(1, len(texts))
    else:
        return None
    some = [text for text in some if isinstance(text, str) and text.strip()]
    ids = tokenizer(some, verbose=False)["input_ids"] if some else []
    return round(sum(map(len, ids)) / share) if share else 0


def corpus_label(texts: Any) -> str:
    """A name for the corpus, for provenance."""
    if isinstance(texts, str):
        return os.path.basename(texts) if os.path.exists(texts) else texts
    info = getattr(texts, "info", None)
    parts = [getattr(info, "dataset_name", None), getattr(info, "config_name", None)]
    parts.append(str(texts.split) if getattr(texts, "split", None) else None)
    return ":".join(part for part in parts if part) or type(texts).__name__


def token_batches(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    window: int,
    tokens_per_batch: int,
    max_tokens: int | None = None,
    switches: Sequence[int] = (),
) -> Iterator[TokenBatch]:
    """Batches of the texts' tokens, the same ones each time the same texts are given.

    Args:
        texts: the corpus; blank texts are passed over, and what is no text is a TypeError.
        tokenizer: of the model; its settings are not touched and it needs no padding token.
        window: most tokens of one row; longer texts are cut into several rows.
        tokens_per_batch: most tokens of a batch, padding included; at least ``window``.
        max_tokens: stop after this many tokens, cutting the last row.
        switches: lengths above which rows are read with other rotary tables; rows on either side
            of one never share a batch.
    """
    buffer: list[Row] = []
    waiting = 0
    for ids, read in _windows(texts, tokenizer, window, max_tokens):
        buffer.append((ids, read))
        waiting += len(ids)
        if waiting >= BATCHES_BUFFERED * tokens_per_batch:
            yield from _packed(buffer, tokens_per_batch, switches)
            buffer, waiting = [], 0
    yield from _packed(buffer, tokens_per_batch, switches)


def _windows(texts: Iterable[str], tokenizer: Any, window: int, left: int | None) -> Iterator[Row]:
    remaining = iter(texts)
    read = 0
    while chunk := list(islice(remaining, TEXTS_AT_ONCE)):
        for number, text in enumerate(chunk, start=read):
            if not isinstance(text, str):
                raise TypeError(
                    f"texts[{number}]={shown(text)} is a {type(text).__name__}, not text"
                )
        filled = [(n, text) for n, text in enumerate(chunk, start=read + 1) if text.strip()]
        read += len(chunk)
        if not filled:
            continue
        # verbose=False: no advice about lengths, the windows see to them
        encoded = tokenizer([text for _, text in filled], verbose=False)["input_ids"]
        for (number, _), ids in zip(filled, encoded, strict=True):
            for start in range(0, len(ids), window):
                row = ids[start : start + window][:left]
                yield row, number
                if left is not None:
                    left -= len(row)
                    if left <= 0:
                        return


def _packed(
    rows: list[Row], tokens_per_batch: int, switches: Sequence[int]
) -> Iterator[TokenBatch]:
    """Longest rows first, so that a batch too large for memory fails at the start."""
    texts = max((read for _, read in rows), default=0)
    batch: list[list[int]] = []
    for ids in sorted((ids for ids, _ in rows), key=len, reverse=True):
        most = len(batch[0]) if batch else 0
        full = most * (len(batch) + 1) > tokens_per_batch
        if batch and (full or any(len(ids) <= switch < most for switch in switches)):
            yield _padded(batch, texts)
            batch = []
        batch.append(ids)
    if batch:
        yield _padded(batch, texts)


def _padded(rows: list[list[int]], texts: int) -> TokenBatch:
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (rows, tokens)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return TokenBatch(ids, mask, texts)


def _column(rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise ValueError(
                f"text_column={shown(column, 60)} is not among the columns {shown(sorted(row))}"
            )
        yield row[column]


def _load_dataset(name: str) -> Any:
    if not (os.path.isdir(name) or _NAME.fullmatch(name)):
        raise ValueError(
            f"texts={shown(name, 80)} is neither a file nor a dataset's name; to give one text, "
            "pass a list of it"
        )
    load = dataset_loader(f"texts={shown(name, 80)}")
    repo, config, split = (*name.split(":"), "", "")[:3]
    return load(repo, config or None, split=split or "train", streaming=True)


def dataset_loader(given: str) -> Callable[..., Any]:
    """``datasets.load_dataset``, whose errors, or that it is missing, are about what was ``given``.

    Raises:
        ImportError: ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{given} is no file, and to read it as a dataset needs `pip install datasets`; or "
            "pass what it holds"
        ) from error
    loader: Callable[..., Any] = answers_told(f"{given} was not downloaded")(load_dataset)
    return loader
