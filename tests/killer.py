"""Commands killed at random moments, and what must hold afterwards; a driver for tests and by hand.

    python -m tests.killer --kills 500 --seed 1

For each kill a command is started in a folder of its own and sent SIGTERM, SIGINT or SIGKILL at a
random moment of the time that it takes. Then: what is there loads; nothing but the output is there
after the first two; one line and the right status, never a traceback. It may be killed again on the
way. At last it runs to its end: the output is that of a run that nobody killed, and nothing else is
left, in its folder or in the one for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphaedit_peft import EditPack, NullSpace, embedded, write_edits
from alphaedit_peft.edits import Edit
from tests.hub_server import HubServer, client_of

ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
SAID = {143: "alphaedit: terminated", 130: "alphaedit: interrupted"}
BEGINS = "from alphaedit_peft.cli import main; main()"
EDITS, BATCH = 6, 2


@dataclass(frozen=True)
class Command:
    """What is run, what it writes, and how that is compared."""

    words: tuple[object, ...]
    outputs: tuple[str, ...]  # names in its folder, once it ended
    kept: tuple[str, ...] = ()  # names that a stopped run may leave: what the next goes on from
    content: Callable[[Path], Any] = lambda place: files_in(place / "out")
    check: Callable[[Path], Any] = lambda place: None  # of what a stopped run left


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def whole_batches(place: Path) -> None:
    if (place / "out").exists():
        assert len(EditPack.from_pretrained(place / "out").edits) in range(0, EDITS + 1, BATCH)


def whole(place: Path) -> None:
    if (place / "out").exists():  # whole, and not written a second time
        needed = {"config.json", "model.safetensors", "tokenizer.json"}
        assert needed <= set(files_in(place / "out"))
        shutil.rmtree(place / "out")


def whole_space(place: Path) -> None:
    if (place / "out").exists():
        NullSpace.from_pretrained(place / "out")


def commands(given: Path, hub: HubServer) -> dict[str, Command]:
    """Every command that takes long or writes much, over inputs in ``given``."""
    space, pack = given / "ns", given / "pack"

    def pushed(place: Path) -> None:
        if "me/pack" in hub.repos and hub.repos["me/pack"].files().get("adapter_config.json"):
            EditPack.from_pretrained("me/pack")

    edit = ("edit", "embedded", given / "edits.jsonl", "--null-space", space)
    compare = ("compare", "embedded", "--edits", 4, "--batch-size", 2, "--every", 1)
    compare += ("--methods", "alphaedit", "--set", "alphaedit.steps=3")
    evaluate = ("evaluate", "embedded", "--pack", pack, "--data", "embedded")
    nullspace = ("nullspace", "embedded", "--texts", given / "texts.txt")
    return {
        "edit": Command(
            (*edit, "--batch-size", BATCH, "--steps", 3, "--out", "out"),
            ("out",),
            ("out",),
            check=whole_batches,
        ),
        "nullspace": Command(
            (*nullspace, "--tokens-per-batch", 32, "--resume", "sums", "--out", "out"),
            ("out", "sums"),
            ("sums", "out"),
            check=whole_space,
        ),
        "merge": Command(
            ("merge", "embedded", pack, "--out", "out"), ("out",), ("out",), check=whole
        ),
        "compare": Command(
            (*compare, "--null-space", space, "--out", "out"),
            ("out",),
            ("out",),
            content=lambda place: (compared(place), states(place)),
        ),
        "evaluate": Command(
            (*evaluate, "--limit", 12, "--out", "out.jsonl"),
            ("out.before.jsonl", "out.jsonl"),
            ("out.before.jsonl", "out.jsonl"),
            content=lambda place: [p.read_bytes() for p in sorted(place.glob("*.jsonl"))],
        ),
        "push": Command(
            ("push", pack, "me/pack"),
            (),
            content=lambda place: hub.repos["me/pack"].files(),
            check=pushed,
        ),
    }


def compared(place: Path) -> Any:
    """A comparison's findings, but for how long they took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(v) for name, v in value.items() if name != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads((place / "out" / "comparison.json").read_text()))


def states(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("state-*"))


