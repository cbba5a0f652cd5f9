"""What a server does with packs: swap them in place, mix them in a batch, compile around them."""

from __future__ import annotations

import runpy

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from tests.conftest import CORPUS, PEFT_ALONE, ROOT, tiny_model
from tests.model.test_model import EDITS, FAMILIES, logits, wrap

pytestmark = PEFT_ALONE
PLOT = ROOT / "docs" / "figures" / "plot_serving.py"
PACKS = {"two": EDITS[:2], "other two": EDITS[2:], "three": EDITS[:3]}


@pytest.fixture(scope="module", params=FAMILIES)
def packs(request, tokenizer, tmp_path_factory):
    """(family, folder with the packs, logits of each)."""
    folder, wanted = tmp_path_factory.mktemp(request.param), {}
    for name, edits in PACKS.items():
        model = wrap(tiny_model(request.param), tokenizer)
        model.edit(edits, progress=False)
        model.save_pretrained(folder / name)
        wanted[name] = logits(model, tokenizer)
    return request.param, folder, wanted


@pytest.mark.parametrize("padded_to", [None, 8])
def test_plain_peft_swaps_packs_of_any_rank_in_place(packs, tokenizer, padded_to):
    family, folder, wanted = packs
    model = PeftModel.from_pretrained(tiny_model(family), folder / "two")
    if padded_to is not None:  # as PEFT asks for where the model is compiled
        prepare_model_for_compiled_hotswap(model, target_rank=padded_to)
    for name in ("other two", "three", "two"):
        hotswap_adapter(model, str(folder / name), "default")
        assert torch.allclose(logits(model, tokenizer), wanted[name], atol=1e-5)


def mixed(packs, tokenizer):
    """(model with two packs, a batch of one prompt thrice, an adapter name for each row)."""
    family, folder, _ = packs
    model = wrap(tiny_model(family), tokenizer)
    model.load_adapter(folder / "two", "first")
    model.load_adapter(folder / "three", "second")
    batch = tokenizer([CORPUS[0]] * 3, return_tensors="pt", return_token_type_ids=False)
    return model, batch, ["__base__", "first", "second"]


def test_a_mixed_batch_gives_each_row_its_own_pack(packs, tokenizer):
    family, _, wanted = packs
    model, batch, names = mixed(packs, tokenizer)
    rows = [logits(tiny_model(family), tokenizer), wanted["two"], wanted["three"]]
    with torch.no_grad():
        found = model(**batch, adapter_names=names).logits
    for row, name, expected in zip(found, names, rows, strict=True):
        assert torch.allclose(row, expected[0], atol=1e-5), name
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_mixed_batch_generates_what_each_row_would_alone(packs, tokenizer):
    model, batch, names = mixed(packs, tokenizer)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    together = model.generate(**batch, adapter_names=names, **how)
    for row, name in zip(together, names, strict=True):
        one = {key: value[:1] for key, value in batch.items()}
        alone = model.generate(**one, adapter_names=[name], **how)[0]
        assert torch.equal(row[: len(alone)], alone), name


def test_a_mixed_batch_needs_the_model_unmerged(packs, tokenizer):
    model, batch, names = mixed(packs, tokenizer)
    model.set_adapter("first")
    model.merge()
    with pytest.raises(ValueError, match=r"merged adapters.*unmerge_adapter"):
        model(**batch, adapter_names=names)
    model.unmerge_adapter()
    model(**batch, adapter_names=names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
def test_a_compiled_model_follows_edits_and_switches(tokenizer):
    base = tiny_model("llama")
    del base.model.layers[2:]  # tracing takes seconds a block
    base.config.num_hidden_layers = 2
    model = wrap(base, tokenizer)
    plain = logits(model, tokenizer)
    model.edit(EDITS[:2], progress=False)
    compiled = torch.compile(model, backend="aot_eager")
    first = logits(compiled, tokenizer)
    assert torch.allclose(first, logits(model, tokenizer), atol=1e-5)
    model.edit(EDITS[2:], progress=False)
    second = logits(compiled, tokenizer)
    assert torch.allclose(second, logits(model, tokenizer), atol=1e-5)
    assert (second - first).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.allclose(logits(compiled, tokenizer), plain, atol=1e-5)
    assert torch.allclose(logits(compiled, tokenizer), second, atol=1e-5)


def test_the_picture_of_rounding_is_drawn_in_sixty_lines(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert len(PLOT.read_text().splitlines()) <= 60
    weight, update = torch.randn(2, 8, 6, dtype=torch.float64)
    runpy.run_path(str(PLOT))["draw"](weight, update, 2, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
