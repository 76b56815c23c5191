"""The plan of the house in CONTRIBUTING.md against the imports that there are."""

import ast
import importlib
import json
import re
from pathlib import Path

import phi3_mlx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "phi3_mlx"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.+?) \| (.+?) \|$", CONTRIBUTING, re.M)
FOLDERS = re.findall(r"^\| `([\w/]+)/` \| (.+?) \| (.+?) \|$", CONTRIBUTING, re.M)  # rooms, and folders in them
ROOMS = [room for room, _, _ in LINES]  # from the top
GROUND = re.findall(r"`(\w+)\.py`", CONTRIBUTING.split("The ground, from the top:")[1].split("\n\n")[0])


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name):
    """The modules of the package that a module imports: at its head, in functions, and for types alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            source = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            if not node.level:
                source = node.module
            if source.split(".")[0] == "phi3_mlx":
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                yield from (t if (t := f"{source}.{name}") in MODULES else source for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


# Names of the package's own that more than one module may define.
IN_EACH_ARCHITECTURE = {"Config", "Attention", "MLP", "DecoderLayer", "Model"}  # and the base that they derive from
# Private ones that mean the same everywhere: keys with the values that they must have, keys without effect, lines of a
# list that a message shows, a type's number in two formats, and how many arrays are alive in a run and in training.
SAME_MEANING = {"_MUST_BE", "_IGNORED", "_LISTED", "_NORMAL", "_LOGITS", "_NORMS"}
COMMANDS = {
    "build",
    "compare",
    "convert",
    "fuse",
    "generate",
    "pretrain",
    "publish",
    "tune",
}  # of cli/, as the library's functions


def defined_at_the_top(body):
    """The names that a module's statements define, also those within `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            handlers = [line for handler in getattr(node, "handlers", ()) for line in handler.body]
            yield from defined_at_the_top([*node.body, *node.orelse, *handlers, *getattr(node, "finalbody", ())])


ARROWS = {name: {target for target in imports_of(name) if target != name} for name in MODULES}


def room_of(name):
    return name.split(".")[1]


OUTSIDE = [*(ROOT / "bench").rglob("*.py"), *(ROOT / "weights" / "training").glob("*.py")]


