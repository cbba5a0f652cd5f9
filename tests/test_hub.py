"""Packs and null spaces on a Hub, over HTTP, with the real client: up, down, what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from alphaedit_peft import (
    AlphaEditConfig,
    AlphaEditModel,
    Edit,
    EditPack,
    NullSpace,
    embedded,
    get_alphaedit_model,
)
from alphaedit_peft.algebra import LowRankDelta
from alphaedit_peft.cli.arguments import load_model
from alphaedit_peft.evaluation import read_cases
from alphaedit_peft.fingerprint import BaseFingerprint, fingerprint
from alphaedit_peft.hub import Destination, repository_name
from alphaedit_peft.nullspace.corpus import read_texts
from alphaedit_peft.pack import EditRecord
from tests.conftest import PEFT_ALONE, ROOT, tiny_model
from tests.hub_server import HubServer, client_of
from tests.pack.conftest import make_pack

pytestmark = [  # the client's own use of httpx, when it uploads without Xet
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    PEFT_ALONE,
]
IDS = torch.tensor([[5, 17, 40, 9]])
SETTINGS = {"rewrite_layers": [0], "steps": 2, "contexts": []}
EDIT = {"subject": "France", "prompt": "The capital of {} is", "target_new": "Rome"}


def space_for(model) -> NullSpace:
    architecture = AlphaEditConfig(**SETTINGS).resolve(model)[1]
    return NullSpace.identity({0: 96}, fingerprint(model, 0, architecture))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base, saved."""
    place = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def made():
    """(a pack for the tiny base, which calls itself me/base; logits with it, by arithmetic)."""
    base = tiny_model("llama")
    random = torch.Generator().manual_seed(1)
    delta = LowRankDelta(torch.randn(1, 96, generator=random), torch.randn(32, 1, generator=random))
    settings, architecture = AlphaEditConfig(**SETTINGS).resolve(base)
    module = architecture.rewrite_name(0)
    pack = EditPack(
        factors={module: delta},
        config=dataclasses.replace(settings, base_model_name_or_path="me/base"),
        records=(EditRecord(Edit(**EDIT), 0, "own", 0, "", 0.1, 0.9),),
        targets=torch.randn(1, 32, generator=random),
        base=fingerprint(base, 0, architecture),
    )
    base.get_submodule(module).weight.data += delta.B @ delta.A
    return pack, logits(base)


@pytest.fixture
def hub(tmp_path):
    """A Hub where 'me' is logged in; ``hub.patch`` is the client's monkeypatch."""
    server = HubServer({"mine": "me", "theirs": "you"})
    with server, client_of(server, tmp_path / "home", "mine") as patch:
        server.patch = patch
        yield server


@pytest.fixture
def pack(made) -> EditPack:
    return made[0]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# -- up and down


def test_a_pack_keeps_the_dtype_it_was_compressed_to(hub, pack):
    pack.push_to_hub("me/full")
    pack.compress(dtype=torch.bfloat16).push_to_hub("me/small")
    pack.push_to_hub("me/half", dtype=torch.float16)
    for repo, dtype in (("full", "F32"), ("small", "BF16"), ("half", "F16")):
        stored = hub.repos[f"me/{repo}"].files()["adapter_model.safetensors"]
        header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
        assert {value["dtype"] for value in header.values() if "dtype" in value} == {dtype}


