"""Several packs in one model: together, on top of each other, and what happens behind its back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from alphaedit_peft import AlphaEditModel, Edit, EditPack, NullSpace
from tests.conftest import PEFT_ALONE, tiny_model
from tests.model.test_adapter import save_lora
from tests.model.test_model import EDITS, logits, same_bits, weights, wrap

pytestmark = PEFT_ALONE
PARENTS, CHILDREN = EDITS[:2], EDITS[2:]
BORN = Edit("Anna", "{} was born in", "Rome", id="born")
WORK = Edit("Anna", "{} works as a", "river", id="work")
ULM = Edit("Anna", "{} was born in", "Ulm", id="ulm")


def double(tokenizer, **settings) -> AlphaEditModel:
    return wrap(tiny_model("llama", torch.float64), tokenizer, **{"steps": 4, **settings})


def on_top(tokenizer, below=PARENTS, above=CHILDREN, **settings) -> AlphaEditModel:
    """A float64 model with a pack "default" and a pack "b" edited on top of it."""
    model = double(tokenizer, **settings)
    model.edit(below, progress=False)
    model.add_adapter("b")
    model.set_adapter(["default", "b"])
    if above:
        model.edit(above, into="b", progress=False)
    return model


def load(folder: Path, tokenizer, **options) -> AlphaEditModel:
    space = NullSpace.identity({0: 96, 1: 96})
    base = tiny_model("llama")
    return AlphaEditModel.from_pretrained(
        base, folder, tokenizer=tokenizer, null_space=space, **options
    )


def deltas(model, name: str) -> dict[int, torch.Tensor]:
    factors = model.edit_adapters[name].factors
    return {layer: delta.dense() for layer, delta in factors.items()}


def both(model) -> dict[int, torch.Tensor]:
    parent, child = deltas(model, "default"), deltas(model, "b")
    return {layer: parent[layer] + child[layer] for layer in parent}


def assert_close(one, other, bound: float = 1e-9) -> None:
    for layer, delta in one.items():
        assert float((delta - other[layer]).norm() / delta.norm().clamp_min(1e-3)) < bound


@pytest.fixture(scope="module")
def packs(tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """Two packs made apart, of ranks 1 and 3."""
    tmp_path = tmp_path_factory.mktemp("packs")
    for name, edits in (("a", EDITS[:1]), ("b", EDITS[1:])):
        model = wrap(tiny_model("llama"), tokenizer)
        model.edit(edits, progress=False)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture(scope="module")
def chain(tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """A pack, and one made on top of it, on disk."""
    tmp_path = tmp_path_factory.mktemp("chain")
    model = wrap(tiny_model("llama"), tokenizer)
    model.edit(PARENTS, progress=False)
    model.save_pretrained(tmp_path / "parent")
    model = load(tmp_path / "parent", tokenizer)
    model.add_adapter("b")
    model.set_adapter(["default", "b"])
    model.edit(CHILDREN, into="b", progress=False)
    model.to_pack("b").save_pretrained(tmp_path / "child")
    return tmp_path / "parent", tmp_path / "child"


def test_two_active_packs_compute_what_peft_computes(packs, tokenizer):
    ours = load(packs[0], tokenizer)
    ours.load_adapter(packs[1], "b")
    plain = PeftModel.from_pretrained(tiny_model("llama"), packs[0])
    plain.load_adapter(packs[1], "b")
    for names in (["default", "b"], ["b", "default"], ["b"]):
        ours.set_adapter(names)
        plain.base_model.set_adapter(names)
        assert ours.active_adapters == names
        assert torch.equal(logits(ours, tokenizer), logits(plain, tokenizer))
    ours.set_adapter(["default", "b"])
    assert ours.edits == EDITS
    assert ours.generate(torch.arange(4)[None], max_new_tokens=2).shape == (1, 6)


def test_two_active_packs_merge_unmerge_disable_and_unload_exactly(packs, tokenizer):
    base = tiny_model("llama")
    before, plain = weights(base), logits(base, tokenizer)
    model = AlphaEditModel.from_pretrained(base, packs[0])
    model.load_adapter(packs[1], "b")
    model.set_adapter(["default", "b"])
    together = logits(model, tokenizer)
    for _ in range(2):
        model.merge()
        assert torch.allclose(logits(model, tokenizer), together, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(logits(model, tokenizer), plain)
        model.unmerge()
    assert torch.equal(logits(model, tokenizer), together)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokenizer), plain)
    assert same_bits(weights(model.unload()), before)
    model = AlphaEditModel.from_pretrained(base, packs[0])
    model.load_adapter(packs[1], "b")
    model.set_adapter(["default", "b"])
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, tokenizer), together, atol=1e-4)


def test_each_pack_is_saved_by_its_name_where_peft_saves_it(packs, tokenizer, tmp_path):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    model.set_adapter(["default", "b"])
    with pytest.raises(RuntimeError, match=r"\['default', 'b'\] are active; name the one"):
        model.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"selected_adapters=\[\] cannot be saved: .* one or more"):
        model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "both", selected_adapters=["default", "b"])
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    model.set_adapter("b")
    model.save_pretrained(tmp_path / "active")
    PeftModel.save_pretrained(model, tmp_path / "peft")
    weights = "adapter_model.safetensors"
    for name, own, folder in (("default", ".", packs[0]), ("b", "b", packs[1])):
        wanted = EditPack.from_pretrained(folder).digest()
        assert EditPack.from_pretrained(tmp_path / "both" / own).digest() == wanted
        assert model.to_pack(name).digest() == wanted
        tensors = load_file(tmp_path / "peft" / own / weights)
        assert same_bits(load_file(tmp_path / "both" / own / weights), tensors)
    for place in (tmp_path / "one", tmp_path / "one" / "b", tmp_path / "active"):
        loaded = load(place, tokenizer)
        loaded.load_adapter(place, "again")
        assert loaded.to_pack("again").digest() == loaded.to_pack("default").digest() == wanted


def test_of_several_adapters_in_a_folder_one_is_to_be_named(packs, tokenizer, tmp_path):
    model = load(packs[0], tokenizer, adapter_name="a")
    model.load_adapter(packs[1], "b")
    model.save_pretrained(tmp_path, selected_adapters=["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"2 adapters by name, such as 'a' and 'b'.* give"):
        EditPack.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="give the folder of one"):
        model.load_adapter(tmp_path, "c")
    assert EditPack.from_pretrained(tmp_path, subfolder="a").edits == EDITS[:1]


@pytest.mark.parametrize("names", ["none", [], ["b", "b"], ["default", "none"]])
def test_names_that_cannot_be_active_are_refused(packs, tokenizer, names):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    with pytest.raises(ValueError, match=r"cannot be made active; name one or more of \['default'"):
        model.set_adapter(names)
    assert model.active_adapters == ["default"]


def test_editing_beside_others_needs_a_target(packs, tokenizer):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    model.set_adapter(["default", "b"])
    for call in (lambda: model.edit([BORN], progress=False), model.repour, model.rollback):
        with pytest.raises(RuntimeError, match=r"are active; name the one .*into="):
            call()
    with pytest.raises(ValueError, match="adapter 'c' is not loaded; this model has"):
        model.edit([BORN], into="c", progress=False)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="adapter 'b' is not active, and edits go into the model"):
        model.edit([BORN], into="b", progress=False)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_editing_on_top_equals_editing_one_pack(tokenizer, batch_size):
    one = double(tokenizer)
    one.edit(PARENTS, progress=False)
    one.edit(CHILDREN, batch_size, progress=False)
    model = double(tokenizer)
    model.edit(PARENTS, progress=False)
    parent = deltas(model, "default")
    model.add_adapter("b")
    model.set_adapter(["default", "b"])
    report = model.edit(CHILDREN, batch_size, into="b", progress=False)
    assert [r.edit for r in report.made] == CHILDREN
    assert_close(both(model), deltas(one, "default"))
    assert_close(deltas(model, "default"), parent, 1e-30)
    assert model.edits == EDITS
    child = model.edit_adapters["b"]
    assert child.edits == CHILDREN
    assert [r.edit for r in child.journal.records if r.role == "protected"] == PARENTS


def test_parents_keep_their_outputs_on_their_stored_keys(tokenizer):
    model = double(tokenizer, ridge=1e-6)
    model.edit(PARENTS, progress=False)
    model.add_adapter("b")
    model.set_adapter(["default", "b"])
    model.edit(CHILDREN, into="b", progress=False)
    unprotected = double(tokenizer, ridge=1e-6, history=False)
    unprotected.edit(PARENTS, progress=False)
    unprotected.edit(CHILDREN, progress=False)
    for layer, delta in deltas(model, "default").items():
        keys = model.edit_adapters["default"].factors[layer].A
        wanted = keys @ delta.T
        kept = keys @ both(model)[layer].T
        moved = keys @ unprotected.factors[layer].dense().T
        assert (kept - wanted).norm() < 1e-3 * wanted.norm()
        assert (moved - wanted).norm() > 1e-2 * wanted.norm()


def test_deleting_the_upper_pack_leaves_exactly_the_lower(tokenizer):
    model = double(tokenizer)
    model.edit(PARENTS, progress=False)
    alone = logits(model, tokenizer)
    model.add_adapter("b")
    model.set_adapter(["default", "b"])
    model.edit(CHILDREN, into="b", progress=False)
    assert not torch.equal(logits(model, tokenizer), alone)
    with pytest.raises(ValueError, match="'b' was made on top of 'default', which would change"):
        model.delete_adapter("default")
    model.delete_adapter("b")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, tokenizer), alone)
    assert model.edits == PARENTS
    model.edit(CHILDREN, progress=False)


def test_each_parent_is_recorded_once(tokenizer):
    model = on_top(tokenizer, above=CHILDREN[:1])
    model.edit(CHILDREN[1:], into="b", progress=False)
    pack = model.to_pack("b")
    (parent,) = pack.parents
    assert parent == {
        "operation": "beside",
        "name": "default",
        "digest": model.to_pack("default").digest(),
        "edits": 2,
    }
    assert [(r.edit.id, r.role) for r in pack.records] == [
        ("france", "protected"), ("curie", "protected"), ("einstein", "own"), ("smith", "own")
    ]  # fmt: skip
    model.add_adapter("c")
    model.set_adapter(["default", "b", "c"])
    model.edit([BORN], into="c", progress=False)
    top = model.to_pack("c")
    assert [parent["name"] for parent in top.parents] == ["default", "b"]
    assert [r.edit for r in top.records] == [*EDITS, BORN]


def test_a_pack_that_another_stands_on_is_not_changed_under_it(tokenizer):
    model = on_top(tokenizer)
    for call in (
        lambda: model.edit([BORN], into="default", progress=False),
        lambda: model.repour(adapter_name="default"),
        lambda: model.rollback(adapter_name="default"),
    ):
        with pytest.raises(ValueError, match="'b' was made on top of 'default'"):
            call()
    model.set_adapter("default")
    model.edit([BORN], progress=False)
    with pytest.raises(ValueError, match="loaded as 'default' is another, or has"):
        model.set_adapter(["default", "b"])
    with pytest.warns(UserWarning, match="or has changed since"):
        model.set_adapter(["default", "b"], missing_parents="warn")
    with pytest.raises(ValueError, match=r"pour 'b' on it with repour"):
        model.edit([ULM], into="b", progress=False)
    model.repour(adapter_name="b")
    model.set_adapter(["default", "b"])
    assert [r.edit.id for r in model.to_pack("b").records if r.role == "protected"] == [
        "france", "curie", "born"
    ]  # fmt: skip


@pytest.mark.parametrize("rule", ["error", "replace", "keep"])
def test_a_parents_edit_is_not_contradicted_on_top(tokenizer, rule):
    model = on_top(tokenizer, below=[BORN], on_conflict=rule)
    before, records = deltas(model, "b"), model.to_pack("b").records
    if rule == "keep":
        report = model.edit([ULM], into="b", progress=False)
        assert "contradicts edit born, which is kept" in report.results[0].reason
    else:
        with pytest.raises(ValueError, match=r"born of adapter 'default' and ulm contradict.*join"):
            model.edit([ULM], into="b", progress=False)
    assert_close(deltas(model, "b"), before, 1e-30)
    assert model.to_pack("b").records == records
    again = model.edit([BORN], into="b", progress=False)
    assert "already says so" in again.results[0].reason


def test_an_edit_with_a_parents_key_is_solved_together_as_in_one_pack(tokenizer):
    one = double(tokenizer)
    one.edit([BORN, *PARENTS], progress=False)
    one.edit([WORK], progress=False)
    model = on_top(tokenizer, below=[BORN, *PARENTS], above=[WORK])
    assert_close(both(model), deltas(one, "default"))
    before = both(model)
    roles = {(r.edit.id, r.role, r.row) for r in model.to_pack("b").records}
    assert {("born", "superseded", 0), ("born", "protected", 3), ("work", "own", 3)} <= roles
    model.repour(adapter_name="b")
    assert_close(both(model), before, 1e-4)
    model.remove_edits(["work"], adapter_name="b")
    assert model.edits == [BORN, *PARENTS]
    assert model.to_pack("b").rank == 0


@pytest.mark.parametrize("take_back", ["snapshot", "repour", "remove"])
def test_what_is_taken_back_on_top_leaves_the_parents_protected(tokenizer, take_back):
    model = on_top(tokenizer, above=CHILDREN[:1])
    before, records = deltas(model, "b"), model.to_pack("b").records
    parent = deltas(model, "default")
    model.edit(CHILDREN[1:], into="b", progress=False)
    if take_back == "remove":
        model.remove_edits(["smith"], adapter_name="b")
    else:
        if take_back == "repour":
            model.edit_adapters["b"].snapshots.clear()
        model.rollback(adapter_name="b")
    assert_close(deltas(model, "b"), before, 1e-6)
    assert model.to_pack("b").records == records
    assert_close(deltas(model, "default"), parent, 1e-30)
    with pytest.raises(ValueError, match=r"\['france'\] are not in this model"):
        model.remove_edits(["france"], adapter_name="b")
    model.rollback(adapter_name="b")
    assert model.to_pack("b").records == ()
    assert model.to_pack("b").parents == ()


def test_a_failed_edit_on_top_leaves_no_trace(tokenizer, monkeypatch):
    model = on_top(tokenizer)
    model.add_adapter("c")
    model.set_adapter(["default", "b", "c"])
    before = weights(model)
    adapter = model.edit_adapters["c"]
    write = adapter.write

    def fail_at_second_layer(layer, delta):
        if layer == 1:
            monkeypatch.undo()
            raise KeyboardInterrupt
        write(layer, delta)

    monkeypatch.setattr(adapter, "write", fail_at_second_layer)
    with pytest.raises(KeyboardInterrupt):
        model.edit([BORN], into="c", progress=False)
    assert same_bits(weights(model), before)
    assert model.to_pack("c").records == model.to_pack("c").parents == ()
    assert model.edits == EDITS


def test_a_chain_saved_and_loaded_computes_and_goes_on_as_before(chain, tokenizer):
    parent, child = chain
    model = load(parent, tokenizer)
    model.load_adapter(child, "b")
    model.set_adapter(["default", "b"])
    one = wrap(tiny_model("llama"), tokenizer)
    for edits in (PARENTS, CHILDREN, [BORN]):
        one.edit(edits, progress=False)
    model.edit([BORN], into="b", progress=False)
    assert torch.allclose(logits(model, tokenizer), logits(one, tokenizer), atol=1e-3)
    model.rollback(adapter_name="b")
    model.rollback(adapter_name="b")
    assert model.edits == PARENTS
    plain = PeftModel.from_pretrained(tiny_model("llama"), child)
    assert plain.peft_config["default"].r == 4


def test_a_pack_without_its_parents_is_refused(chain, packs, tokenizer):
    child = chain[1]
    sentence = r"this pack stands on pack 'parent' \(2 edits, digest \w{8}\), which is not loaded"
    with pytest.raises(ValueError, match=sentence):
        load(child, tokenizer)
    model = load(packs[0], tokenizer)
    with pytest.raises(ValueError, match=sentence):
        model.load_adapter(child, "b")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="missing_parents='no' is unknown"):
        model.load_adapter(child, "b", missing_parents="no")
    with pytest.warns(UserWarning, match=sentence):
        model.load_adapter(child, "b", missing_parents="warn")
    with pytest.warns(UserWarning, match=sentence):
        alone = load(child, tokenizer, missing_parents="warn")
    assert alone.edits == CHILDREN
    with pytest.raises(ValueError, match=r"made on top of pack 'parent' .*, which is not active"):
        alone.edit([BORN], progress=False)
    with pytest.raises(ValueError, match=r"made on top of pack 'parent' .*, which is not active"):
        alone.repour()


def test_parents_come_first(chain, tokenizer):
    parent, child = chain
    model = load(parent, tokenizer)
    model.add_adapter("other")
    model.set_adapter("other")
    with pytest.raises(ValueError, match="loaded as 'default' but not active before it"):
        model.load_adapter(child, "b")
    model.set_adapter("default")
    model.load_adapter(child, "b")
    for names in ("b", ["b", "default"], ["other", "b"]):
        with pytest.raises(ValueError, match=r"'b' stands on .* but not active before it"):
            model.set_adapter(names)
    model.set_adapter(["default", "b"])


def test_what_is_no_pack_cannot_be_edited_beside(packs, tokenizer, tmp_path):
    model = load(packs[0], tokenizer)
    model.load_adapter(save_lora(tmp_path / "plain"), "style")
    model.set_adapter(["default", "style"])
    with pytest.raises(RuntimeError, match="'style' is active and no pack of edits"):
        model.edit([BORN], into="default", progress=False)
    with pytest.raises(RuntimeError, match="adapter 'style' is a plain LoRA"):
        model.edit([BORN], into="style", progress=False)


def test_an_edit_in_both_packs_is_refused(tokenizer):
    model = double(tokenizer)
    model.edit([BORN], progress=False)
    model.add_adapter("b")
    model.set_adapter("b")
    model.edit([BORN], progress=False)
    model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"\['born'\] are both in 'b' and in 'default'"):
        model.edit([EDITS[0]], into="b", progress=False)


def spoil(folder: Path) -> None:
    """Give a plain LoRA's second module another shape."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[-1]
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, file)


