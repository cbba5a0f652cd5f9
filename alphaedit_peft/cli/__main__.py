"""``python -m alphaedit_peft.cli`` is ``alphaedit``."""

from alphaedit_peft.cli import app

app(prog_name="alphaedit")