SPAWNS = """
import json, os, pkgutil, sys
import alphaedit_peft
from alphaedit_peft import embedded
from alphaedit_peft.cli import main
for module in pkgutil.walk_packages(alphaedit_peft.__path__, "alphaedit_peft."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
embedded.load()
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(asked["place"])
        error, nowhere = os.open(asked["error"], os.O_WRONLY | os.O_CREAT), os.open("/dev/null", 1)
        os.dup2(error, 2)
        os.dup2(nowhere, 1)
        sys.argv = ["alphaedit", *asked["words"]]
        try:
            main()
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(99)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Killer:
    """Starts commands and kills them; ``counts`` has what was tried."""

    place: Path
    random: random.Random
    fresh: bool = False  # each command in a new Python, imports and all, rather than forked
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.temporary = self.place / "tmp"
        self.temporary.mkdir()
        self.environment = {**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        self._spawner: subprocess.Popen[str] | None = None

    def run(
        self, command: Command, place: Path, kill: tuple[int, float] | None = None
    ) -> tuple[int, str]:
        """Exit status and stderr; killed by that signal after that many seconds."""
        place.mkdir(exist_ok=True)
        error, words = self.place / "stderr", list(map(str, command.words))
        error.unlink(missing_ok=True)
        if self.fresh:
            code = f"import os; os.chdir({str(place)!r}); {BEGINS}"
            with error.open("w") as stderr:
                child = subprocess.Popen(
                    [sys.executable, "-c", code, *words],
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=self.environment,
                )
            pid = child.pid
        else:
            asked = {"place": str(place), "error": str(error), "words": words}
            spawner = self.spawner()
            print(json.dumps(asked), file=spawner.stdin, flush=True)
            pid = int(spawner.stdout.readline())
        if kill is not None:
            number, after = kill
            time.sleep(after)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, number)
        status = child.wait() if self.fresh else int(spawner.stdout.readline())
        return status, error.read_text() if error.exists() else ""

    def spawner(self) -> subprocess.Popen[str]:
        """The process that has imported everything and forks for each command."""
        if self._spawner is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._spawner = subprocess.Popen(
                [sys.executable, "-c", SPAWNS], env=self.environment, **pipes
            )
        return self._spawner

    def close(self) -> None:
        if self._spawner is not None:
            self._spawner.communicate()

    def whole(self, command: Command) -> tuple[Any, float]:
        """What a run that nobody kills makes, and its seconds."""
        start = time.monotonic()
        content = self._ended(command, self.place / "whole")
        return content, time.monotonic() - start

    def kill(self, name: str, command: Command, whole: Any, seconds: float) -> None:
        """Kill once, or more often, and then let it end."""
        place = self.place / "killed"
        for _ in range(self.random.choice((1, 1, 2, 3))):
            number = self.random.choice(list(ENDS))
            after = self.random.uniform(0, seconds)
            told = f"{name}, {signal.Signals(number).name} after {after:.3f} s"
            before = set(place.rglob("*"))
            status, error = self.run(command, place, (number, after))
            self.counts[f"{name} {'ended before' if status == 0 else status}"] += 1
            assert status in (0, ENDS[number]), f"{told}: status {status}\n{error}"
            assert "Traceback" not in error, f"{told}:\n{error}"
            if status in SAID:
                assert error.splitlines()[-1:] == [SAID[status]], f"{told}:\n{error}"
                # what a SIGKILL left goes when the name is next written, which may not have come
                known = {place / name for name in (*command.kept, *command.outputs)}
                hidden = {p for p in place.rglob(".*") if ".lock" in p.name or ".saving" in p.name}
                left = ({*place.iterdir()} - known | hidden) - before
                assert not left, f"{told} left {left}"
            command.check(place)
        assert self._ended(command, place) == whole, f"{told}: the run after it differs"

    def _ended(self, command: Command, place: Path) -> Any:
        """Run to the end; nothing but the output is left."""
        status, error = self.run(command, place)
        assert status == 0, f"status {status}\n{error}"
        assert sorted(p.name for p in place.iterdir()) == sorted(command.outputs)
        hidden = list(place.rglob(".*"))
        assert not hidden, f"{hidden} left at the end"
        assert not list(self.temporary.iterdir()), list(self.temporary.iterdir())
        content = command.content(place)
        shutil.rmtree(place)
        return content


def inputs(given: Path, killer: Killer) -> None:
    """A null space, a pack and files of the embedded model."""
    given.mkdir()
    found = [record["requested_rewrite"] for record in embedded.records(EDITS * 6)[::6]]
    edits = [
        Edit(subject=e["subject"], prompt=e["prompt"], target_new=e["target_new"]["str"])
        for e in found
    ]
    write_edits(edits, given / "edits.jsonl")
    write_edits(edits[:2], given / "two.jsonl")
    (given / "texts.txt").write_text("\n".join(embedded.texts(400)))
    for words in (
        ("nullspace", "embedded", "--out", "ns", "--max-tokens", 5000),
        ("edit", "embedded", "two.jsonl", "--null-space", "ns", "--steps", 3, "--out", "pack"),
    ):
        status, error = killer.run(Command(words, ()), given)
        assert status == 0, error


@contextmanager
def killing(seed: int, *, fresh: bool = False) -> Iterator[tuple[Killer, dict[str, Command]]]:
    """A killer and what it kills, in a folder that goes at the end."""
    with (
        tempfile.TemporaryDirectory() as place,
        HubServer({"mine": "me"}) as hub,
        client_of(hub, Path(place) / "home", "mine"),
    ):
        killer = Killer(Path(place), random.Random(seed), fresh)
        try:
            inputs(Path(place) / "given", killer)
            yield killer, commands(Path(place) / "given", hub)
        finally:
            killer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="a new Python for each, with imports")
    parser.add_argument("--only", help="one command")
    asked = parser.parse_args()
    with killing(asked.seed, fresh=asked.fresh) as (killer, found):
        found = {name: c for name, c in found.items() if asked.only in (None, name)}
        whole = {name: killer.whole(command) for name, command in found.items()}
        print({name: f"{seconds:.1f} s" for name, (_, seconds) in whole.items()}, flush=True)
        while sum(killer.counts.values()) < asked.kills:
            for name, command in found.items():
                killer.kill(name, command, *whole[name])
            print(json.dumps(dict(sorted(killer.counts.items()))), flush=True)


if __name__ == "__main__":
    main()