def test_a_load_that_fails_leaves_the_model_as_it_was(packs, tokenizer, tmp_path):
    targets = ["down_proj", "q_proj"]
    plain = save_lora(tmp_path / "plain", target_modules=targets)
    spoil(plain)
    model = load(packs[0], tokenizer)
    before, names = weights(model), [name for name, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(plain), "plain")
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_modules()] == names
    assert same_bits(weights(model), before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(plain), "default")
    assert same_bits(weights(model), before)
    assert model.edits == EDITS[:1]
    model.load_adapter(packs[1], "plain")
    model.unload()


def test_a_taken_name_or_unknown_type_leaves_the_model_as_it_was(packs, tokenizer):
    model = load(packs[0], tokenizer)
    before = weights(model)
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default")
    with pytest.raises(ValueError, match=r"[Tt]arget modules"):
        model.add_adapter("b", LoraConfig(target_modules=["nothing"], task_type="CAUSAL_LM"))
    assert same_bits(weights(model), before)
    assert model.edits == EDITS[:1]


def test_a_pack_of_another_rank_replaces_an_adapter(packs, tokenizer):
    model = load(packs[0], tokenizer)
    for folder in (packs[1], packs[0]):
        model.load_adapter(folder, "default")
        alone = load(folder, tokenizer)
        assert model.edits == alone.edits
        assert torch.equal(logits(model, tokenizer), logits(alone, tokenizer))
        assert model.peft_config["default"].r == len(alone.edits)