def test_a_model_is_pushed_and_pulled_with_the_same_bits(hub, folder, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(folder)
    space = NullSpace.identity({0: 96})
    model = get_alphaedit_model(
        base, AlphaEditConfig(**SETTINGS), tokenizer=tokenizer, null_space=space
    )
    model.edit([EDIT], progress=False)
    url = model.push_to_hub("me/pack", commit_message="the first")
    repo = hub.repos["me/pack"]
    assert url == f"{hub.url}/me/pack/commit/{repo.resolve('main')}"
    assert repo.messages[repo.resolve("main")] == "the first"
    assert len(repo.commits) == 2  # the Hub's first one, and one for the whole pack
    assert EditPack.from_pretrained("me/pack").digest() == model.to_pack().digest()
    again = AlphaEditModel.from_pretrained(tiny_model("llama"), "me/pack")
    assert torch.equal(logits(again), logits(model))
    assert again.edits == model.edits


def test_plain_peft_loads_it_by_name(hub, pack, made):
    pack.push_to_hub("me/pack")
    model = PeftModel.from_pretrained(tiny_model("llama"), "me/pack")
    assert torch.allclose(logits(model), made[1], atol=1e-4)


def test_auto_peft_loads_pack_and_base_by_name(hub, pack, made, folder):
    hub.put("me/base", folder)
    pack.push_to_hub("me/pack")
    model = AutoPeftModelForCausalLM.from_pretrained("me/pack")
    assert torch.allclose(logits(model), made[1], atol=1e-4)


def test_transformers_load_adapter_by_name(hub, pack, made):
    pack.push_to_hub("me/pack")
    base = tiny_model("llama")
    base.load_adapter("me/pack")
    assert torch.allclose(logits(base), made[1], atol=1e-4)


def test_a_subfolder_is_pushed_and_loaded_by_all(hub, pack, made):
    pack.push_to_hub("me/packs", subfolder="first")
    other = make_pack()
    other.push_to_hub("me/packs", subfolder="second/one")
    assert all(name.startswith(("first/", "second/one/")) for name in hub.repos["me/packs"].files())
    assert EditPack.from_pretrained("me/packs", subfolder="first").digest() == pack.digest()
    found = EditPack.from_pretrained("me/packs", subfolder="second/one")
    assert found.digest() == other.digest()
    plain = PeftModel.from_pretrained(tiny_model("llama"), "me/packs", subfolder="first")
    assert torch.allclose(logits(plain), made[1], atol=1e-4)
    base = tiny_model("llama")
    base.load_adapter("me/packs", adapter_kwargs={"subfolder": "first"})
    assert torch.allclose(logits(base), made[1], atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"me/packs on the Hub has no folder 'third' at"):
        EditPack.from_pretrained("me/packs", subfolder="third")


# -- branches, tags, pull requests


def test_a_branch_is_made_and_a_tag_read(hub, pack):
    other = make_pack()
    other.push_to_hub("me/pack")
    pack.push_to_hub("me/pack", revision="next")
    HfApi().create_tag("me/pack", tag="v1", revision="next")
    other.push_to_hub("me/pack", revision="next")
    assert EditPack.from_pretrained("me/pack").digest() == other.digest()
    assert EditPack.from_pretrained("me/pack", revision="v1").digest() == pack.digest()
    assert EditPack.from_pretrained("me/pack", revision="next").digest() == other.digest()
    sha = hub.repos["me/pack"].resolve("v1")
    assert EditPack.from_pretrained("me/pack", revision=sha).digest() == pack.digest()


def test_a_pull_request_of_someone_else(hub, pack):
    other = make_pack()
    other.push_to_hub("me/pack")
    url = pack.push_to_hub("me/pack", create_pr=True, token="theirs")
    assert url == f"{hub.url}/me/pack/discussions/1"
    assert EditPack.from_pretrained("me/pack").digest() == other.digest()
    assert EditPack.from_pretrained("me/pack", revision="refs/pr/1").digest() == pack.digest()
    pack.push_to_hub("me/pack", revision="refs/pr/1", commit_message="again")


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"revision": "0" * 40}, ValueError, "is a commit, which cannot change; give a branch"),
        ({"revision": "v1"}, ValueError, "revision='v1' is a tag of me/pack; give a branch"),
        ({"revision": "refs/pr/7"}, FileNotFoundError, "me/pack has no revision 'refs/pr/7'"),
        ({"create_pr": True, "revision": "no"}, FileNotFoundError, "has no revision 'no'"),
        ({"subfolder": "../up"}, ValueError, r"subfolder='../up' is no folder within"),
        ({"subfolder": ""}, ValueError, r"subfolder='' is no folder within"),
        ({"private": True}, ValueError, "private=True, but me/pack exists and is public"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_pushed_to(hub, pack, where, error, message):
    make_pack().push_to_hub("me/pack")
    HfApi().create_tag("me/pack", tag="v1")
    before = dict(hub.repos["me/pack"].refs)
    with pytest.raises(error, match=message):
        pack.push_to_hub("me/pack", **where)
    assert hub.repos["me/pack"].refs == before


def test_a_card_that_the_hub_refuses_is_no_broken_connection(hub, pack, monkeypatch):
    monkeypatch.setattr("alphaedit_peft.pack.files.card", lambda *_, **__: "---\n[\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        pack.push_to_hub("me/pack")
    assert hub.repos["me/pack"].files() == {}


# -- again and again


def test_an_unchanged_push_makes_no_commit(hub, pack):
    first = pack.push_to_hub("me/pack")
    assert pack.push_to_hub("me/pack").startswith(first.rpartition("/")[0])
    assert len(hub.repos["me/pack"].commits) == 2


def test_a_push_over_another_leaves_nothing_of_it_but_foreign_files(hub, pack):
    make_pack().push_to_hub("me/pack")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/pack")
    bare = dataclasses.replace(pack, targets=None)
    bare.push_to_hub("me/pack")
    files = hub.repos["me/pack"].files()
    assert files["notes.txt"] == b"mine"
    assert "alphaedit/targets.safetensors" not in files
    assert EditPack.from_pretrained("me/pack").digest() == bare.digest()


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [("PUT /lfs", True), ("preupload", True), ("POST .*/commit/", True), ("/batch", True)],
)
@pytest.mark.parametrize("status", [None, 503])
def test_a_push_that_breaks_off_leaves_the_old_revision(hub, pack, pattern, kept, status):
    old = make_pack()
    old.push_to_hub("me/pack")
    before = hub.repos["me/pack"].resolve("main")
    hub.fail(pattern, status, times=99)
    with pytest.raises(ConnectionError, match=r"me/pack was (pushed|not pushed)"):
        pack.push_to_hub("me/pack")
    assert hub.repos["me/pack"].resolve("main") == before
    assert EditPack.from_pretrained("me/pack").digest() == old.digest()
    hub.failures.clear()
    pack.push_to_hub("me/pack")
    assert EditPack.from_pretrained("me/pack").digest() == pack.digest()


def test_a_push_whose_answer_is_lost_is_whole_and_can_be_repeated(hub, pack):
    hub.fail("POST .*/commit/", after=True)
    with pytest.raises(ConnectionError, match="holds its old revision or the new one, whole"):
        pack.push_to_hub("me/pack")
    pack.push_to_hub("me/pack")
    assert len(hub.repos["me/pack"].commits) == 2
    assert EditPack.from_pretrained("me/pack").digest() == pack.digest()


def test_another_push_in_between_is_a_conflict(hub, pack):
    def someone(repo):
        hub.before_commit = None
        repo.refs["refs/heads/main"] = repo.add({}, "someone else", repo.resolve("main"))

    hub.before_commit = someone
    with pytest.raises(RuntimeError, match="me/pack changed while this was pushed"):
        pack.push_to_hub("me/pack")
    assert hub.repos["me/pack"].files() == {}


# -- who may


def test_a_private_pack_needs_a_token(hub, pack):
    pack.push_to_hub("me/pack", private=True)
    pack.push_to_hub("me/pack", private=True)
    assert hub.repos["me/pack"].private
    for token in (False, "theirs"):
        with pytest.raises(FileNotFoundError, match=r"me/pack: .* log in .* token= if it is priv"):
            EditPack.from_pretrained("me/pack", token=token)
    assert EditPack.from_pretrained("me/pack").digest() == pack.digest()
    assert EditPack.from_pretrained("me/pack", token="mine").digest() == pack.digest()


def test_a_gated_pack_says_so(hub, pack):
    pack.push_to_hub("me/pack")
    hub.repos["me/pack"].gated = True
    with pytest.raises(PermissionError, match="it is gated; ask for access on its page"):
        EditPack.from_pretrained("me/pack", token="theirs")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (False, r"was not pushed: nobody is logged in \(status 401\); log in with 'hf auth login'"),
        ("theirs", r": the Hub lets this token not write there \(status 403\)"),
        ("wrong", r"was not pushed: the Hub does not know this token \(status 401\)"),
    ],
)
def test_pushing_without_the_right_is_refused(hub, pack, token, message):
    hub.patch.delenv("HF_TOKEN")
    pack.push_to_hub("me/pack", token="mine")
    for repo in ("me/pack", "me/new"):
        with pytest.raises(PermissionError, match=f"{repo}:? ?{message}"):
            make_pack().push_to_hub(repo, token=token)
    assert "me/new" not in hub.repos
    assert EditPack.from_pretrained("me/pack", token="mine").digest() == pack.digest()


