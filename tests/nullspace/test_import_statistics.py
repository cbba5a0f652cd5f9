"""Statistics in the exact layout of other programs, good and hostile."""

from __future__ import annotations

import io
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaedit_peft.architecture import describe
from alphaedit_peft.fingerprint import fingerprint
from alphaedit_peft.nullspace import (
    ForeignFileError,
    KeyMoments,
    NullSpace,
    read_covariances,
    read_projector,
    read_second_moments,
)
from alphaedit_peft.nullspace.threshold import null_basis

WIDTH, TOKENS = 24, 900
NAME = "transformer.h.{}.mlp.c_proj_float32_mom2_100000.npz"


def total(seed: int = 0, width: int = WIDTH) -> Tensor:
    """The sum of k k^T over TOKENS keys of very different lengths."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(TOKENS, width, generator=draw) * torch.logspace(0, -2, width)
    return keys.T @ keys


def rome_file(folder: Path, layer: int = 2, *, name: str = NAME, **changed: object) -> Path:
    """What tally() of ROME's runningstats leaves for CombinedStat(mom2=SecondMoment())."""
    values = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": TOKENS,
        "mom2.mom2": total(layer).numpy(),
        "sample_size": 100000,
    }
    path = folder / name.replace("{}", str(layer))
    np.savez(path, **{k: v for k, v in (values | changed).items() if v is not None})
    return path


def projector(removed: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """P = Q Q^T in float32, as the reference code makes it."""
    Q = null_basis(total(seed, width), removed, "rank")
    return Q @ Q.T


def project_file(folder: Path, *projectors: Tensor) -> Path:
    path = folder / "null_space_project.pt"
    torch.save(torch.stack(projectors), path)
    return path


# second moments


def test_a_second_moment_is_the_sum_over_the_count(tmp_path):
    stats = tmp_path / "gpt2-xl" / "wikipedia_stats"
    stats.mkdir(parents=True)
    found = read_second_moments([rome_file(stats, 2), rome_file(stats, 0)])
    assert found.layers == (0, 2)
    assert found.tokens == TOKENS
    for layer in (0, 2):
        torch.testing.assert_close(found.moments[layer], total(layer) / TOKENS, rtol=0, atol=1e-7)
        assert found.modules[layer] == f"transformer.h.{layer}.mlp.c_proj"
    facts = found.provenance
    assert (facts["corpus"], facts["texts"]) == ("wikipedia", 100000)
    assert facts["files"]["2"] == NAME.replace("{}", "2")
    assert "ROME" in facts["format"]
    assert found.fingerprint is None


def test_it_serves_as_moments_collected_here(tmp_path):
    found = read_second_moments([rome_file(tmp_path)])
    found.save_pretrained(tmp_path / "moments")
    again = KeyMoments.from_pretrained(tmp_path / "moments")
    assert again.digest() == found.digest()
    assert again.provenance == found.provenance
    own = KeyMoments({2: total(2) / TOKENS}, TOKENS, {2: "c_proj"})
    keys = torch.randn(5, WIDTH)
    torch.testing.assert_close(
        again.null_space(1e-2, "absolute").project(2, keys),
        own.null_space(1e-2, "absolute").project(2, keys),
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"mom2.mom2": total(2).double().numpy()},
        {"mom2.mom2": total(2).numpy().astype(">f4")},
        {"mom2.mom2": np.asfortranarray(total(2).numpy())},
        {"sample_size": np.float64("nan")},
        {"sample_size": None, "mom2.constructor": None},
        {"mean.mean": np.ones(WIDTH), "mom2.count": np.int64(TOKENS)},
    ],
    ids=["float64", "big-endian", "fortran", "no sample size", "bare", "several statistics"],
)
def test_other_forms_of_the_same_file_give_the_same_moment(tmp_path, changed):
    found = read_second_moments([rome_file(tmp_path, **changed)])
    torch.testing.assert_close(found.moments[2], total(2) / TOKENS, rtol=1e-6, atol=1e-8)


def test_a_moment_saved_by_itself_is_read_too(tmp_path):
    np.savez(tmp_path / "mine.npz", constructor="SecondMoment()", count=TOKENS, mom2=total(1))
    found = read_second_moments({7: tmp_path / "mine.npz"})
    torch.testing.assert_close(found.moments[7], total(1) / TOKENS)