def test_a_pack_of_other_layers_does_not_replace_an_adapter(packs, tokenizer, tmp_path):
    other = wrap(tiny_model("llama"), tokenizer, rewrite_layers=[0])
    other.edit(EDITS[:1], progress=False)
    other.save_pretrained(tmp_path / "layer 0")
    model = load(packs[0], tokenizer)
    with pytest.raises(
        ValueError, match=r"adapter 'default' changes .* load it under another name"
    ):
        model.load_adapter(tmp_path / "layer 0", "default")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_after_a_hotswap_the_model_says_that_it_knows_no_edits(packs, tokenizer, order):
    first, second = (packs[i] for i in order)
    model = load(first, tokenizer)
    hotswap_adapter(model, str(second), "default")
    assert torch.allclose(
        logits(model, tokenizer), logits(load(second, tokenizer), tokenizer), atol=1e-5
    )
    for use in (
        lambda: model.edits,
        lambda: model.records,
        model.to_pack,
        lambda: model.edit([BORN], progress=False),
        model.rollback,
    ):
        with pytest.raises(RuntimeError, match="factors of adapter 'default' are not those"):
            use()
    model.load_adapter(second, "default")
    assert model.edits == load(second, tokenizer).edits
    model.edit([BORN], progress=False)


def test_after_training_the_model_says_that_it_knows_no_edits(packs, tokenizer):
    model = load(packs[0], tokenizer)
    model.set_adapter("default")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="hotswap_adapter, training or something else"):
        _ = model.edits


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_the_model_rounds_the_base_and_not_the_factors(packs, tokenizer, cast, tmp_path):
    model = load(packs[1], tokenizer)
    before = model.factors
    assert model.to(cast) is model
    assert model.dtype == cast
    for layer, delta in model.factors.items():
        assert torch.equal(delta.A, before[layer].A)
        assert torch.equal(delta.B, before[layer].B)
    other = AlphaEditModel.from_pretrained(
        tiny_model("llama", cast), packs[1], allow_base_mismatch=cast == torch.float16
    )
    assert torch.equal(logits(model, tokenizer), logits(other, tokenizer))
    assert model.edits == EDITS[1:]
    model.save_pretrained(tmp_path / "again")
    digests = {EditPack.from_pretrained(f).digest() for f in (packs[1], tmp_path / "again")}
    assert len(digests) == 1
    model.edit([BORN], progress=False)
    assert model.double().factors[0].A.dtype == torch.float64
    assert len(model.edits) == 4


