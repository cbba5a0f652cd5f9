"""The code that loads a pack, for its card: alone, or with the packs that it stands on.

In: where the pack lies, and its parents. Out: Markdown with Python that runs once the base is
loaded. A pack on top of others acts as it was made only where those act too, so that they are
loaded first; where they lie is not known, hence the placeholders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PARENT = "path/or/repository/of/parent"

_ALONE = """\
Then the adapter. With PEFT alone, as any LoRA:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, {place}{inside})
```

With transformers alone: `base.load_adapter({place}{adapter_kwargs})`.

With `alphaedit_peft`, {purpose}:

```python
from alphaedit_peft import AlphaEditModel, EditPack

print(EditPack.from_pretrained({place}{inside}).summary())
model = AlphaEditModel.from_pretrained(base, {place}{inside})
```
"""
_ABOVE = """\
This adapter was made on top of {parents}, and acts as it was made only beside {them}. Load {them}
first. With PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, {first}, adapter_name="parent1")
{peft}
```

With `alphaedit_peft`, {purpose}:

```python
from alphaedit_peft import AlphaEditModel, EditPack

print(EditPack.from_pretrained({place}{inside}).summary())
model = AlphaEditModel.from_pretrained(base, {first}, adapter_name="parent1")
{own}
```
"""


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
    purpose = "to look at the edits" if mixed else "to look at the edits, and to go on from them"
    words = {
        "place": json.dumps(place),
        "inside": inside and f", {inside}",
        "purpose": purpose,
    }
    if not parents:
        kwargs = inside and f", adapter_kwargs=dict({inside})"
        return _ALONE.format(adapter_kwargs=kwargs, **words)
    lines: list[str] = []
    names = [f"parent{i + 1}" for i in range(len(parents))]
    for i, name in enumerate(names[1:], start=1):
        lines += [f'model.load_adapter("{PARENT}{i + 1}", "{name}")', _activate(names[: i + 1])]
    lines += [f'model.load_adapter({words["place"]}, "edits"{words["inside"]})']
    lines += [_activate([*names, "edits"])]
    own = "\n".join(lines)
    return _ABOVE.format(
        parents=named,
        them="it" if len(parents) == 1 else "them",
        first=json.dumps(f"{PARENT}1"),
        peft=own.replace("model.set_adapter", "model.base_model.set_adapter"),
        own=own,
        **words,
    )


def _activate(names: Sequence[str]) -> str:
    return f"model.set_adapter({json.dumps(list(names))})"