def private_names(code):
    """Names with a leading underscore that code takes from the package or from an object that is not its own."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "phi3_mlx":
            found += [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            found.append(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            found += [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
    return [name for name in found if re.match("_(?!_)", name) and name != "_from_config"]  # of transformers


def test_every_room_has_a_line():
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)}
    assert there == {*ROOMS, *GROUND}
    assert all(len(belongs) > 20 for _, belongs, _ in LINES)
    assert len(ARROWS) > 100
    assert sum(map(len, ARROWS.values())) > 500


def test_every_folder_with_modules_has_a_line():
    there = {path.parent.relative_to(PACKAGE).as_posix() for path in MODULES.values()} - {"."}
    assert sorted(folder for folder, _, _ in FOLDERS) == sorted(there)
    assert all(len(belongs) > 20 for _, belongs, _ in FOLDERS)


def test_a_folder_in_a_room_imports_what_its_line_names_and_has_one_door():
    for folder, belongs, may in FOLDERS:
        if "/" not in folder:
            continue
        inside = {name for name in MODULES if f"{name}.".startswith(f"phi3_mlx.{folder.replace('/', '.')}.")}
        rooms = {room_of(target) for name in inside for target in ARROWS[name] - inside}
        assert rooms - {*GROUND} == {*re.findall(r"`(\w+)`", may)}, folder
        doors = {name for name in MODULES if name not in {*inside, "phi3_mlx"} and ARROWS[name] & inside}
        assert doors == {f"phi3_mlx.{door.replace('/', '.')}" for door in re.findall(r"`([\w/]+)` alone", belongs)}


def test_rooms_import_what_their_lines_name_which_stands_below():
    order = [*ROOMS, *GROUND]
    allowed = {room: re.findall(r"`(\w+)`", may) for room, _, may in LINES}
    used = {room: set() for room in order}
    for name, targets in ARROWS.items():
        if name in ("phi3_mlx", "phi3_mlx.__main__"):
            continue  # the doors
        for target in targets:
            assert target != "phi3_mlx", f"{name} imports the package's door"
            if room_of(target) != room_of(name):
                used[room_of(name)].add(room_of(target))
    for room, targets in used.items():
        for target in targets:
            assert order.index(target) > order.index(room), f"{room} imports {target}, which is above it"
        if room in ROOMS:
            assert targets - {*GROUND} == {*allowed[room]}, f"{room}'s line says otherwise"
        else:
            assert targets <= {*GROUND}


def test_no_file_is_long():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not [name for name, length in lengths.items() if length > 400]


def test_no_modules_import_each_other_in_a_circle():
    done, way = set(), []

    def visit(name):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        way.append(name)
        for target in sorted(ARROWS[name]):
            visit(target)
        way.pop()
        done.add(name)

    for name in sorted(MODULES):
        if name != "phi3_mlx":
            visit(name)
    assert len(done) == len(MODULES) - 1


def homes_of(pattern):
    """The modules that define each name at the top that matches."""
    homes = {}
    for module, path in MODULES.items():
        for name in {*defined_at_the_top(ast.parse(path.read_text(encoding="utf-8")).body)}:
            if re.match(pattern, name):
                homes.setdefault(name, set()).add(module)
    return homes


def test_a_private_constant_means_one_thing():
    homes = homes_of("_[A-Z][A-Z_0-9]*$")
    assert {name for name, modules in homes.items() if len(modules) > 1} <= SAME_MEANING
    assert len(homes) > 150


def test_a_public_name_means_one_thing():
    homes = homes_of("[^_]")
    several = {name: modules for name, modules in homes.items() if len(modules) > 1}
    for name in IN_EACH_ARCHITECTURE:
        assert {room_of(module) for module in several.pop(name)} <= {"models", "config"}
    for name in COMMANDS:
        assert sorted(room_of(module) == "cli" for module in several.pop(name)) == [False, True]
    assert not several, several
    assert len(homes) > 500


# Words that say nothing of what a variable holds.
EMPTY_WORDS = {"words", "of", "one", "found", "own"}


def variables_of(tree):
    """The names that code assigns or takes as arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def test_a_variables_name_says_what_it_holds():
    for module, path in MODULES.items():
        used = EMPTY_WORDS.intersection(variables_of(ast.parse(path.read_text(encoding="utf-8"))))
        assert not used, f"{module} has variables called {used}"


def test_a_variable_that_says_nothing_would_be_noticed():
    code = """
own = 1
for of in ():
    pass
def f(words, *, one=1):
    return [found for found in words if (it := found)]
"""
    assert {*variables_of(ast.parse(code))} == {*EMPTY_WORDS, "it"}


# A word has one meaning: what is packed is quantized, and back it is dequantized; a plan says how many bytes something
# will take; a run is one training (what else runs is a verb).
PACKED_BACK = re.compile(r"(?i)\b(un|re)-?pack\w*|\bpacked examples")
PLANNERS = {
    "engine/plan",
    "server/app",
    "server/service",
    "engine/capacity",
    "generation/loading",
    "tuning/plan",
    "tuning/run",
    "pretraining/run",
    "cli/plan",
}


