"""``python -m alphaedit_peft.cli`` is ``alphaedit``."""

from alphaedit_peft.cli import main

main()
