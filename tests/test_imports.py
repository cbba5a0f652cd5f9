"""The package's own rules, read from its source: who may import, hook, print and keep state."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

import alphaedit_peft

PACKAGE = "alphaedit_peft"
ROOT = Path(alphaedit_peft.__file__).parent

# imports run downward only: a module may import from its own floor and those before it
FLOORS = (
    (
        *("edits", "algebra", "architecture", "hooks", "settings", "config", "fingerprint"),
        *("delta_algebra", "factoring", "hub", "parallel", "placement"),
        *("quantised", "storing", "tokens"),
    ),
    ("nullspace", "evaluation", "embedded"),
    ("pack",),
    ("editing",),
    ("model",),
    ("studies", "report"),
    ("cli",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MAY_IMPORT = {
    # the demonstration loads its pack with plain PEFT, to show that this is enough
    "peft": ("model", "config", "pack", "cli.showing"),
    "datasets": ("nullspace.corpus", "evaluation.data.source"),
    "sklearn": ("evaluation.text_metrics",),
    "lm_eval": ("studies.harness",),
    "typer": ("cli",),
    "rich": ("cli",),
}
REGISTERS = {
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_module_forward_hook",
}
MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CACHES = {"cache", "lru_cache"}
MAX_FILE, MAX_FUNCTION = 280, 60


@dataclass(frozen=True)
class Source:
    """One file of the package; ``name`` is dotted, without the package's own name."""

    name: str
    path: Path

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.path)

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    def within(self, homes: tuple[str, ...]) -> bool:
        return any(self.name == home or self.name.startswith(home + ".") for home in homes)

    def imported(self) -> Iterator[str]:
        """Full dotted names of all imports, those within functions too."""
        is_package = self.path.name == "__init__.py"
        here = ".".join(filter(None, (PACKAGE, self.name)))
        around = here if is_package else here.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                given = "." * node.level + (node.module or "")
                base = resolve_name(given, around)
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def sources() -> list[Source]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(Source(".".join(p for p in parts if p != "__init__"), path))
    return found


SOURCES = sources()
MODULES = [source for source in SOURCES if source.name]  # without the face
IDS = [source.name for source in MODULES]
every_module = pytest.mark.parametrize("source", MODULES, ids=IDS)


def called(node: ast.AST) -> str:
    """The last part of what a call calls."""
    target = node.func if isinstance(node, ast.Call) else node
    return getattr(target, "attr", getattr(target, "id", ""))


def calls(tree: ast.AST) -> set[str]:
    return {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@every_module
def test_it_stands_on_a_floor(source):
    assert source.top in FLOOR, f"{source.name} is on no floor; give it one in FLOORS"


@every_module
def test_imports_run_downward(source):
    own = {name.split(".")[1] for name in source.imported() if name.startswith(PACKAGE + ".")}
    upward = {top for top in own if FLOOR.get(top, -1) > FLOOR[source.top]}
    assert not upward, f"{source.name} imports {upward} from above"


def test_what_judges_models_knows_nothing_of_editing():
    names = [n for s in MODULES if s.top == "evaluation" for n in s.imported()]
    assert not [n for n in names if n.startswith((f"{PACKAGE}.editing", f"{PACKAGE}.model"))]


@every_module
def test_libraries_are_imported_where_they_may_be(source):
    tops = {name.partition(".")[0] for name in source.imported()}
    wrong = {lib for lib, homes in MAY_IMPORT.items() if lib in tops and not source.within(homes)}
    assert not wrong, f"{source.name} imports {wrong}"


@every_module
def test_only_hooks_registers_hooks(source):
    assert source.name == "hooks" or not calls(source.tree) & REGISTERS


@every_module
def test_only_the_commands_print(source):
    assert source.top == "cli" or "print" not in calls(source.tree)


def module_level(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names bound at a module's top level, and what to."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from ((name, node.value) for name in names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def is_constant_name(name: str) -> bool:
    return name.lstrip("_").isupper() or (name.startswith("__") and name.endswith("__"))


def is_mutable(value: ast.expr) -> bool:
    return isinstance(value, MUTABLE) or (
        isinstance(value, ast.Call) and called(value) in MUTABLE_CALLS
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name or "face")
def test_mutable_values_at_module_level_are_named_as_constants(source):
    bound = [name for name, value in module_level(source.tree) if is_mutable(value)]
    assert [name for name in bound if not is_constant_name(name)] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name or "face")
def test_nothing_changes_what_stands_at_module_level(source):
    names = {name for name, value in module_level(source.tree) if is_mutable(value)}
    changed = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            changed += node.names
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            changed += names & {getattr(node.value, "id", "")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changes = node.func.attr in {"append", "extend", "add", "update", "setdefault", "pop"}
            changed += names & {getattr(node.func.value, "id", "")} if changes else []
    assert changed == []


@every_module
def test_no_function_remembers_across_calls(source):
    decorators = {
        called(decorator)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    }
    assert not decorators & CACHES


@every_module
def test_files_and_functions_stay_short(source):
    length = len(source.path.read_text(encoding="utf-8").splitlines())
    assert length <= MAX_FILE
    functions = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
    # from the docstring on: a command's options are its signature
    lengths = {node.name: node.end_lineno - node.body[0].lineno + 1 for node in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION} == {}


@every_module
def test_it_opens_with_what_it_is_for(source):
    assert ast.get_docstring(source.tree)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout + done.stderr


def test_importing_the_package_imports_and_prints_nothing():
    heavy = ("torch", "peft", "transformers", "datasets", "numpy")
    check = f"assert not {{*{heavy!r}}} & {{*sys.modules}}, 'imported too much'"
    assert run(f"import sys, {PACKAGE}; {check}") == ""


def test_public_names_are_all_there():
    assert alphaedit_peft.__all__ == sorted(alphaedit_peft.__all__)
    for name in alphaedit_peft.__all__:
        assert getattr(alphaedit_peft, name) is not None
    assert set(alphaedit_peft.__all__) <= set(dir(alphaedit_peft))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'alphaedit_peft' has no attribute 'Edits'"):
        _ = alphaedit_peft.Edits