@pytest.mark.parametrize("kept", ["public", "private", "gated"])
def test_a_token_that_is_not_valid_is_said_to_be(hub, pack, folder, kept):
    pack.push_to_hub("me/pack", private=kept == "private")
    hub.put("me/base", folder)
    for repo in hub.repos.values():
        repo.private, repo.gated = kept == "private", kept == "gated"
    invalid = r"the Hub does not know this token \(status 401\), which is mistyped, expired or"
    with pytest.raises(PermissionError, match=f"me/pack was not downloaded: {invalid}"):
        EditPack.from_pretrained("me/pack", token="wrong")
    hub.patch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(PermissionError, match=f"model 'me/base' was not downloaded: {invalid}"):
        load_model("me/base", "auto", "cpu")


def test_a_token_that_is_not_valid_is_said_to_be_for_datasets_too(hub):
    datasets = pytest.importorskip("datasets")
    hub.patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    hub.patch.setenv("HF_TOKEN", "wrong")
    said = "='me/data' was not downloaded: the Hub does not know this token"
    with pytest.raises(PermissionError, match=said):
        read_cases("me/data", split="train")
    with pytest.raises(PermissionError, match=said):
        next(iter(read_texts("me/data")))
    hub.patch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="me/data"):
        read_cases("me/data", split="train")