def test_the_fewest_tokens_of_all_files_count(tmp_path):
    files = [rome_file(tmp_path, 0), rome_file(tmp_path, 2, **{"mom2.count": 500})]
    found = read_second_moments(files)
    assert found.tokens == 500
    assert found.provenance["tokens_by_layer"] == {"0": 900, "2": 500}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.mlp.down_proj_float32_mom2_100000.npz",
        "transformer.h.{}.mlp.fc_out_float64_mean-mom2_t2048_5000.npz",
        "transformer.h.{}.mlp.c_proj_float16_mom2.npz",
    ],
)
def test_the_name_tells_the_layer(tmp_path, name):
    assert read_second_moments([rome_file(tmp_path, 13, name=name)]).layers == (13,)


@pytest.mark.parametrize(
    "name", ["c_proj_float32_mom2.npz", "stats.npz", "a.1.b.2_float32_mom2.npz"]
)
def test_a_name_without_one_layer_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} does not tell its layer.*give \{{layer: file"):
        read_second_moments([rome_file(tmp_path, name=name)])


def test_a_layer_twice_and_no_file_are_refused(tmp_path):
    files = [rome_file(tmp_path), rome_file(tmp_path, name="h.{}.c_proj_float64_mom2.npz")]
    with pytest.raises(ValueError, match=r"are both of layer 2; give one"):
        read_second_moments(files)
    with pytest.raises(ValueError, match="files is empty"):
        read_second_moments([])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz does not exist"):
        read_second_moments({1: tmp_path / "nowhere.npz"})


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def asymmetric() -> np.ndarray:
    found = total(2).numpy().copy()
    found[0, 1] += 900
    return found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mom2.mom2": None}, r"holds \['mom2\.constructor', 'mom2\.count', 'sample_size'\]"),
        ({"mom2.count": 0}, "count is no number of tokens"),
        ({"mom2.count": float("nan")}, "count is no number of tokens"),
        ({"mom2.count": np.ones(3)}, r"count is of shape \(3,\); it is one number"),
        ({"mom2.mom2": np.ones((3, 4))}, r"mom2 is of shape \(3, 4\); it is square"),
        ({"mom2.mom2": np.ones((0, 0))}, r"mom2 is of shape \(0, 0\)"),
        ({"mom2.mom2": np.ones((2, 2, 2))}, r"mom2 is of shape \(2, 2, 2\)"),
        ({"mom2.mom2": np.ones((2, 2), complex)}, "of type complex128, not numbers"),
        ({"mom2.mom2": np.array([["a"]])}, "of type <U1, not numbers"),
        ({"mom2.mom2": total(2).numpy() * np.nan}, "holds NaN or infinity"),
        ({"mom2.mom2": np.full((4, 4), np.inf)}, "holds NaN or infinity"),
        ({"mom2.mom2": asymmetric()}, "off symmetric by 1, so it is no second moment"),
        ({"mom2.mom2": -np.eye(4)}, r"entry 0\.0011 above sqrt"),
        ({"mom2.mom2": np.ones((4, 4)) - np.eye(4)}, "above sqrt.*which no mean"),
    ],
)
def test_what_is_no_second_moment_is_refused(tmp_path, changed, message):
    with pytest.raises(ForeignFileError, match=message):
        read_second_moments([rome_file(tmp_path, **changed)])


def test_pickled_objects_are_never_run(tmp_path):
    mark = tmp_path / "ran"
    objects = np.array([[Bomb(mark)]], dtype=object)
    for changed in ({"mom2.mom2": objects}, {"mom2.count": np.array(Bomb(mark), dtype=object)}):
        with pytest.raises(ForeignFileError, match=r"of type object.*never unpickled"):
            read_second_moments([rome_file(tmp_path, **changed)])
    assert not mark.exists()