def test_a_pack_loaded_with_little_memory_keeps_its_factors_in_float32(packs, tokenizer):
    model = AlphaEditModel.from_pretrained(tiny_model("llama", torch.bfloat16), packs[0])
    model.load_adapter(packs[1], "b", low_cpu_mem_usage=True)
    exact = EditPack.from_pretrained(packs[1])
    assert model.to_pack("b").digest() == exact.digest()


def test_a_compressed_pack_is_used_but_not_edited(packs, tokenizer, tmp_path):
    EditPack.from_pretrained(packs[1]).compress(rank=2).save_pretrained(tmp_path / "small")
    model = load(tmp_path / "small", tokenizer)
    assert model.edits == EDITS[1:]
    model.save_pretrained(tmp_path / "again")
    assert EditPack.from_pretrained(tmp_path / "again").compression is not None
    for change in (lambda: model.edit([BORN], progress=False), model.rollback):
        with pytest.raises(ValueError, match="compressed from 3 rows"):
            change()
    model.add_adapter("b")
    model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="one cannot edit on top"):
        model.edit([BORN], into="b", progress=False)


def test_a_merged_pack_is_neither_replaced_nor_deleted(packs, tokenizer):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    model.merge()
    merged = logits(model, tokenizer)
    for change in (partial(model.load_adapter, packs[1]), model.delete_adapter):
        with pytest.raises(ValueError, match=r"'default' is merged into the base .* unmerge"):
            change("default")
        assert torch.equal(logits(model, tokenizer), merged)
        assert model.edits == EDITS[:1]
    model.unmerge()
    model.load_adapter(packs[1], "default")
    assert model.edits == EDITS[1:]
    assert torch.equal(logits(model, tokenizer), logits(load(packs[1], tokenizer), tokenizer))