def test_a_token_that_cannot_be_one(hub, pack):
    pack.push_to_hub("me/pack", token="mine")
    said = "the token holds '\u201c', as none does; log in anew"
    with pytest.raises(PermissionError, match=f"me/pack was not downloaded: {said}"):
        EditPack.from_pretrained("me/pack", token="\u201cmine\u201d")
    with pytest.raises(PermissionError, match=f"me/pack was not pushed: {said}"):
        make_pack().push_to_hub("me/pack", token="\u201cmine\u201d")


ANSWERS = [
    (403, PermissionError, "this token has no right to it .* give it the right in the Hub's"),
    (429, ConnectionError, "asked too often from here .* try again in 17 seconds, or log in"),
    (500, ConnectionError, r"the Hub itself fails \(status 500\); try again later"),
    (503, ConnectionError, r"the Hub itself fails \(status 503\); try again later"),
    (418, ConnectionError, r"the Hub refuses it with status 418 \(Client error .* look at the rep"),
]


@pytest.mark.parametrize(("status", "error", "message"), ANSWERS)
def test_each_answer_of_the_hub_has_its_sentence(hub, pack, status, error, message):
    pack.push_to_hub("me/pack")
    hub.fail("", status, times=99, headers={"Retry-After": "17"})
    with pytest.raises(error, match=f"me/pack was not downloaded: .*{message}"):
        EditPack.from_pretrained("me/pack")
    if status != 403:  # which has a remedy of its own where one writes
        with pytest.raises(error, match=f"me/pack was not pushed: .*{message}"):
            pack.push_to_hub("me/pack")


def test_a_repository_that_the_hub_has_disabled(hub):
    disabled = {"X-Error-Message": "Access to this resource is disabled."}
    hub.fail("", 403, times=99, headers=disabled)
    with pytest.raises(ConnectionError, match="refuses it with status 403"):
        EditPack.from_pretrained("me/pack")


def test_too_many_requests_without_a_time_to_wait(hub):
    hub.fail("", 429, times=99)
    with pytest.raises(ConnectionError, match="try again in some minutes, or log in"):
        EditPack.from_pretrained("me/pack")


# -- what is not there


def test_missing_repositories_and_revisions(hub, pack):
    pack.push_to_hub("me/pack")
    with pytest.raises(FileNotFoundError, match="me/nothing: no such folder here, and no Hub"):
        EditPack.from_pretrained("me/nothing")
    with pytest.raises(FileNotFoundError, match="me/pack on the Hub has no revision 'v9'"):
        EditPack.from_pretrained("me/pack", revision="v9")
    with pytest.raises(FileNotFoundError, match="no/such/repo is no folder here, and no Hub"):
        EditPack.from_pretrained("no/such/repo")
    hub.others = {"datasets/me/texts", "spaces/me/app"}
    for name, kind in (("me/texts", "dataset"), ("me/app", "space")):
        with pytest.raises(FileNotFoundError, match=f"{name} on the Hub is a {kind}, and packs"):
            EditPack.from_pretrained(name)
    with pytest.raises(ValueError, match="repo_id='no/such/repo' is no repository's name"):
        pack.push_to_hub("no/such/repo")


def test_a_repository_without_a_pack(hub, folder):
    hub.put("me/base", folder)
    with pytest.raises(
        FileNotFoundError, match=r"me/base on the Hub has none of adapter_config.json"
    ):
        EditPack.from_pretrained("me/base")


