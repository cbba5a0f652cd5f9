"""What must come of a mutated artefact.

In: a kind's name and a case's number, which alone decide the mutation. Out: "loaded" or "refused":
a file that is refused raises a ValueError or OSError of one sentence that names the file. Anything
else is an AssertionError, or the wrong exception itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.kinds import KINDS
from tests.fuzz.mutations import mutated

LONGEST = 400  # characters of an error
HUGE = 3 * 2**30  # bytes of a file that is mostly a hole
SEEDS = Path(__file__).parent / "seeds"


class Trial:
    """A valid artefact of one kind in a temporary folder, and what becomes of its mutations."""

    def __init__(self, name: str) -> None:
        self.name, self.kind = name, KINDS[name]

    def __enter__(self) -> Trial:
        self._place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.folder = self._place / "artefact"
        self.folder.mkdir()
        self.kind.make(self.folder)
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".md")
        self.files = {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in sorted(files)}
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._place)

    def case(self, number: int) -> str:
        """Change a file as the number says, and see; the valid file is put back."""
        draw = Random(f"{self.name} {number}")
        name = draw.choice([*self.files])
        if draw.random() < 0.03:
            return self._replaced(name, lambda path: _strange(path, draw, self.kind.pipes))
        return self.with_file(name, mutated(name, self.files[name], draw))

    def with_file(self, name: str, data: bytes) -> str:
        """The outcome where one of the files has other bytes."""
        return self._replaced(name, lambda path: path.write_bytes(data))

    def _replaced(self, name: str, write: Callable[[Path], object]) -> str:
        path = self.folder / name
        path.unlink()
        try:
            write(path)
            return self.outcome()
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(self.files[name])
            shutil.rmtree(self._place / "again", ignore_errors=True)

    def outcome(self) -> str:
        """ "loaded" or "refused"; anything else is raised."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                self.kind.read(self.folder, self._place / "again")
                found = "loaded"
            except (ValueError, OSError) as error:
                text = str(error)
                names = {Path(name).name for name in self.files} | {str(self.folder)}
                assert len(text) <= LONGEST, f"{len(text)} characters: {text[:300]}"
                if not any(name in text for name in names):
                    raise
                found = "refused"
        assert len(told) <= 2, [str(warning.message) for warning in told]
        return found


def _strange(path: Path, draw: Random, pipes: bool) -> None:
    """Something else than a plain file in its place."""
    kind = draw.choice((0, 1, 2, 3, 5) if pipes else range(6))
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("/etc/passwd")
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, HUGE)
