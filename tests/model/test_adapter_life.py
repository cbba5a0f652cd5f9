"""The life of adapters: whatever is called in whatever order, against an oracle of plain tensors.

A state machine edits, loads, merges, copies, deletes; the oracle keeps the base weights W0 and the
update D of each adapter by module, as it was written. After each step the weights are W0, or
W0 + D of what is merged; the logits are those of a plain model with W0 + D of what is in force; and
``edits`` names the edits that are in it.
"""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig

from alphaedit_peft import AlphaEditConfig, AlphaEditModel, Edit, NullSpace, get_alphaedit_model
from alphaedit_peft.model import lora_layer

POOL = [
    Edit("France", "The capital of {} is", "Rome", id="france"),
    Edit("Anna", "{} was born in", "Ulm", id="born"),
    Edit("Anna", "{} works as a", "river", id="work"),
    Edit("Marie Curie", "{} was born in", "Paris", id="curie"),
    Edit("Albert Einstein", "{} works as a", "violin", id="einstein"),
    Edit("France", "The capital of {} is", "Ulm", id="other"),
]
REWRITE = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
TARGETS = {
    "beside": ["q_proj"],
    "the same": REWRITE,
    "both": [*REWRITE, "model.layers.2.mlp.down_proj", "model.layers.0.self_attn.v_proj"],
}
names = st.sampled_from(["default", "b", "c", "style"])
loaded = st.runner().flatmap(lambda life: st.sampled_from(sorted(life.oracle.adapters)))
active = st.runner().flatmap(lambda life: st.sampled_from(sorted(life.oracle.active)))
several = st.lists(loaded, min_size=1, max_size=3, unique=True)
Deltas = dict[str, Tensor]  # by module: (d_out, d_in)


@dataclass(frozen=True)
class Known:
    """What an adapter is: its update, its edits (None: not known), what it can be taken back to."""

    deltas: Deltas
    edits: tuple[Edit, ...] | None
    parents: bool = False
    before: tuple[Known, ...] = ()


@dataclass
class Oracle:
    """W0, and what was written."""

    weights: Mapping[str, Tensor]
    adapters: dict[str, Known] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: dict[str, list[str]] = field(default_factory=dict)

    def in_force(self, module: str) -> list[str]:
        there = [name for name in self.active if module in self.adapters[name].deltas]
        return self.merged.get(module) or there

    def total(self, module: str, adapters: list[str]) -> Tensor:
        weight = self.weights[f"{module}.weight"]
        for name in adapters:
            weight = weight + self.adapters[name].deltas[module]
        return weight

    @property
    def modules(self) -> list[str]:
        return sorted({module for known in self.adapters.values() for module in known.deltas})

    @property
    def edits(self) -> list[Edit]:
        known = [self.adapters[name].edits or () for name in self.in_force(REWRITE[0])]
        return [edit for edits in known for edit in edits]


