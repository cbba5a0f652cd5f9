"""Settings: what each field says of itself, what the presets fill, and what is settled."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from alphaedit_peft import AlphaEditConfig
from alphaedit_peft.settings import PRESETS, TYPES, EditOptions, Range, Settings, about
from tests.conftest import ROOT, tiny_model

FIELDS = {field.name: field for field in fields(EditOptions)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_says_what_it_is_for_and_what_it_may_hold(name):
    field = FIELDS[name]
    allowed = field.metadata["allowed"]
    assert about(name) == field.metadata["help"]
    assert about(name)
    values = (field.default, *field.metadata["filled"])
    if isinstance(allowed, tuple):
        assert set(values) <= set(allowed)
    elif isinstance(allowed, Range):
        for value in values:
            allowed.check(name, value, whole="int" in field.type)
    elif allowed is None:
        assert all(isinstance(value, TYPES[name]) for value in values)
    else:
        assert name == "memory_budget"


def test_presets_fill_the_same_settings():
    assert set(PRESETS) == set(FIELDS["preset"].metadata["allowed"])
    assert set(PRESETS["auto"]) == set(PRESETS["paper"])
    assert all(FIELDS[name].default is None for name in PRESETS["auto"])
    open_ = [(preset, name) for preset, found in PRESETS.items() for name in found]
    assert [(p, n) for p, n in open_ if PRESETS[p][n] is None] == [("auto", "moment_weight")]
    assert PRESETS["auto"] == {
        "moment_weight": None,
        "ridge": 0.05,
        "ridge_mode": "relative",
        "norm_guard": 2.0,
        "threshold": 0.02,
        "threshold_mode": "energy",
        "steps": 25,
        "learning_rate": 0.15,
        "learning_rate_mode": "relative",
        "clamp_factor": 1.0,
        "stop_loss": 0.2,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_config_settles(preset):
    full, _ = AlphaEditConfig(preset=preset).resolve(tiny_model("llama"))
    settings = Settings.of(full)
    assert settings.to_json() == full.to_json()
    full.ridge = 7.0
    full.rewrite_layers.append(3)
    assert (settings.ridge, settings.rewrite_layers) == (PRESETS[preset]["ridge"], [0, 1])


def test_settings_refuse_what_is_open():
    with pytest.raises(ValueError, match=r"\['rewrite_layers', 'ridge', .*open"):
        Settings.of(AlphaEditConfig())
    full, _ = AlphaEditConfig().resolve(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"\['steps'\] are open; take what AlphaEditConfig.resol"):
        Settings.of(replace(full, steps=None))


def test_a_null_space_may_bring_the_threshold():
    full, _ = AlphaEditConfig().resolve(tiny_model("llama"))
    assert Settings.of(replace(full, threshold=None, threshold_mode=None)).threshold is None


def test_settings_need_no_torch():
    code = (
        "import sys, alphaedit_peft.settings as s; s.EditOptions()\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_docs_table_is_of_these_fields():
    page = runpy.run_path(str(ROOT / "docs" / "figures" / "settings_table.py"))["page"]
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page(), "run docs/figures/settings_table.py docs/settings.md"


def test_what_is_settled_stays():
    full, _ = AlphaEditConfig(rewrite_layers=[0]).resolve(tiny_model("llama"))
    settled = Settings.of(full)
    with pytest.raises(AttributeError, match="ridge is settled; change it in the options"):
        settled.ridge = 1.0