def npy_header(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


def hostile_zip(path: Path, mom2: bytes, kind: int = zipfile.ZIP_STORED) -> Path:
    count = io.BytesIO()
    np.save(count, np.array(TOKENS))
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("mom2.count.npy", count.getvalue())
        archive.writestr("mom2.mom2.npy", mom2)
    return path


@pytest.mark.parametrize(
    ("mom2", "kind", "message"),
    [
        (npy_header((10**6, 10**6)), zipfile.ZIP_STORED, "at most 65536 a side"),
        (npy_header((60000, 60000)), zipfile.ZIP_STORED, "is cut off"),
        (npy_header((3000, 3000), bytes(4 * 3000**2)), zipfile.ZIP_DEFLATED, "over 16 times its"),
        (b"\x93NUMPY\x09\x00", zipfile.ZIP_STORED, r"\.npy version \(9, 0\)"),
        (b"\x93NUMPY\x01\x00\xff\xff{", zipfile.ZIP_STORED, "is no readable .npz file"),
        (b"no array", zipfile.ZIP_STORED, "is no readable .npz file"),
        (b"", zipfile.ZIP_STORED, "is no readable .npz file"),
    ],
    ids=["huge", "cut off", "zip bomb", "version", "header", "text", "empty"],
)
def test_hostile_archives_are_refused_before_memory_is_taken(tmp_path, mom2, kind, message):
    with pytest.raises(ForeignFileError, match=message):
        read_second_moments({0: hostile_zip(tmp_path / "x.npz", mom2, kind)})


def test_damaged_archives_are_refused(tmp_path):
    path = rome_file(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    pickled = pickle.dumps(Bomb(tmp_path / "ran"))
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"", pickled):
        path.write_bytes(damaged)
        with pytest.raises(ForeignFileError, match=r"it is no readable \.npz file"):
            read_second_moments([path])
    assert not (tmp_path / "ran").exists()


# against a model


def test_a_model_is_checked_and_bound(tmp_path, model):
    found = read_second_moments([rome_file(tmp_path)], model=model)
    assert found.fingerprint == fingerprint(model, 2, describe(model))
    assert found.modules == {2: "transformer.h.2.mlp.c_proj"}


def test_a_matrix_of_another_width_than_the_models_is_refused(tmp_path, model):
    wide = total(0, 30)
    npz = rome_file(tmp_path, **{"mom2.mom2": wide.numpy()})
    covariances, pt = tmp_path / "c.safetensors", project_file(tmp_path, projector(5, 30))
    save_file({"c": wide / TOKENS}, covariances)
    for read in (
        partial(read_second_moments, [npz]),
        partial(read_covariances, covariances, {2: "c"}, TOKENS),
        partial(read_projector, pt, [2]),
    ):
        with pytest.raises(ValueError, match=r"layer 2 is 30 wide, but .*c_proj of .* takes 24"):
            read(model=model)


def test_layers_and_modules_that_the_model_does_not_rewrite_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"\[9\] is outside this model's 4 blocks"):
        read_second_moments([rome_file(tmp_path, 9)], model=model)
    path = rome_file(tmp_path, name="transformer.h.{}.mlp.c_fc_float32_mom2.npz")
    with pytest.raises(ValueError, match=r"is of transformer\.h\.2\.mlp\.c_fc, but edits of this"):
        read_second_moments([path], model=model)


# covariances


@pytest.mark.parametrize("summed", [False, True])
def test_covariances_by_name(tmp_path, summed):
    held = {f"cov.{layer}": total(layer) / (1 if summed else TOKENS) for layer in (4, 5)}
    save_file(held, tmp_path / "c.safetensors")
    names = {4: "cov.4", 5: "cov.5"}
    found = read_covariances(tmp_path / "c.safetensors", names, TOKENS, summed=summed)
    assert (found.layers, found.tokens) == ((4, 5), TOKENS)
    torch.testing.assert_close(found.moments[5], total(5) / TOKENS)
    assert found.provenance["files"] == {"4": "c.safetensors: cov.4", "5": "c.safetensors: cov.5"}


def test_covariances_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"a": torch.ones(2, 3), "n": torch.full((2, 2), torch.nan)}, path)
    with pytest.raises(ValueError, match=r"no matrix 'b'; it holds \['a', 'n'\]"):
        read_covariances(path, {0: "b"}, 9)
    with pytest.raises(ForeignFileError, match=r": a is \(2, 3\), but a second moment is"):
        read_covariances(path, {0: "a"}, 9)
    with pytest.raises(ForeignFileError, match=": n holds NaN or infinity"):
        read_covariances(path, {0: "n"}, 9)
    with pytest.raises(ValueError, match=r"names=\{0: 'a'\} and tokens=0 must say"):
        read_covariances(path, {0: "a"}, 0)
    path.write_bytes(b"{not")
    with pytest.raises(ForeignFileError, match="not a safetensors file"):
        read_covariances(path, {0: "a"}, 9)
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist"):
        read_covariances(tmp_path / "x.safetensors", {0: "a"}, 9)