def test_what_is_quantized_is_dequantized_and_not_unpacked():
    pages = [
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*.md"),
        *MODULES.values(),
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
    for page in pages:
        if page.name != "results.md":  # it repeats commands as they were run
            text = page.read_text(encoding="utf-8").replace("struct.unpack", "").replace("np.unpackbits", "")
            assert not PACKED_BACK.search(text), page.name
    assert PACKED_BACK.search("it was unpacked and Re-packed")


def test_a_plan_is_of_memory_and_a_run_of_a_training():
    names = {name: modules for pattern in (r"\w*[Pp]lan", r"\w*Run") for name, modules in homes_of(pattern).items()}
    for name, modules in names.items():
        for module in modules:
            if re.search(r"[Pp]lan(?!ning)", name):
                assert module.removeprefix("phi3_mlx.").replace(".", "/") in PLANNERS, name
            elif "Run" in name:
                assert room_of(module) == "tuning", name
    plans = {name for name in names if name.endswith("Plan")}
    assert plans == {"Plan", "TrainingPlan"}
    for name in plans:
        (module,) = names[name]
        assert isinstance(getattr(importlib.import_module(module), name).total, property)


def test_no_variable_is_called_fused_alone():
    """It would not say whether a kernel, a layer or a model that an adapter was merged into."""
    for module, path in MODULES.items():
        assert "fused" not in variables_of(ast.parse(path.read_text(encoding="utf-8"))), module


def defined_in(tree):
    """Names of functions and classes at a module's head, and `Class.method`."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds):
            yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, kinds))


def test_there_is_one_decode_loop():
    """A scheduler alone steps a batch, which alone queues passes; tokens are drawn in them and in drafts."""
    importers = {"Batch": set(), "queue_pass": set(), "draw": set()}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                importers.get(alias.name, set()).add(module.removeprefix("phi3_mlx.engine."))
    assert importers == {"Batch": {"scheduler"}, "queue_pass": {"batch"}, "draw": {"draft_model", "drafts", "passes"}}


def test_completion_in_a_notebook_offers_the_public_names_alone():
    assert dir(phi3_mlx) == sorted(phi3_mlx.__all__)


def test_a_strangers_questions_are_answered_by_a_file_and_a_name():
    answers = re.findall(r"^\| .+? \| `([\w/]+\.py)`, `([\w.]+)` \|$", CONTRIBUTING, re.M)
    assert len({file for file, _ in answers}) == len(answers) == 16
    for file, name in answers:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        assert name in defined_in(tree), f"{name} is not in {file}"


def test_outside_the_package_nothing_reaches_for_a_name_with_an_underscore():
    for path in OUTSIDE:
        assert private_names(path.read_text(encoding="utf-8")) == [], path.name
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            code = "".join(cell["source"])
            if cell["cell_type"] == "code" and not code.startswith("!"):
                assert private_names(code) == [], notebook.name


def test_a_private_name_would_be_found():
    lines = {
        "from phi3_mlx.engine.plan import _OFFERED_BITS": "_OFFERED_BITS",
        "from phi3_mlx._hidden import shown": "_hidden",
        "from phi3_mlx import blas as b; b._load()": "_load",
        "model.model._read(ids, None, True)": "_read",
        "getattr(cache, '_keys')": "_keys",
    }
    for line, name in lines.items():
        assert private_names(line) == [name]
    assert private_names("self._data; cls._made; x.__dict__; from . import record") == []


def test_benches_and_training_import_modules_that_are_public_or_named_for_them():
    public = re.findall(r"^::: (?:phi3_mlx\.)?([\w.]+)$", (ROOT / "docs" / "reference.md").read_text("utf-8"), re.M)
    deeper = CONTRIBUTING.split("`weights/training` may reach deeper")[1].split("\n\n")[0]
    named = {name.replace("/", ".") for name in re.findall(r"`([\w/]+)`", deeper)}
    used = set()
    for path in OUTSIDE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phi3_mlx."):
                used.add(node.module.removeprefix("phi3_mlx."))
    known = {*named, *GROUND, *(name.rpartition(".")[0] for name in public), *public}
    assert used <= known, f"name them in CONTRIBUTING.md: {used - known}"
    assert named <= used, f"CONTRIBUTING.md names them for nobody: {named - used}"
