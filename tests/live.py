"""Which tests compare with a reference that `make test-live` installs: by what their code names, and what that uses."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_REFERENCE = re.compile(
    r"""importorskip\("(torch|peft|trl|playwright)|\bimport (torch|peft|trl|playwright|llama_cpp)"""
    r"""|\bllama_cpp\.MISSING|which\("(go|node)"\)"""
)
# What a test says that is skipped without one of them.
SKIPPED = re.compile(r"could not import '(torch|peft|trl|playwright)|no (Go|Chromium|llama\.cpp) here")


def is_live(path: Path, names: list[str]) -> bool:
    """Whether a test needs a reference: all of its file does, or one of `names`, its own and its fixtures."""
    live = live_names(path)
    return bool(live & {"", "pytestmark", *names})


@functools.cache
def live_names(path: Path) -> frozenset[str]:
    """The names of a file whose code uses a reference, itself or through others of these; "" if the file needs it."""
    text = path.read_text(encoding="utf-8")
    lines, live, users = text.splitlines(), set(), {}
    for node in ast.parse(text).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        named = bool(_REFERENCE.search("\n".join(lines[first - 1 : node.end_lineno])))
        if isinstance(node, ast.Import | ast.ImportFrom):
            live |= _imported(node)
        defined = _defined(node)
        if named:
            live |= defined
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) and "importorskip" in ast.unparse(node):
                live.add("")
        for name in defined:
            users.setdefault(name, set()).update(_used(node))
    while more := {name for name, used in users.items() if used & live} - live:
        live |= more
    return frozenset(live)


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The live names that a statement imports from files beside the tests; a module's stand behind a dot."""
    if isinstance(node, ast.ImportFrom):
        return _live_in(node.module) & {alias.name for alias in node.names}
    modules = {alias.asname or alias.name: _live_in(alias.name) for alias in node.names}
    return {f"{module}.{name}" for module, names in modules.items() for name in names if "." not in name}


def _live_in(module: str | None) -> frozenset[str]:
    file = TESTS / f"{module}.py"
    return live_names(file) if file.is_file() else frozenset()


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}


def _used(node: ast.stmt) -> set[str]:
    """The names that stand in a statement. Arguments are fixtures; those of helpers hide names of the file."""
    leaves = [*ast.walk(node)]
    used = {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}
    dotted = (leaf for leaf in leaves if isinstance(leaf, ast.Attribute) and isinstance(leaf.value, ast.Name))
    used |= {f"{leaf.value.id}.{leaf.attr}" for leaf in dotted}
    arguments = {leaf.arg for leaf in leaves if isinstance(leaf, ast.arg)}
    if isinstance(node, ast.FunctionDef):
        fixtures = node.name.startswith("test_") or any("fixture" in ast.unparse(each) for each in node.decorator_list)
        return used | arguments if fixtures else used - arguments
    return used
