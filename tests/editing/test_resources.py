"""Statistics: their provenance, and what happens when they or the settings are exchanged."""

from __future__ import annotations

import json

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, NullSpace
from alphaedit_peft.editing.resources import Resources
from alphaedit_peft.fingerprint import BaseFingerprint
from alphaedit_peft.nullspace import KeyMoments
from alphaedit_peft.settings import PRESETS

BASE = BaseFingerprint({}, None, 1)


def moments(seed: int = 0) -> KeyMoments:
    keys = torch.randn(200, 6, generator=torch.Generator().manual_seed(seed))
    return KeyMoments({1: keys.T @ keys / 200}, 200, {1: "m"})


def settings(**changes) -> AlphaEditConfig:
    values = {"rewrite_layers": [1], "ridge": 0.1, "moment_weight": 10.0, "history": False}
    filled = PRESETS["auto"] | {"threshold": None, "threshold_mode": None}
    return AlphaEditConfig(**(filled | values | changes))


def test_provenance_of_a_null_space():
    space = NullSpace.identity({1: 6})
    resources = Resources(null_space=space)
    assert resources.provenance() is None
    resources.find_metric(settings(), BASE)
    wanted = {"digest": space.digest(), "tokens": 0, "threshold": 0.0, "mode": "rank"}
    assert resources.provenance() == wanted


def test_provenance_of_key_moments():
    found = {}
    for seed in (0, 1):
        resources = Resources(key_moments=moments(seed))
        resources.find_metric(settings(objective="memit"), BASE)
        found[seed] = json.loads(json.dumps(resources.provenance()))
        assert found[seed] == {
            "digest": moments(seed).digest(),
            "tokens": 200,
            "threshold": None,
            "mode": None,
            "moment_weight": 10.0,
        }
    assert found[0]["digest"] != found[1]["digest"]


def test_a_projection_is_part_of_memits_provenance():
    digests = set()
    for projection in (False, True):
        resources = Resources(None, NullSpace.identity({1: 6}), moments())
        resources.find_metric(settings(objective="memit", projection=projection), BASE)
        digests.add(resources.provenance()["digest"])
    assert len(digests) == 2
    assert resources.provenance()["mode"] == "rank"


def test_the_metric_is_made_once():
    resources, config = Resources(null_space=NullSpace.identity({1: 6})), settings()
    assert resources.find_metric(config, BASE) is resources.find_metric(config, BASE)


@pytest.mark.parametrize("name", ["ridge", "null_space", "key_moments"])
def test_what_is_exchanged_takes_effect(name):
    resources = Resources(None, NullSpace.identity({1: 6}), moments())
    config = settings(objective="memit" if name == "key_moments" else "alphaedit")
    before = resources.find_metric(config, BASE)
    if name == "ridge":
        config.ridge = 7.0
    else:
        other = moments(1) if name == "key_moments" else NullSpace.identity({1: 6})
        setattr(resources, name, other)
    after = resources.find_metric(config, BASE)
    assert after is not before
    if name == "ridge":
        assert after.ridge_value == 7.0
    elif name == "null_space":
        assert after.null_space is resources.null_space
    else:
        assert after.moments is resources.key_moments