@pytest.mark.parametrize("how", ["stopped", "offline"])
def test_the_cache_serves_when_the_hub_cannot(hub, pack, made, how):
    pack.push_to_hub("me/pack")
    EditPack.from_pretrained("me/pack")
    if how == "stopped":
        hub.stop()
        hub.stop = lambda: None
    else:
        hub.patch.setattr(constants, "HF_HUB_OFFLINE", True)
        plain = PeftModel.from_pretrained(tiny_model("llama"), "me/pack")
        assert torch.allclose(logits(plain), made[1], atol=1e-4)
    assert EditPack.from_pretrained("me/pack").digest() == pack.digest()
    with pytest.raises(FileNotFoundError, match="you/pack: no such folder here, nothing of it in"):
        EditPack.from_pretrained("you/pack")
    with pytest.raises(ConnectionError, match="was pushed"):
        pack.push_to_hub("me/pack")


def test_a_download_takes_the_packs_files_only(hub, pack):
    pack.push_to_hub("me/pack")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="big.bin", repo_id="me/pack")
    EditPack.from_pretrained("me/pack")
    assert not hub.asked("resolve/.*/big.bin")


# -- the card


def test_the_card_on_the_hub_is_valid_and_names_the_repository(hub, pack):
    pack.push_to_hub("me/pack")
    card = ModelCard.load("me/pack")
    assert card.data.base_model == "me/base"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.library_name == "peft"
    assert {"alphaedit", "knowledge-editing", "lora"} <= set(card.data.tags)
    assert 'PeftModel.from_pretrained(base, "me/pack")' in card.text
    assert "| France |" in card.text


def test_texts_stay_out_of_the_card_on_request(hub, pack):
    pack.push_to_hub("me/pack", texts=False)
    text = ModelCard.load("me/pack").text
    assert "France" not in text
    assert "Rome" not in text
    assert "The texts of the edits are left out of this card" in text
    assert EditPack.from_pretrained("me/pack").edits == pack.edits


# -- null spaces


def test_a_null_space_is_pushed_and_pulled(hub):
    space = space_for(tiny_model("llama"))
    url = space.push_to_hub("me/space", private=True, revision="next")
    assert url.startswith(f"{hub.url}/me/space/commit/")
    assert NullSpace.from_pretrained("me/space", revision="next").digest() == space.digest()
    card = ModelCard(hub.repos["me/space"].files("next")["README.md"].decode())
    assert "null-space" in card.data.tags
    assert str(space.fingerprint.digest) in card.text
    with pytest.raises(
        FileNotFoundError, match=r"me/space on the Hub has none of null_space.json, "
    ):
        NullSpace.from_pretrained("me/space")


def test_bases_find_their_own_null_space(hub, tokenizer):
    models = [tiny_model("llama", seed=seed) for seed in (0, 1, 2)]
    spaces = [space_for(tiny_model("llama", seed=seed)) for seed in (0, 1)]
    for space in spaces:
        space.push_to_hub("me/spaces", by_fingerprint=True)
    assert set(hub.repos["me/spaces"].files()) == {
        f"{space.fingerprint.digest}/{name}"
        for space in spaces
        for name in ("null_space.json", "null_space.safetensors", "README.md")
    }
    for model, space in zip(models, spaces, strict=False):
        config = AlphaEditConfig(**SETTINGS, null_space="me/spaces")
        edited = get_alphaedit_model(model, config, tokenizer=tokenizer)
        edited.edit([EDIT], progress=False)
        assert edited.resources.null_space.fingerprint == space.fingerprint
    assert not [line for line in hub.asked("GET .*safetensors") if "cdn" in line][2:]
    edited = get_alphaedit_model(models[2], config, tokenizer=tokenizer)
    with pytest.raises(
        FileNotFoundError, match=r"null spaces of other bases, .* and none that fit"
    ):
        edited.edit([EDIT], progress=False)
    with pytest.raises(FileNotFoundError, match=r"none at its root; give subfolder="):
        NullSpace.from_pretrained("me/spaces")


