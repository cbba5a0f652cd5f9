"""What the import contract in pyproject.toml cannot say.

Circles of files, a folder's ``__init__`` among them, names that occur twice, and what is imported
at once rather than when it is used.
"""

import re
import subprocess
import sys
from collections import Counter

import grimp

from tests.conftest import ROOT

PACKAGE = "alphaedit_peft"


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph(PACKAGE, cache_dir=None)  # imports for types and in functions count
    arrows = [(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)]
    circles = [graph.find_shortest_chain(b, a) for a, b in arrows]
    assert not [" -> ".join(circle) for circle in circles if circle]


def test_no_file_name_occurs_twice():
    names = Counter(path.name for path in (ROOT / PACKAGE).rglob("*.py"))
    del names["__init__.py"]
    assert [name for name, times in names.items() if times > 1] == []


def test_values_and_packs_are_imported_without_peft_and_transformers():
    names = "algebra cholesky devices edits embedded fingerprint hooks hub nullspace parallel"
    rooms = [*names.split(), "safe_files", "saving", "settings", "solve_metric"]
    packs = [path.stem for path in (ROOT / PACKAGE / "pack").glob("*.py") if path.stem != "pack"]
    modules = [f"{PACKAGE}.{name}" for name in (*rooms, *(f"pack.{name}" for name in packs))]
    program = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]\n"
    program += "print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_each_way_into_a_model_or_a_process_has_one_room():
    rooms = {
        r"\.register_\w*hook\(": {"hooks.py"},
        r"@(lru_)?cache\b|^\s*global \w": set(),
        r"^\s*(import|from) datasets|\bload_dataset\(": {"nullspace/corpus.py"},
    }
    for pattern, allowed in rooms.items():
        found = {
            path.relative_to(ROOT / PACKAGE).as_posix()
            for path in (ROOT / PACKAGE).rglob("*.py")
            if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
        }
        assert found <= allowed, pattern


def test_importing_the_package_imports_nothing_else_and_says_nothing():
    program = (
        f"import sys, {PACKAGE}; print({{'torch', 'transformers', 'peft'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
