"""Write docs/settings.md, the table of all settings, from the fields themselves.

python docs/figures/settings_table.py docs/settings.md
"""

import argparse
from dataclasses import Field, fields
from pathlib import Path

from alphaedit_peft.settings import EditOptions, Range

HEAD = """# Settings

Every field of `AlphaEditConfig`, as the code has it; on the command line `--set name=value`.
Where two values stand under default, the first is that of `preset="auto"` and the second that of
`preset="paper"`, taken where the field is left at None; the paper's three models have their own
`rewrite_layers`, `moment_weight`, `steps` and `learning_rate`. How `auto` came to its values, and
when to change them: [settings for a new model](tuning.md).

"""


def row(field: Field) -> list[str]:
    """Name, default or presets, what is allowed, what for, source."""
    known, allowed = field.metadata, field.metadata["allowed"]
    values = known["filled"] or (field.default,)
    default = [f"`{value!r}`" for value in dict.fromkeys(values)]
    if isinstance(allowed, tuple):
        words = ", ".join(f"`{choice}`" for choice in allowed if choice is not None)
    elif isinstance(allowed, Range):
        words = f"{allowed}{', whole' * ('int' in field.type)}"
    else:
        words = allowed or field.type
    cells = [f"`{field.name}`", ", ".join(default), words, known["help"], known["source"]]
    return [cell.replace(" | None", " or None").replace("|", "\\|") for cell in cells]


def page() -> str:
    """The page's text."""
    head = ["setting", "default", "allowed", "what for", "source"]
    lines = [head, ["---"] * len(head), *(row(field) for field in fields(EditOptions))]
    return HEAD + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.parse_args().out.write_text(page(), encoding="utf-8")
