from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaedit_peft import algebra
from alphaedit_peft.architecture import describe
from alphaedit_peft.config import AlphaEditConfig
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.nullspace import KeyMoments, NullSpace
from alphaedit_peft.nullspace.spectrum import LayerSpace, moment_times
from alphaedit_peft.nullspace.threshold import null_basis
from tests.conftest import SHARED_DATA

WIDTH = 20


def keys(n: int, *, rank: int = WIDTH, seed: int = 0) -> Tensor:
    """Keys (n, WIDTH) of a random subspace of that rank, with very different lengths in it."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw))[0][:, :rank]
    scales = torch.logspace(0, -2, rank)
    return torch.randn(n, rank, generator=draw) * scales @ basis.T


def moments_of(K: Tensor, tokens: int = 1000) -> KeyMoments:
    return KeyMoments({3: K.T @ K / len(K)}, tokens, {3: "h.3.mlp"})


def space_of(K: Tensor, threshold: float = 1e-3, mode: str = "relative") -> NullSpace:
    return NullSpace.from_moments(moments_of(K), threshold, mode)


def test_preserved_keys_are_projected_away():
    K = keys(500, rank=8)
    space = space_of(K, 1e-5)
    assert space.null_dimension(3) == WIDTH - 8
    assert space.project(3, K).norm(dim=1).max() < 1e-5 * K.norm(dim=1).max()


@pytest.mark.parametrize("rank", [3, 17])
def test_it_is_a_symmetric_projector(rank):
    space = space_of(keys(500, rank=rank), 1e-5)
    assert space.parts[3].complement == (rank == 3)
    P = space.project(3, torch.eye(WIDTH))
    torch.testing.assert_close(P, P.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-6)
    assert round(float(P.trace())) == space.null_dimension(3)


def test_basis_and_complement_project_alike():
    found = algebra.spectrum(moments_of(keys(500)).moments[3])
    null = LayerSpace(found.vectors[:, :12], found.values, complement=False)
    rest = LayerSpace(found.vectors[:, 6:], found.values, complement=True)
    K = torch.randn(5, WIDTH)
    for kept in (6, 9, 12):
        torch.testing.assert_close(null.project(K, kept), rest.project(K, kept))


@pytest.mark.parametrize(
    ("threshold", "mode"), [(1e-3, "absolute"), (1e-2, "relative"), (1e-2, "energy"), (1, "rank")]
)
def test_equal_to_the_dense_projector_at_all_thresholds_in_reach(threshold, mode):
    C0 = moments_of(keys(500)).moments[3]
    space = space_of(keys(500), threshold, mode)
    assert space.parts[3].basis.shape[1] < WIDTH
    K = torch.randn(5, WIDTH)
    for moved in (space, *(space.with_threshold(threshold * x) for x in (0.1, 0.3, 3))):
        Q = null_basis(C0.double(), moved.threshold, mode).float()
        assert moved.null_dimension(3) == Q.shape[1]
        torch.testing.assert_close(moved.project(3, K), K @ Q @ Q.T, rtol=1e-4, atol=1e-5)


def test_a_threshold_out_of_reach_is_refused():
    space = space_of(keys(500), 2e-4)
    with pytest.raises(
        ValueError, match=r"threshold=0\.5 \(relative\) keeps 18 .*for 0 to 7; .*KeyMoments\.null"
    ):
        space.with_threshold(0.5)
    with pytest.raises(ValueError, match="threshold_mode='best' is unknown"):
        space.with_threshold(0.5, "best")


def test_a_threshold_that_keeps_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"threshold=1e-09 \(absolute\) keeps none of layer 3's 20"
    ):
        space_of(keys(500), 1e-9, "absolute")


def test_projection_follows_the_dtype_of_keys():
    space = space_of(keys(500))
    K = torch.randn(4, WIDTH)
    assert space.project(3, K.bfloat16()).dtype == torch.float32
    assert space.project(3, K.double()).dtype == torch.float64
    torch.testing.assert_close(space.project(3, K.double()).float(), space.project(3, K))


def test_identity_keeps_all():
    space = NullSpace.identity({0: 6, 1: 8})
    K = torch.randn(3, 8)
    assert torch.equal(space.project(1, K), K)
    assert (space.width(0), space.null_dimension(0), space.layers) == (6, 6, (0, 1))
    assert not space.moment_quadratic(1, K).any()


@pytest.mark.parametrize("rank", [3, 17])
def test_the_quadratic_form_is_exact_or_a_bound(rank):
    K = keys(500, rank=rank) + 0.01 * keys(500, seed=1)
    C0 = moments_of(K).moments[3].double()
    space = NullSpace.from_moments(moments_of(K), rank, "rank")
    rows = space.project(3, torch.randn(4, WIDTH, dtype=torch.float64))
    found, wanted = space.moment_quadratic(3, rows), rows @ C0 @ rows.T
    if space.parts[3].complement:
        assert torch.linalg.eigvalsh(found - wanted).min() > -1e-9
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)
    times = moment_times(space.parts[3], rows) @ rows.T
    torch.testing.assert_close(times, found, rtol=1e-12, atol=1e-16 + 1e-14 * float(found.norm()))
    anything = torch.randn(4, WIDTH)
    times = moment_times(space.parts[3], anything.double()) @ anything.double().T
    torch.testing.assert_close(times, space.moment_quadratic(3, anything), rtol=1e-10, atol=1e-12)
    excess = space.moment_quadratic(3, anything) - anything.double() @ C0 @ anything.T.double()
    assert torch.linalg.eigvalsh(excess).min() > -1e-5


def test_too_few_tokens():
    with pytest.raises(ValueError, match=r"15 tokens are fewer than layer 3's width 20.* 5 more"):
        NullSpace.from_moments(moments_of(keys(15), tokens=15), 1e-3, "relative")
    with pytest.warns(UserWarning, match=r"199 tokens are few .* advised, 200"):
        NullSpace.from_moments(moments_of(keys(199), tokens=199), 1e-3, "relative")


def test_keys_and_layers_that_do_not_fit():
    space = space_of(keys(500))
    with pytest.raises(ValueError, match=r"keys \(2, 5\) do not fit layer 3; they are \(n, 20\)"):
        space.project(3, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"layer 4 has no null space; there are \[3\]"):
        space.project(4, torch.ones(2, WIDTH))


def test_summary():
    (row,) = space_of(keys(500, rank=8), 1e-5).summary()
    assert (row.layer, row.width, row.kept) == (3, WIDTH, WIDTH - 8)
    assert row.largest_eigenvalue == pytest.approx(1, rel=0.3)
    assert (row.threshold, row.threshold_mode) == (1e-5, "relative")


def test_from_texts(model, tokenizer, texts, config, moments):
    space = NullSpace.from_texts(model, tokenizer, texts, config, progress=False)
    assert space.layers == (0, 2)
    assert space.digest() == moments.null_space(config=config.resolve(model)[0]).digest()
    assert set(space.spectra) == {0, 2}


def test_the_base_is_checked(model, moments):
    space = moments.null_space(0.02, "energy")
    architecture = describe(model)
    space.check_base(fingerprint(model, 2, architecture), [0, 2])
    with pytest.raises(ValueError, match=r"layers \[0, 2\], the config wants \[1, 2\]: \[1\] are"):
        space.check_base(fingerprint(model, 2, architecture), [1, 2])
    NullSpace.identity({0: 24}).check_base(fingerprint(model, 2, architecture), [0])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(2)
    with pytest.raises(ValueError, match="made for another model: the weights differ from block 1"):
        space.check_base(fingerprint(model, 2, architecture), [0, 2])
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.warns(UserWarning, match="cannot verify that this null space"):
        space.check_base(fingerprint(model, 2, architecture), [0, 2])


def test_digests_tell_projectors_apart():
    space = space_of(keys(500))
    assert space.digest() == space_of(keys(500)).digest()
    others = [space_of(keys(500, seed=1)), space.with_threshold(2e-3), NullSpace.identity({3: 20})]
    assert len({space.digest(), *(other.digest() for other in others)}) == 4


def test_saved_then_loaded_has_the_same_bits(tmp_path, moments):
    space = moments.null_space(0.02, "energy")
    space.save_pretrained(tmp_path)
    found = NullSpace.from_pretrained(tmp_path)
    assert found.digest() == space.digest()
    assert (found.tokens, found.threshold, found.threshold_mode) == (space.tokens, 0.02, "energy")
    assert (found.fingerprint, found.provenance) == (space.fingerprint, space.provenance)
    K = torch.randn(3, space.width(2))
    assert torch.equal(found.project(2, K), space.project(2, K))
    NullSpace.identity({0: 6, 1: 6}).save_pretrained(tmp_path / "identity")
    assert NullSpace.from_pretrained(tmp_path, subfolder="identity").width(0) == 6


@pytest.fixture
def saved(tmp_path, moments):
    moments.null_space(0.02, "energy").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.2.basis", lambda t: t[:-1], r"layer 2: basis \(23, \d+\) and values \(24,\)"),
        ("layers.2.basis", lambda t: t * 1.1, r"layer 2: basis is off orthonormal by 0\.21"),
        ("layers.2.values", lambda t: t.flip(0), "layer 2: eigenvalues do not ascend"),
        ("layers.2.values", lambda t: t - 1, "layer 2: eigenvalues do not ascend from zero"),
        ("layers.0.basis", lambda t: t * float("nan"), r"layers\.0\.basis holds NaN or infinity"),
        ("layers.0.basis", lambda t: t.half(), r"layers\.0\.basis is torch\.float16, not one of"),
        ("layers.5.basis", lambda t: t, r"layers\.5\.basis.*do not belong together"),
    ],
)
def test_damaged_tensors_are_refused(saved, name, change, message):
    source = name if name in load_file(saved / "null_space.safetensors") else "layers.0.basis"
    tensors = load_file(saved / "null_space.safetensors")
    tensors[name] = change(tensors[source].clone()).contiguous()
    save_file(tensors, saved / "null_space.safetensors")
    with pytest.raises(ValueError, match=message):
        NullSpace.from_pretrained(saved)


def test_a_threshold_changed_in_the_file_is_held_to_the_stored_eigenvectors(saved):
    path = saved / "null_space.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": 0.0}))
    with pytest.raises(ValueError, match=r"threshold=0\.0 \(energy\) keeps none"):
        NullSpace.from_pretrained(saved)


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no shared data folder")
def test_a_trained_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SHARED_DATA / "counterfact-lm-7m")
    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "counterfact-lm-7m")
    text = (SHARED_DATA / "wikitext2_valid.txt").read_text(encoding="utf-8").replace("<unk>", "")
    config = AlphaEditConfig(rewrite_layers=[0, 1, 2])
    space = NullSpace.from_texts(
        model, tokenizer, text.splitlines(), config, max_tokens=30_000, progress=False
    )
    assert space.tokens == 30_000
    for row in space.summary():
        assert 0.2 * row.width < row.kept < 0.8 * row.width


def test_a_fresh_and_a_loaded_null_space_project_to_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2000, 48, generator=generator) * torch.logspace(0, -3, 48)
    moments = KeyMoments({0: keys.T @ keys / 2000}, 2000, {0: "mlp"})
    fresh = moments.null_space(1e-3, "absolute")
    fresh.save_pretrained(tmp_path)
    loaded = NullSpace.from_pretrained(tmp_path)
    assert torch.equal(fresh.project(0, keys), loaded.project(0, keys))