def test_what_acts_after_a_deletion_is_the_same_in_all_layers(packs, tokenizer):
    model = load(packs[0], tokenizer)
    with torch.random.fork_rng():
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        model.add_adapter("style", lora)
    model.load_adapter(packs[1], "b")
    with pytest.warns(UserWarning, match="'default' was active; now 'b' is"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert model.edits == EDITS[1:]
    assert torch.equal(logits(model, tokenizer), logits(load(packs[1], tokenizer), tokenizer))
    model.delete_adapter("style")
    with pytest.raises(ValueError, match=r"'b' cannot be deleted from \['b'\].*unload"):
        model.delete_adapter("b")
    with pytest.raises(ValueError, match=r"'c' cannot be deleted from \['b'\]"):
        model.delete_adapter("c")


def test_edits_are_those_of_the_merged_pack_whichever_is_active(packs, tokenizer, tmp_path):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    model.merge_adapter(["b"])
    assert (model.active_adapters, model.edits) == (["default"], EDITS[1:])
    model.save_pretrained(tmp_path)
    assert EditPack.from_pretrained(tmp_path).edits == EDITS[1:]
    model.unmerge()
    assert model.edits == EDITS[:1]
    model.unload()
    assert model.edits == []


def test_an_adapter_that_peft_itself_deleted_is_forgotten(packs, tokenizer):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    model.base_model.delete_adapter("b")
    model.edit(EDITS[1:2], progress=False)
    assert model.edits == EDITS[:2]
    model.add_adapter("b", LoraConfig(target_modules=["down_proj"]))
    model.set_adapter("b")
    assert model.edits == []


def test_a_merge_outlives_a_load_that_fails_but_not_another_adapter(packs, tokenizer, tmp_path):
    model = load(packs[0], tokenizer)
    model.load_adapter(packs[1], "b")
    wanted = logits(load(packs[1], tokenizer), tokenizer)
    model.merge()
    merged = logits(model, tokenizer)
    plain = save_lora(tmp_path)
    (plain / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="Unmerging"), pytest.raises(Exception, match="header"):
        model.load_adapter(plain, "style")
    assert model.merged
    assert torch.equal(logits(model, tokenizer), merged)
    with model.disable_adapter():
        model.set_adapter("b")
    assert not model.merged
    assert model.edits == EDITS[1:]
    assert torch.equal(logits(model, tokenizer), wanted)
