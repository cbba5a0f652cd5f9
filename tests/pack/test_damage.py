"""Random damage to one file gives PackError, or a pack that is valid and saves itself again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphaedit_peft.pack import EditPack, PackError
from alphaedit_peft.pack.format import FILES

FUZZED = st.tuples(
    st.sampled_from([name for name in FILES if name != "README.md"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
    st.floats(0, 1) | st.just(1.0),
)


@given(FUZZED)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_damage(saved, damage):
    name, flips, keep = damage
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pack"
        shutil.copytree(saved, folder)
        data = bytearray((folder / name).read_bytes())
        for where, value in flips:
            data[int(where * len(data))] = value
        (folder / name).write_bytes(data[: int(keep * len(data))])
        try:
            pack = EditPack.from_pretrained(folder)
            pack.save_pretrained(Path(place) / "again")
        except PackError:
            return
        assert EditPack.from_pretrained(Path(place) / "again").digest() == pack.digest()
