"""Real edits in a chain of three packs: alive, joined from the files, and by its card's code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    EditPack,
    NullSpace,
    embedded,
    get_alphaedit_model,
)
from alphaedit_peft.evaluation import Case, embedded_suite, evaluate
from alphaedit_peft.pack.card import PARENT
from tests.conftest import PEFT_ALONE
from tests.hub_server import HubServer, client_of

pytestmark = [
    pytest.mark.slow,
    # the client's own use of httpx, when it uploads without Xet
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
NAMES, EACH = ("default", "b", "c"), 3


def logits(model, edits: tuple[Edit, ...]) -> torch.Tensor:
    """Of the next token after each edit's prompt, (edits, vocabulary)."""
    tokenizer = embedded.load()[1]
    with torch.no_grad():
        ids = [tokenizer(edit.question, return_tensors="pt").input_ids for edit in edits]
        return torch.stack([model(input_ids=one).logits[0, -1] for one in ids])


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(folders of three packs, each on top of those before it; all their edits; live logits)."""
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")
    base, tokenizer = embedded.load()
    config = AlphaEditConfig(num_contexts=2, threshold=0.02, threshold_mode="energy")
    space = NullSpace.from_texts(base, tokenizer, embedded.texts(800), config, progress=False)
    model = get_alphaedit_model(base, config, tokenizer=tokenizer, null_space=space)
    edits, place = embedded_suite(EACH * len(NAMES)).edits, tmp_path_factory.mktemp("chain")
    for i, name in enumerate(NAMES):
        if i:
            model.add_adapter(name)
            model.set_adapter(NAMES[: i + 1])
        model.edit(edits[i * EACH : (i + 1) * EACH], into=name, progress=False)
        model.save_pretrained(place / name, selected_adapters=[name])
    scores = evaluate(model, tokenizer, [Case(edit) for edit in edits])
    assert scores["efficacy_recall"] == 1
    return [place / name for name in NAMES], edits, logits(model, edits)


def test_joined_from_the_files_it_computes_what_the_live_chain_does(chain, tmp_path):
    folders, edits, live = chain
    joined = EditPack.join(folders)
    assert joined.edits == list(edits)
    assert [parent["operation"] for parent in joined.parents] == ["join"] * len(folders)
    joined.save_pretrained(tmp_path / "joined")
    model = AlphaEditModel.from_pretrained(embedded.load()[0], tmp_path / "joined")
    assert (logits(model, edits) - live).abs().max() < 1e-3 * live.std()


def test_without_a_link_of_the_chain_it_does_not(chain, tmp_path):
    folders, edits, live = chain
    with pytest.warns(UserWarning, match="give that pack too, first"):
        EditPack.join([folders[0], folders[2]]).save_pretrained(tmp_path / "joined")
    with pytest.raises(ValueError, match=r"stands on pack 'b' \(3 edits"):
        AlphaEditModel.from_pretrained(embedded.load()[0], tmp_path / "joined")
    with pytest.warns(UserWarning, match="stands on pack"):
        model = AlphaEditModel.from_pretrained(
            embedded.load()[0], tmp_path / "joined", missing_parents="warn"
        )
    assert (logits(model, edits) - live).abs().max() > live.std()


@PEFT_ALONE
def test_the_code_of_the_card_on_the_hub_runs_and_computes_what_the_live_chain_does(
    chain, tmp_path, monkeypatch
):
    folders, edits, live = chain
    monkeypatch.chdir(tmp_path)
    server = HubServer({"mine": "me"})
    with server, client_of(server, tmp_path / "home", "mine"):
        for name, folder in zip("abc", folders, strict=True):
            EditPack.from_pretrained(folder).push_to_hub(f"me/{name}")
        card = Path(hf_hub_download("me/c", "README.md")).read_text(encoding="utf-8")
        card = card.replace(f"{PARENT}1", "me/a").replace(f"{PARENT}2", "me/b")
        load, with_peft, own, merge = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        for code in (with_peft, own):
            known: dict = {}
            exec(load + code, known)
            assert (logits(known["model"], edits) - live).abs().max() < 1e-3 * live.std()
            exec(merge, known)
            assert (tmp_path / "edited-model" / "model.safetensors").is_file()