def test_a_shared_folder_works_as_a_shared_repository(tmp_path):
    digests = ("a" * 16, "b" * 24, "a" * 8 + "c" * 8)
    shape = {"model_type": "llama"}
    bases = [BaseFingerprint(shape, digest, len(digest) // 8 - 2) for digest in digests]
    for base in bases:
        NullSpace.identity({0: 4}, base).save_pretrained(tmp_path / base.digest)
    for base in bases:
        assert NullSpace.from_pretrained(tmp_path, fingerprint=base).fingerprint == base
    deeper = BaseFingerprint(shape, "a" * 16 + "d" * 8, 1)
    assert NullSpace.from_pretrained(tmp_path, fingerprint=deeper).fingerprint == bases[0]
    with pytest.raises(ValueError, match="several null spaces that fit this model"):
        NullSpace.from_pretrained(tmp_path, fingerprint=BaseFingerprint(shape, None, 0))
    stranger = BaseFingerprint(shape, "e" * 16, 0)
    with pytest.raises(FileNotFoundError, match="none that fits this model"):
        NullSpace.from_pretrained(tmp_path, fingerprint=stranger)
    NullSpace.identity({0: 4}).save_pretrained(tmp_path)
    assert NullSpace.from_pretrained(tmp_path, fingerprint=stranger).fingerprint is None


def test_by_fingerprint_needs_one_and_nothing_else(hub):
    with pytest.raises(ValueError, match="is for any base"):
        NullSpace.identity({0: 4}).push_to_hub("me/spaces", by_fingerprint=True)
    made_for = BaseFingerprint({}, None, 0)
    with pytest.raises(ValueError, match="quantised or offloaded base"):
        NullSpace.identity({0: 4}, made_for).push_to_hub("me/spaces", by_fingerprint=True)
    with pytest.raises(ValueError, match="leave out subfolder='x'"):
        NullSpace.identity({0: 4}).push_to_hub("me/spaces", by_fingerprint=True, subfolder="x")
    assert hub.repos == {}


# -- killed


PUSHES = """
import os, sys
from tests.pack.conftest import make_pack
pack = make_pack(seed=1)
for _ in sys.stdin:  # a process of its own for each line, without importing all again
    child = os.fork()
    if child == 0:
        pack.push_to_hub("me/pack")
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_push_killed_at_any_request_leaves_a_whole_revision(hub):
    """kill -9 once a request has come in, whichever it is; then the same push goes through."""
    make_pack(seed=0).push_to_hub("me/pack")
    whole = {make_pack(seed=seed).digest() for seed in (0, 1)}
    pushing = subprocess.Popen(
        [sys.executable, "-c", PUSHES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for pattern in ("repos/create", "preupload", "PUT /lfs", "/verify", "POST .*/commit/"):
        hub.requests.clear()
        hub.large.clear()  # so that they are uploaded again
        pushing.stdin.write("push\n")
        pushing.stdin.flush()
        child = int(pushing.stdout.readline())
        deadline = time.monotonic() + 60
        while not hub.asked(pattern):
            assert time.monotonic() < deadline, pattern
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert EditPack.from_pretrained("me/pack").digest() in whole
    pushing.communicate()
    make_pack(seed=1).push_to_hub("me/pack")
    assert EditPack.from_pretrained("me/pack").digest() == make_pack(seed=1).digest()


def test_the_embedded_base_is_named_so_that_a_reader_can_follow(hub, pack):
    config = dataclasses.replace(pack.config, base_model_name_or_path=embedded.NAME)
    dataclasses.replace(pack, config=config).push_to_hub("me/pack")
    files = hub.repos["me/pack"].files()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == embedded.NAME
    text = files["README.md"].decode()
    assert "`AutoPeftModelForCausalLM` cannot find it by its name" in text
    assert ModelCard(text).data.base_model is None


def test_a_destination_is_checked_before_anything_is_sent():
    with pytest.raises(ValueError, match="is no folder within"):
        Destination("me/pack", subfolder="/etc")


@pytest.mark.slow
def test_the_example_shares_a_pack(hub):
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")
    script = ROOT / "examples" / "share_a_pack.py"
    assert len(script.read_text().splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, script, "me/shared", "me/null-spaces"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the same from the Hub, with and without this package" in done.stdout
    assert hub.repos["me/shared"].private
    assert EditPack.from_pretrained("me/shared").rank == 1


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "a/b", "a.b/c_d-e", "a" * 96, "a" * 97, "a/b/c", "a--b", "a..b", "a/b.git", ".a"),
        *(
            "a-",
            "",
            "/a",
            "a/",
            "a b",
            "café",
            "a/" + "b" * 97,
            "\n",
            "a\n",
            "x" * 96 + "/y",
            "-a/b",
        ),
    ],
)
def test_a_repositorys_name_is_what_the_client_takes_for_one(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert repository_name(name) is None
    else:
        assert repository_name(name) == name
