"""What is sent to the Hub: one commit of a folder that loads again."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from alphaedit_peft import AlphaEditConfig, EditPack, NullSpace, get_alphaedit_model
from tests.conftest import tiny_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the network calls alone; keeps what would be uploaded."""
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["create"] = (repo_id, options)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path, **options):
        calls["upload"] = options
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return SimpleNamespace(pr_url=None, commit_url="https://hub/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def test_model_is_pushed_as_a_whole_pack(hub, tokenizer, tmp_path):
    config = AlphaEditConfig(rewrite_layers=[0], steps=2, contexts=[])
    space = NullSpace.identity({0: 96})
    model = get_alphaedit_model(tiny_model("llama"), config, tokenizer=tokenizer, null_space=space)
    model.edit([{"subject": "France", "prompt": "{} is", "target_new": "Rome"}], progress=False)
    url = model.push_to_hub("me/pack", private=True, revision="next")
    assert url == "https://hub/commit/1"
    assert hub["create"] == ("me/pack", {"private": True, "exist_ok": True})
    assert hub["upload"]["revision"] == "next"
    pack = EditPack.from_pretrained(tmp_path / "uploaded")
    assert pack.digest() == model.to_pack().digest()
