from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from alphaedit_peft import saving
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.nullspace import moments as sums
from alphaedit_peft.structure import TOKENS


def interrupted(texts, after: int):
    """The texts, with Ctrl-C when as many were read."""
    yield from texts[:after]
    raise KeyboardInterrupt


@pytest.fixture
def small(config):
    return replace(config, tokens_per_batch=32)


@pytest.fixture
def whole(model, tokenizer, texts, small):
    return KeyMoments.collect(model, tokenizer, texts, small, progress=False)


def assert_same(found: KeyMoments, whole: KeyMoments) -> None:
    assert (found.tokens, found.provenance) == (whole.tokens, whole.provenance)
    for layer in whole.layers:
        assert torch.equal(found.moments[layer], whole.moments[layer])


def test_going_on_after_an_interrupt_ends_in_the_same_bits(
    tmp_path, model, tokenizer, texts, small, whole
):
    path = tmp_path / "sums.safetensors"
    with pytest.raises(KeyboardInterrupt):
        KeyMoments.collect(
            model, tokenizer, interrupted(texts, 64), small, progress=False, resume=path
        )
    assert path.exists()
    assert 0 < sums.Checkpoint(path, subject_of(whole)).read().tokens < whole.tokens
    found = KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    assert_same(found, whole)


def is_probe(args) -> bool:
    """Whether a module runs while the model's structure is looked at."""
    return args[0].shape[:2] == (1, TOKENS)


def test_ctrl_c_within_a_batch_waits_for_its_end(tmp_path, model, tokenizer, texts, small, whole):
    path = tmp_path / "sums.safetensors"
    runs = []

    def press(_module, args, _output):
        if is_probe(args):
            return
        runs.append(1)
        if len(runs) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    hook = model.transformer.h[1].register_forward_hook(press)  # between the rewrite layers
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(runs) == 3
    assert sums.Checkpoint(path, subject_of(whole)).read().batches == 3
    found = KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    assert_same(found, whole)


def test_sigterm_where_it_is_handled_waits_for_the_end_of_a_batch(
    tmp_path, model, tokenizer, texts, small, whole
):
    def terminate(number, frame):
        raise KeyboardInterrupt

    runs = []

    def come(_module, args, _output):
        if is_probe(args):
            return
        runs.append(1)
        if len(runs) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = model.transformer.h[1].register_forward_hook(come)
    path, before = tmp_path / "sums.safetensors", signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(KeyboardInterrupt):
            KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)
        hook.remove()
    assert sums.Checkpoint(path, subject_of(whole)).read().batches == 3


def test_a_full_disk_and_a_second_process_are_told_of_the_file(
    tmp_path, model, tokenizer, texts, small, whole, full_disk
):
    path = tmp_path / "sums.safetensors"
    with pytest.raises(OSError, match=r"saving .*sums\.safetensors failed: .*File too large"):
        KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    assert list(tmp_path.iterdir()) == []
    with (
        saving.alone(path),
        pytest.raises(BlockingIOError, match=r"sums\.safetensors is being written by process"),
    ):
        KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)


def test_a_crash_leaves_the_last_checkpoint(
    tmp_path, model, tokenizer, texts, small, whole, monkeypatch
):
    monkeypatch.setattr(sums, "BATCHES_PER_CHECKPOINT", 2)
    path = tmp_path / "sums.safetensors"
    runs = []

    def crash(_module, args, _output):
        if is_probe(args):
            return
        runs.append(1)
        if len(runs) == 4:
            raise RuntimeError("out of memory")

    hook = model.transformer.h[1].register_forward_hook(crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    hook.remove()
    assert sums.Checkpoint(path, subject_of(whole)).read().batches == 2
    found = KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    assert_same(found, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["sums.safetensors"]


def test_a_finished_pass_is_not_run_again(tmp_path, model, tokenizer, texts, small, whole):
    path = tmp_path / "sub" / "sums.safetensors"
    KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    hook = model.transformer.h[0].register_forward_hook(
        lambda _module, args, _output: None if is_probe(args) else pytest.fail("ran")
    )
    found = KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    hook.remove()
    assert_same(found, whole)


def test_without_a_checkpoint_an_interrupt_passes(model, tokenizer, texts, small):
    with pytest.raises(KeyboardInterrupt):
        KeyMoments.collect(model, tokenizer, interrupted(texts, 64), small, progress=False)


def test_other_texts_layers_and_files_are_refused(tmp_path, model, tokenizer, texts, small):
    path = tmp_path / "sums.safetensors"
    KeyMoments.collect(model, tokenizer, texts, small, progress=False, resume=path)
    arguments = {"progress": False, "resume": path}
    with pytest.raises(ValueError, match=r"checkpoint holds 1\d+ tokens of other texts"):
        KeyMoments.collect(model, tokenizer, texts[1:], small, **arguments)
    with pytest.raises(ValueError, match="of other texts"):
        KeyMoments.collect(model, tokenizer, texts[:9], small, **arguments)
    other = replace(small, rewrite_layers=[0, 1])
    with pytest.raises(ValueError, match=r"h\.2\.mlp.*this pass is for.*h\.1\.mlp"):
        KeyMoments.collect(model, tokenizer, texts, other, **arguments)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"sums\.safetensors: it is no readable checkpoint"):
        KeyMoments.collect(model, tokenizer, texts, small, **arguments)


def subject_of(moments: KeyMoments) -> dict:
    assert moments.fingerprint is not None
    modules = list(moments.modules.values())
    return {"fingerprint": moments.fingerprint.to_json(), "modules": modules}


@pytest.mark.parametrize("width", [5, 256, 300, 2060])
def test_products_of_blocks_add_up_to_the_whole_symmetric_product(width):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, width, generator=generator)
    total = torch.eye(width)
    sums.add_products(total, keys)
    sums.add_products(total, keys[:3].bfloat16())
    some = keys[:3].bfloat16().double()
    wanted = torch.eye(width).double() + keys.double().T @ keys.double() + some.T @ some
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(total, total.T)


def test_the_pass_stops_in_front_of_the_last_rewrite_module(model, tokenizer, texts, small):
    ran = []
    last = model.transformer.h[2].mlp.c_proj
    hook = last.register_forward_hook(
        lambda _module, args, _output: None if is_probe(args) else ran.append(1)
    )
    KeyMoments.collect(model, tokenizer, texts, small, progress=False)
    hook.remove()
    assert not ran


def test_keys_that_are_not_finite_are_refused_with_their_module(model, tokenizer, texts, small):
    model.transformer.h[2].mlp.c_fc.register_forward_hook(
        lambda _module, args, output: output if is_probe(args) else output * float("nan")
    )
    with pytest.raises(ValueError, match=r"keys of transformer\.h\.2\.mlp\.c_proj hold NaN"):
        KeyMoments.collect(model, tokenizer, texts, small, progress=False)