# projectors


def test_a_projector_projects_as_it_did(tmp_path):
    few, many = projector(4), projector(20, seed=1)
    space = read_projector(project_file(tmp_path, few, many), [5, 3])
    assert space.layers == (3, 5)
    assert (space.null_dimension(5), space.null_dimension(3)) == (20, 4)
    assert (space.parts[5].basis.shape, space.parts[3].basis.shape) == ((24, 4), (24, 4))
    K = torch.randn(6, WIDTH)
    torch.testing.assert_close(space.project(5, K), K @ few, rtol=0, atol=1e-5)
    torch.testing.assert_close(space.project(3, K), K @ many, rtol=0, atol=1e-5)
    assert "not known" in space.provenance["spectrum"]
    assert space.provenance["files"] == {
        "5": "null_space_project.pt[0]",
        "3": "null_space_project.pt[1]",
    }
    assert (space.tokens, space.threshold, space.threshold_mode) == (0, 0.5, "absolute")


def test_its_threshold_cannot_be_moved(tmp_path):
    space = read_projector(project_file(tmp_path, projector(4)), [5])
    space.save_pretrained(tmp_path / "ns")
    again = NullSpace.from_pretrained(tmp_path / "ns")
    assert again.digest() == space.digest()
    for one in (space, again):
        with pytest.raises(
            ValueError,
            match=r"threshold=0\.02 \(absolute\) cannot be used: layer 5 was read from a",
        ):
            one.with_threshold(0.02)
        with pytest.raises(ValueError, match=r"threshold=4 \(rank\) cannot be used"):
            one.with_threshold(4, "rank")


def test_as_many_layers_as_projectors(tmp_path):
    path = project_file(tmp_path, projector(4), projector(5))
    for layers in ([1], [1, 2, 3], [1, 1]):
        with pytest.raises(ValueError, match=r"must be 2 distinct blocks, as .* holds 2 proj"):
            read_projector(path, layers)


def skewed() -> Tensor:
    found = projector(4)
    found[0, 1] += 0.1
    return found


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (skewed(), "off symmetric by 0.1, so it is no projector"),
        (projector(4) * 0.5, r"eigenvalues are off 0 and 1 by 0\.5 \(trace 10\)"),
        (-projector(4), r"off 0 and 1 by 1 \(trace -20\)"),
        (total(0) / TOKENS, "so it is no projector; a key moment is read with"),
        (projector(4) * torch.nan, "holds NaN or infinity"),
    ],
)
def test_what_is_no_projector_is_refused(tmp_path, matrix, message):
    with pytest.raises(ForeignFileError, match=message.replace("; a key", ".*; a key")):
        read_projector(project_file(tmp_path, matrix), [0])


def test_a_projector_that_keeps_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keeps none of layer 0's 24 directions"):
        read_projector(project_file(tmp_path, torch.zeros(WIDTH, WIDTH)), [0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([projector(4)], "<class 'list'>, but projectors are one tensor"),
        (projector(4), r"a tensor \(24, 24\), but"),
        (torch.ones(1, 3, 4), r"a tensor \(1, 3, 4\), but"),
        (torch.ones(1, 2, 2, dtype=torch.long), r"no plain matrices .*torch\.int64"),
        (torch.ones(1).expand(1, 10**7, 10**7), "no plain matrices of 1 to 65536"),
        (torch.ones(1, 2, 2).to_sparse(), "no plain matrices .*sparse"),
        (torch.ones(1, 0, 0), "no plain matrices"),
    ],
    ids=["list", "flat", "oblong", "integers", "expanded", "sparse", "empty"],
)
def test_files_of_other_things_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "p.pt")
    with pytest.raises(ForeignFileError, match=message):
        read_projector(tmp_path / "p.pt", [0])


def test_code_in_a_torch_file_is_never_run(tmp_path):
    path, mark = tmp_path / "p.pt", tmp_path / "ran"
    torch.save({"P": Bomb(mark)}, path)
    for content in (path.read_bytes(), pickle.dumps(Bomb(mark)), b"", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(
            ForeignFileError, match=r"damaged, or holds more than tensors .*was run"
        ):
            read_projector(path, [0])
    assert not mark.exists()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        read_projector(tmp_path / "nowhere.pt", [0])
