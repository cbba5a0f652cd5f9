"""The code that loads a pack, for its card: alone, or with the packs that it stands on.

In: where the pack lies, and its parents. Out: Python that runs once the base is loaded, by itself
or in Markdown. A pack on top of others acts as it was made only where those act too, so that they
are loaded first; where they lie is not known, hence the placeholders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PARENT = "path/or/repository/of/parent"

_PEFT = """\
from peft import PeftModel

model = PeftModel.from_pretrained(base, {first}{where})"""
_OWN = """\
from alphaedit_peft import AlphaEditModel, EditPack

print(EditPack.from_pretrained({place}{inside}).summary())
model = AlphaEditModel.from_pretrained(base, {first}{where})"""

_ALONE = """\
Then the adapter. With PEFT alone, as any LoRA:

```python
{code.peft}
```

With transformers alone: `base.load_adapter({place}{adapter_kwargs})`.

With `alphaedit_peft`, {purpose}:

```python
{code.own}
```
"""
_ABOVE = """\
This adapter was made on top of {parents}, and acts as it was made only beside {them}. Load {them}
first. With PEFT alone:

```python
{code.peft}
```

With `alphaedit_peft`, {purpose}:

```python
{code.own}
```
"""


@dataclass(frozen=True)
class Code:
    """Python that loads a pack, with its parents, onto ``base``.

    Args:
        peft: with PEFT alone.
        own: with this package.
    """

    peft: str
    own: str


def loading(place: str, inside: str, parents: Sequence[Mapping[str, Any]]) -> Code:
    """The code that loads a pack, after the packs that it stands on.

    Args:
        place: the pack's path or repository.
        inside: ``subfolder="..."``, or empty.
        parents: that it stands on, as it records them; where they lie is left to fill in.
    """
    words = {"place": json.dumps(place), "inside": inside and f", {inside}"}
    if not parents:
        words |= {"first": words["place"], "where": words["inside"]}
        return Code(_PEFT.format(**words), _OWN.format(**words))
    words |= {"first": json.dumps(f"{PARENT}1"), "where": ', adapter_name="parent1"'}
    lines: list[str] = []
    names = [f"parent{i + 1}" for i in range(len(parents))]
    for i, name in enumerate(names[1:], start=1):
        lines += [f'model.load_adapter("{PARENT}{i + 1}", "{name}")', _activate(names[: i + 1])]
    lines += [f'model.load_adapter({words["place"]}, "edits"{words["inside"]})']
    lines += [_activate([*names, "edits"])]
    rest = "\n".join(["", *lines])
    with_peft = rest.replace("model.set_adapter", "model.base_model.set_adapter")
    return Code(_PEFT.format(**words) + with_peft, _OWN.format(**words) + rest)


def use(
    place: str, inside: str, parents: Sequence[Mapping[str, Any]], named: str, *, mixed: bool
) -> str:
    """How to load a pack.

    Args:
        place: the pack's path or repository.
        inside: ``subfolder="..."``, or empty.
        parents: that it stands on, as it records them.
        named: the parents in words that Markdown shows as they are.
        mixed: whether it was compressed to a lower rank, so that editing cannot go on from it.
    """
    words = {
        "code": loading(place, inside, parents),
        "purpose": "to look at the edits" + ("" if mixed else ", and to go on from them"),
    }
    if parents:
        return _ABOVE.format(parents=named, them="it" if len(parents) == 1 else "them", **words)
    kwargs = inside and f", adapter_kwargs=dict({inside})"
    return _ALONE.format(place=json.dumps(place), adapter_kwargs=kwargs, **words)


def _activate(names: Sequence[str]) -> str:
    return f"model.set_adapter({json.dumps(list(names))})"
