"""``alphaedit nullspace`` and its ``import``: texts or others' files in, a NullSpace folder out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alphaedit_peft import embedded
from alphaedit_peft.nullspace import KeyMoments, NullSpace

WIDTH, TOKENS = 12, 600


@pytest.fixture
def files(tmp_path):
    """(.npz files of blocks 0 and 1, .pt, .safetensors) of the same moment."""
    keys = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    total = (keys * torch.logspace(0, -2, WIDTH)).T @ (keys * torch.logspace(0, -2, WIDTH))
    npz = [tmp_path / f"h.{n}.mlp.c_proj_float32_mom2_9.npz" for n in (0, 1)]
    for path in npz:
        np.savez(path, **{"mom2.count": TOKENS, "mom2.mom2": total.numpy(), "sample_size": 9})
    space = KeyMoments({0: total / TOKENS}, TOKENS, {0: ""}).null_space(5, "rank")
    torch.save(
        space.project(0, torch.eye(WIDTH))[None].expand(2, -1, -1).clone(), tmp_path / "p.pt"
    )
    save_file({"c.0": total / TOKENS, "c.1": total / TOKENS}, tmp_path / "c.safetensors")
    return npz, tmp_path / "p.pt", tmp_path / "c.safetensors"


def test_each_kind_gives_the_same_projector(run_json, files, tmp_path):
    npz, pt, tensors = files
    rank = ("--threshold", 5, "--threshold-mode", "rank")
    ways = {
        "npz": (*npz, *rank, "--moments-out", tmp_path / "moments"),
        "named": (*reversed(npz), *rank, "--layers", "1,0"),
        "pt": (pt, "--layers", "0-1"),
        "st": (tensors, *rank, "--layers", "0-1", "--name", "c.{}", "--tokens", TOKENS),
    }
    keys = torch.randn(3, WIDTH)
    projected = []
    for name, words in ways.items():
        found = run_json("nullspace", "import", *words, "--out", tmp_path / name)
        assert [row["kept"] for row in found["layers"]] == [WIDTH - 5] * 2
        projected.append(NullSpace.from_pretrained(tmp_path / name).project(1, keys))
    for other in projected[1:]:
        torch.testing.assert_close(other, projected[0], rtol=0, atol=1e-5)
    assert KeyMoments.from_pretrained(tmp_path / "moments").tokens == TOKENS


def test_reach_one_is_the_thinnest(run, files, tmp_path):
    words = (*files[0], "--threshold", 0.01, "--threshold-mode", "absolute")
    run("nullspace", "import", *words, "--out", tmp_path / "thick")
    run("nullspace", "import", *words, "--out", tmp_path / "thin", "--reach", 1)
    thin, thick = (NullSpace.from_pretrained(tmp_path / name) for name in ("thin", "thick"))
    assert thin.parts[0].basis.numel() < thick.parts[0].basis.numel()


def test_wrong_command_lines_exit_with_two(run, files):
    npz, pt, tensors = files
    for words in (
        (),
        (pt,),
        (pt, tensors, "--layers", "0"),
        (pt, "--layers", "0-1", "--threshold", 1),
        (tensors, "--layers", "0"),
        npz,
        (*npz, "--layers", "0", "--threshold", 1, "--threshold-mode", "rank"),
        ("stats.csv",),
    ):
        assert "Usage" in run("nullspace", "import", *words, "--out", "x", code=2).output


def test_what_cannot_be_read_is_one_line(run, files, tmp_path):
    files[1].write_bytes(b"junk")
    result = run("nullspace", "import", files[1], "--layers", "0", "--out", tmp_path / "x", code=1)
    assert result.stderr.startswith("alphaedit: ")
    assert "p.pt: it is damaged, or holds more than tensors" in result.stderr
    result = run("nullspace", "import", files[1], "--layers", "0", "--out", ".", code=1)
    assert "is or holds the working directory" in result.stderr


def test_tokens_and_time_are_told_before_and_what_to_do_next_after(
    run, run_json, embedded_model, tmp_path
):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(embedded.texts(400)))
    words = ["nullspace", "embedded", "--texts", texts, "--out", tmp_path / "a b"]
    done = run(*words)
    assert "2 layers of d_in 1,024 need 1,024 tokens at least, better 10,240" in done.stderr
    then = f"alphaedit edit embedded edits.jsonl --null-space '{tmp_path / 'a b'}' --out pack"
    assert f"Next: {then}" in done.stdout
    assert "10,240 are advised: more are better" in done.stdout
    told = run_json(*words)
    assert (told["next"], told["advised_tokens"]) == (then, 10_240)
    assert told["seconds"] > 0


def test_a_threshold_that_the_layers_cannot_have_is_refused_before_the_pass(
    run, embedded_model, tmp_path
):
    words = ["nullspace", "embedded", "--layers", "0", "--out", tmp_path / "ns"]
    words += ["--threshold-mode", "rank", "--threshold", "5000"]
    done = run(*words, code=1)
    assert done.stderr == "alphaedit: threshold=5000.0 is outside 0..1024.0 for mode 'rank'\n"


def test_one_layer_is_told_of_in_the_singular(run, embedded_model, tmp_path):
    words = ["nullspace", "embedded", "--layers", "0", "--max-tokens", "5"]
    done = run(*words, "--out", tmp_path / "ns", code=1)
    assert "1 layer of d_in 1,024 needs 1,024 tokens at least" in done.stderr