class AdapterLife(RuleBasedStateMachine):
    def __init__(self, tokenizer, folder: Path) -> None:
        super().__init__()
        self.tokenizer, self.folder = tokenizer, folder
        self.slots: dict[int, Known] = {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
            config = LlamaConfig(**sizes, **heads, **ids, initializer_range=0.2)
            self.plain = AutoModelForCausalLM.from_config(config).eval()
        self.plain.lm_head.requires_grad_(False)
        self.ids = tokenizer(["The capital of France is"], return_tensors="pt").input_ids

    @initialize()
    def begin(self) -> None:
        self.base = copy.deepcopy(self.plain)
        self.config = AlphaEditConfig(
            rewrite_layers=[0, 1], steps=2, ridge=1e-3, contexts=[], on_conflict="replace"
        )
        self.space = NullSpace.identity({0: 24, 1: 24})
        self.model = get_alphaedit_model(
            self.base, self.config, tokenizer=self.tokenizer, null_space=self.space
        )
        weights = {name: value.clone() for name, value in self.plain.state_dict().items()}
        self.oracle = Oracle(weights)
        self.note("default", edits=())
        self.oracle.active, self.age = ["default"], 0
        self.edit_in("default", POOL[:2])
        self.add_pack("b")
        self.set_adapter(["b"])
        self.edit_in("b", POOL[3:4])
        self.add_plain("style", "both", 0)
        self.save("default", 0)
        self.save("b", 1)

    # what is known of the model

    def read(self, name: str) -> Deltas:
        found = {}
        for module, layer in lora_layer.lora_layers(self.model.get_base_model()).items():
            if name in layer.lora_A:
                A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                found[module] = (B @ A) * layer.scaling[name]
        return found

    def note(self, name: str, **known) -> None:
        self.oracle.adapters[name] = Known(self.read(name), **known)

    def known(self, name: str) -> Known:
        return self.oracle.adapters.get(name, Known({}, None))

    @property
    def merged(self) -> bool:
        return any(self.oracle.merged.values())

    def editable(self, name: str) -> bool:
        """Whether edits must be possible; beside others it depends on who stands on whom."""
        known = self.known(name)
        return known.edits is not None and not known.parents and self.oracle.active == [name]

    # edits

    def change(self, name: str, call) -> bool:
        """Call what changes an adapter's edits; refused, all is as it was."""
        known = self.known(name)
        possible = known.edits is not None and name in self.oracle.active and not self.merged
        try:
            call()
        except (ValueError, RuntimeError):
            assert not (self.editable(name) and not self.merged)
            return False
        assert possible
        return True

    @rule(name=active, picked=st.lists(st.sampled_from(POOL), min_size=1, max_size=2, unique=True))
    def edit(self, name: str, picked: list[Edit]) -> None:
        if len({edit.question for edit in picked}) == len(picked):
            self.edit_in(name, picked)

    def edit_in(self, name: str, picked: list[Edit]) -> None:
        known = self.known(name)
        made = []

        def call() -> None:
            made.extend(self.model.edit(picked, into=name, progress=False).made)

        if not self.change(name, call) or not made:
            return
        new = [result.edit for result in made]
        asked = {edit.question for edit in new}
        left = tuple(edit for edit in known.edits if edit.question not in asked)
        stands = known.parents or len(self.oracle.active) > 1
        before = (*known.before, replace(known, before=()))
        self.note(name, edits=(*left, *new), parents=stands, before=before)

    @rule(name=active, data=st.data())
    def remove(self, name: str, data) -> None:
        known = self.known(name)
        gone = data.draw(st.lists(st.sampled_from(POOL), max_size=2, unique=True))
        gone = [edit for edit in gone if edit in (known.edits or ())]
        ids = [edit.id for edit in gone]
        if self.change(name, lambda: self.model.remove_edits(ids, adapter_name=name)):
            left = tuple(edit for edit in known.edits if edit not in gone)
            self.note(name, edits=left, parents=known.parents or len(self.oracle.active) > 1)

    @rule(name=active, together=st.booleans())
    def repour(self, name: str, together: bool) -> None:
        known = self.known(name)
        pour = partial(self.model.repour, together=together, adapter_name=name)
        if self.change(name, pour):
            stands = known.parents or len(self.oracle.active) > 1
            self.note(name, edits=known.edits, parents=stands)

    @rule(name=active)
    def rollback(self, name: str) -> None:
        known = self.known(name)
        if not known.before:
            return
        if self.change(name, lambda: self.model.rollback(adapter_name=name)):
            *before, last = known.before
            self.oracle.adapters[name] = replace(last, before=tuple(before))

    # adapters

    @rule(name=names)
    def add_pack(self, name: str) -> None:
        if name in self.oracle.adapters:
            with pytest.raises(ValueError, match="already exists"):
                self.model.add_adapter(name)
        else:
            self.model.add_adapter(name)
            self.note(name, edits=())
            self.oracle.merged = {}  # PEFT unmerges, and says so

    @rule(name=names, where=st.sampled_from(sorted(TARGETS)), seed=st.integers(0, 3))
    def add_plain(self, name: str, where: str, seed: int) -> None:
        if name in self.oracle.adapters:
            return
        lora = LoraConfig(r=2, target_modules=TARGETS[where], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model.add_adapter(name, lora)
        self.note(name, edits=None)
        self.oracle.merged = {}

    @rule(name=loaded)
    def delete(self, name: str) -> None:
        oracle, merged = self.oracle, any(name in found for found in self.oracle.merged.values())
        try:
            self.model.delete_adapter(name)
        except ValueError:
            alone = list(oracle.adapters) == [name]
            assert merged or alone or len(oracle.active) > 1
            return
        assert not merged
        del oracle.adapters[name]
        left = [active for active in oracle.active if active != name]
        oracle.active = left or sorted(oracle.adapters)[:1]

    @rule(chosen=several)
    def set_adapter(self, chosen: list[str]) -> None:
        try:
            self.model.set_adapter(chosen if len(chosen) > 1 else chosen[0])
        except ValueError:
            assert any(self.known(name).parents for name in chosen)
            return
        self.oracle.active, self.oracle.merged = chosen, {}

    # disk

    @rule(name=loaded, slot=st.integers(0, 2))
    def save(self, name: str, slot: int) -> None:
        known = self.known(name)
        place = self.folder / str(slot)
        if known.edits is None:
            with pytest.raises((ValueError, RuntimeError)):
                self.model.save_pretrained(place, selected_adapters=[name])
        else:
            shutil.rmtree(place, ignore_errors=True)
            self.model.save_pretrained(place, selected_adapters=[name])
            self.slots[slot] = replace(known, before=())

    @precondition(lambda self: self.slots)
    @rule(name=names, data=st.data())
    def load(self, name: str, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        saved, merged = self.slots[slot], any(name in m for m in self.oracle.merged.values())
        known = self.known(name)
        try:
            self.model.load_adapter(self.folder / str(slot), name)
        except ValueError:
            other_place = set(known.deltas) - set(REWRITE)
            assert merged or saved.parents or other_place or len(self.oracle.active) > 1
            return
        assert not merged
        tensors = load_file(next((self.folder / str(slot)).rglob("adapter_model.safetensors")))
        deltas = {}
        for module in REWRITE:
            key = f"base_model.model.{module}.lora_{{}}.weight"
            deltas[module] = tensors[key.format("B")] @ tensors[key.format("A")]
        if name not in self.oracle.adapters:
            self.oracle.merged = {}
        self.oracle.adapters[name] = replace(saved, deltas=deltas)

    # merging

    @rule(how=st.sampled_from(["merge", "merge_adapter", "base_model.merge_adapter"]))
    def merge(self, how: str) -> None:
        self.merged_now(self.oracle.active)
        self.called(how)

    @rule(chosen=several)
    def merge_by_name(self, chosen: list[str]) -> None:
        self.merged_now(chosen)
        self.model.merge_adapter(chosen)

    @rule(how=st.sampled_from(["unmerge", "unmerge_adapter", "base_model.unmerge_adapter"]))
    def unmerge(self, how: str) -> None:
        self.called(how)
        self.oracle.merged = {}

    def called(self, how: str) -> None:
        target = self.model
        for part in how.split("."):
            target = getattr(target, part)
        target()

    def merged_now(self, chosen: list[str]) -> None:
        for module in self.oracle.modules:
            found = self.oracle.merged.setdefault(module, [])
            found += [
                name
                for name in chosen
                if module in self.oracle.adapters[name].deltas and name not in found
            ]

    @rule()
    def disable(self) -> None:
        with self.model.disable_adapter():
            assert torch.equal(self.logits(self.model), self.logits(self.plain))
            self.weights_are({})

    @rule(chosen=several)
    def switch_while_disabled(self, chosen: list[str]) -> None:
        active, merged = self.oracle.active, self.oracle.merged
        with self.model.disable_adapter():
            self.set_adapter(chosen)
        if self.oracle.active == active:
            self.oracle.merged = merged

    # copies, and the end

    @rule()
    def deepcopy(self) -> None:
        other = copy.deepcopy(self.model)
        self.model.unload()
        self.model = other

    @rule()
    def pickle(self) -> None:
        file = io.BytesIO()
        torch.save(self.model, file)
        self.model.unload()
        file.seek(0)
        self.model = torch.load(file, weights_only=False)
        assert type(self.model) is AlphaEditModel

    @precondition(lambda self: self.age > 30)
    @rule()
    def unload(self) -> None:
        base = self.model.unload()
        assert_bits(dict(base.named_parameters()), dict(self.plain.named_parameters()))
        assert flags(base) == flags(self.plain)
        assert self.model.edits == []
        self.begin()

    @precondition(lambda self: self.age > 30)
    @rule()
    def merge_and_unload(self) -> None:
        self.oracle.merged = {}
        wanted = self.wanted()
        base = self.model.merge_and_unload()
        assert torch.allclose(self.logits(base), wanted, atol=1e-4)
        assert flags(base) == flags(self.plain)
        self.begin()

    # what always holds

    def logits(self, model) -> Tensor:
        with torch.no_grad():
            return model(input_ids=self.ids).logits

    def wanted(self) -> Tensor:
        oracle = self.oracle
        weights = dict(oracle.weights)
        for module in oracle.modules:
            weights[f"{module}.weight"] = oracle.total(module, oracle.in_force(module))
        with torch.no_grad():
            return functional_call(self.plain, weights, kwargs={"input_ids": self.ids}).logits

    def weights_are(self, merged: Mapping[str, list[str]]) -> None:
        base = self.model.get_base_model()
        for name, weight in base.named_parameters():
            if ".lora_" in name:
                continue
            bare = name.replace(".base_layer", "")
            module = bare.removesuffix(".weight")
            if merged.get(module):
                wanted = self.oracle.total(module, merged[module])
                assert torch.allclose(weight, wanted, atol=1e-5), bare
            else:
                assert torch.equal(weight, self.oracle.weights[bare]), bare
            assert not weight.requires_grad

    @invariant()
    def all_is_as_said(self) -> None:
        oracle = self.oracle
        self.age += 1
        self.weights_are(oracle.merged)
        assert torch.allclose(self.logits(self.model), self.wanted(), atol=1e-4)
        found = [edit.id for edit in self.model.edits]  # one solved anew with another comes last
        assert sorted(found) == sorted(edit.id for edit in oracle.edits)
        assert self.model.merged == self.merged
        assert self.model.active_adapters == oracle.active
        assert list(self.model.peft_config) == list(oracle.adapters)
        for name, known in oracle.adapters.items():
            for module, delta in self.read(name).items():
                assert torch.equal(delta, known.deltas[module]), (name, module)


def flags(model) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def assert_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("lives", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_after_every_step_the_model_is_what_its_adapters_say(lives, tokenizer, tmp_path):
    chosen = settings(
        max_examples=lives,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(partial(AdapterLife, tokenizer, tmp_path), settings=chosen)
