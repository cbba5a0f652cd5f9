from __future__ import annotations

import json
import sys

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from alphaedit_peft.nullspace.corpus import corpus_label, expected_tokens, read_texts, token_batches


def rows_of(batches) -> list[list[int]]:
    return [row[keep].tolist() for b in batches for row, keep in zip(b.ids, b.mask, strict=True)]


def test_batches_hold_every_token_once_within_the_budget(tokenizer, texts):
    batches = list(token_batches(texts, tokenizer, window=32, tokens_per_batch=64))
    assert max(batch.ids.numel() for batch in batches) <= 64
    assert sorted(rows_of(batches)) == sorted(tokenizer(texts)["input_ids"])
    assert sum(batch.tokens for batch in batches) == sum(len(t.split()) + 1 for t in texts)
    assert batches[-1].texts == len(texts)


def test_about_how_many_tokens_a_corpus_holds(tokenizer, texts, tmp_path):
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    assert expected_tokens(texts, tokenizer) == pytest.approx(tokens, rel=0.1)
    assert expected_tokens(texts[:20], tokenizer) == sum(map(len, tokenizer(texts[:20]).input_ids))
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n")
    lines = [json.dumps({"id": "x" * 40, "text": text}) for text in texts]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("lines.txt", "lines.jsonl"):
        found = expected_tokens(str(tmp_path / name), tokenizer)
        assert found == pytest.approx(tokens, rel=0.2)
    assert expected_tokens(iter(texts), tokenizer) is None
    assert expected_tokens([], tokenizer) == expected_tokens([" "], tokenizer) == 0


def test_sorting_limits_padding(tokenizer, texts):
    batches = list(token_batches(texts, tokenizer, window=32, tokens_per_batch=64))
    padding = sum(batch.ids.numel() - batch.tokens for batch in batches)
    assert padding < 0.1 * sum(batch.tokens for batch in batches)


def test_long_texts_are_cut_into_windows(tokenizer):
    text = " ".join(f"w{i}" for i in range(20))
    rows = rows_of(token_batches([text], tokenizer, window=8, tokens_per_batch=8))
    assert [len(row) for row in rows] == [8, 8, 5]
    assert [i for row in rows for i in row] == tokenizer(text)["input_ids"]


def test_it_stops_after_max_tokens(tokenizer, texts):
    few = list(token_batches(texts, tokenizer, window=32, tokens_per_batch=64, max_tokens=101))
    assert sum(batch.tokens for batch in few) == 101
    assert few[-1].texts < len(texts)


def test_blank_texts_are_passed_over_and_the_tokenizer_stays_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token
    blank = ["", "\n"] * 64
    batches = list(token_batches([*blank, "w1", " "], tokenizer, window=8, tokens_per_batch=8))
    assert rows_of(batches) == [[1, 3]]
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token) == (
        before
    )


def test_padding_is_at_the_right(tokenizer):
    (batch,) = token_batches(["w1 w2", "w3"], tokenizer, window=8, tokens_per_batch=8)
    assert batch.ids.tolist() == [[1, 3, 4], [1, 5, 0]]
    assert torch.equal(batch.mask, torch.tensor([[True, True, True], [True, True, False]]))


def test_an_entry_that_is_no_text(tokenizer):
    with pytest.raises(TypeError, match=r"texts\[1\]=5 is a int"):
        list(token_batches(["w1", 5], tokenizer, window=8, tokens_per_batch=8))


def test_dataset_objects():
    data = Dataset.from_dict({"text": ["a", "b"], "body": ["c", "d"]})
    assert list(read_texts(data)) == ["a", "b"]
    assert list(read_texts(data, "body")) == ["c", "d"]
    assert list(read_texts(data.to_iterable_dataset())) == ["a", "b"]
    with pytest.raises(ValueError, match=r"text_column='story' is not among .*'body'"):
        read_texts(data, "story")
    with pytest.raises(ValueError, match=r"splits \['train'\]; pass one"):
        read_texts(DatasetDict(train=data))


def test_a_stream_that_does_not_know_its_columns():
    stream = IterableDataset.from_generator(lambda: iter([{"body": "a"}]))
    assert stream.column_names is None
    with pytest.raises(ValueError, match=r"text_column='text' is not among the columns \['body'\]"):
        list(read_texts(stream))


def test_names_of_files_and_datasets(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("one\ntwo\n")
    assert [text.strip() for text in read_texts(str(file))] == ["one", "two"]
    assert corpus_label(str(file)) == "corpus.txt"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    assert list(read_texts(str(folder))) == ["three"]


def test_files_of_objects_and_of_what_is_no_text(tmp_path):
    file = tmp_path / "corpus"
    file.write_text('{"text": "one\\ntwo", "n": 1}\n\n{"text": ""}\n')
    assert list(read_texts(str(file))) == ["one\ntwo", ""]
    with pytest.raises(ValueError, match=r"corpus, line 1, field body is missing; the record has"):
        list(read_texts(str(file), "body"))
    with pytest.raises(ValueError, match="corpus, line 1, field n=1 is a int, not text"):
        list(read_texts(str(file), "n"))
    file.write_text('{"text": "one"}\ntwo\n')
    with pytest.raises(ValueError, match="corpus, line 2: 'two' is no JSON"):
        list(read_texts(str(file)))
    file.write_text('{} is\n{"text": "one"}\n')
    assert list(read_texts(str(file))) == ["{} is\n", '{"text": "one"}\n']
    for text in ('["one", "two"]', '[\n"one"]'):
        file.write_text(text)
        with pytest.raises(ValueError, match="corpus: it is a JSON list; write its texts"):
            list(read_texts(str(file)))
    file.write_text("one\r\ntwo", encoding="utf-16")
    assert [text.strip() for text in read_texts(str(file))] == ["one", "two"]
    file.write_bytes(b"one\n\xe9")
    with pytest.raises(ValueError, match="corpus, line 2: byte 0xe9"):
        list(read_texts(str(file)))


def test_labels():
    assert corpus_label(["a"]) == "list"
    assert corpus_label("user/data:en") == "user/data:en"
    data = Dataset.from_dict({"text": ["a"]})
    data.info.dataset_name, data.info.config_name = "wiki", "en"
    assert corpus_label(data) == "wiki:en"


def test_one_text_is_no_corpus():
    with pytest.raises(ValueError, match=r"texts='Paris is in France\.' is neither"):
        read_texts("Paris is in France.")
    with pytest.raises(TypeError, match="texts=5 is a int"):
        read_texts(5)


def test_a_dataset_name_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"texts='user/data' is no file.*pip install datasets"):
        read_texts("user/data")


def test_rows_on_either_side_of_a_switch_share_no_batch(tokenizer):
    texts = [" ".join(["w1"] * n) for n in (3, 9, 4, 8, 12, 5)]
    how = {"window": 32, "tokens_per_batch": 64, "switches": (5, 9)}
    found = token_batches(texts, tokenizer, **how)
    assert [sorted(batch.mask.sum(1).tolist()) for batch in found] == [[10, 13], [6, 9], [4, 5]]
