"""``push`` and ``pull`` against a Hub of this machine."""

from __future__ import annotations

import json

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, EditPack, NullSpace, embedded
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.pack.files import stored_dtype
from tests.hub_server import HubServer, client_of
from tests.pack.conftest import make_pack

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path):
    with HubServer({"mine": "me"}) as server, client_of(server, tmp_path / "home", "mine"):
        yield server


@pytest.fixture
def saved(tmp_path):
    make_pack().save_pretrained(tmp_path / "pack", dtype=torch.bfloat16)
    return tmp_path / "pack"


def test_a_pack_goes_up_and_comes_down_with_the_same_bytes(hub, saved, run, run_json, tmp_path):
    told = run_json("push", saved, "me/pack", "--private", "--message", "first")
    assert told["edits"] == 3
    assert told["url"].startswith(f"{hub.url}/me/pack/commit/")
    assert hub.repos["me/pack"].private
    assert "first" in hub.repos["me/pack"].messages.values()
    text = run("pull", "me/pack", "--out", tmp_path / "down").stdout
    assert "3 edits, rank 3" in text
    down = tmp_path / "down"
    files = {p.relative_to(down).as_posix(): p.read_bytes() for p in down.rglob("*") if p.is_file()}
    assert files == hub.repos["me/pack"].files()
    assert stored_dtype(down) == torch.bfloat16
    assert EditPack.from_pretrained(down).digest() == EditPack.from_pretrained(saved).digest()


def test_options_reach_the_hub(hub, saved, run, run_json, tmp_path):
    run("push", saved, "me/pack")
    run("push", saved, "me/pack", "--revision", "next", "--subfolder", "a/b", "--no-texts")
    files = hub.repos["me/pack"].files("next")
    assert b"left out of this card" in files["a/b/README.md"]
    told = run_json("push", saved, "me/pack", "--create-pr", "--subfolder", "c")
    assert told["url"].endswith("/discussions/1")
    options = ["--revision", "refs/pr/1", "--subfolder", "c"]
    run("pull", "me/pack", "--out", tmp_path / "down", *options)
    assert EditPack.from_pretrained(tmp_path / "down").edits == make_pack().edits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pull", "me/nothing"], "no Hub repository of that name that may be read"),
        (["pull", "me/pack", "--revision", "v9"], "has no revision 'v9'"),
        (["pull", "me/pack", "--subfolder", "x"], "has no folder 'x' at revision"),
        (["nullspace", "pull", "me/pack"], "has none of null_space.json"),
    ],
    ids=str,
)
def test_what_is_not_there_is_said_in_one_line(hub, saved, run, tmp_path, words, message):
    run("push", saved, "me/pack")
    done = run(*words, "--out", tmp_path / "out", code=1)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_pushing_where_one_may_not(hub, saved, run):
    done = run("push", saved, "you/pack", code=1)
    assert "you/pack: the Hub lets this token not write there" in done.stderr
    done = run("push", saved.parent / "nothing", "me/pack", code=1)
    assert "nothing is no folder here" in done.stderr


def test_a_null_space_by_fingerprint(hub, embedded_model, run, run_json, tmp_path):
    base = embedded.load()[0]
    config, architecture = AlphaEditConfig().resolve(base)
    layers = config.rewrite_layers
    made_for = fingerprint(base, max(layers), architecture)
    widths = dict.fromkeys(layers, base.config.intermediate_size)
    space = NullSpace.identity(widths, made_for)
    space.save_pretrained(tmp_path / "made")
    told = run_json("nullspace", "push", tmp_path / "made", "me/ns", "--by-fingerprint")
    assert told["layers"] == list(space.layers)
    words = ("nullspace", "pull", "me/ns", "--out", tmp_path / "ns")
    assert "give subfolder=" in run(*words, code=1).stderr
    assert run_json(*words, "--model", "embedded")["tokens"] == space.tokens
    assert NullSpace.from_pretrained(tmp_path / "ns").digest() == space.digest()


def test_two_words_are_a_command_and_models_are_still_models(run):
    assert "REPO" in run("nullspace", "push", "--help").stdout
    assert "MODEL" in run("nullspace", "--help").stdout
    assert "give --texts FILE" in run("nullspace", "pushed", "--out", "x", code=2).output


def test_json_is_json(hub, saved, run):
    assert json.loads(run("push", saved, "me/pack", "--json").stdout)["repo"] == "me/pack"
