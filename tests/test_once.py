"""A run's memory is planned once, and each header of a safetensors file is read once."""

import ast
import json
import shutil
import sys
from collections import Counter

import mlx.core as mx
import pytest
from conftest import ROOT
from tuning_models import facts, write_jsonl

import phi3_mlx
from phi3_mlx.cli import main
from phi3_mlx.errors import CheckpointError
from phi3_mlx.store import safetensors
from phi3_mlx.store.checkpoint import model_size, open_checkpoint, outline, read_model

PACKAGE = ROOT / "phi3_mlx"
TINY = ROOT / "weights" / "tiny"
# Who plans: a run before its model is loaded, one whose model is in memory, loading alone, a training.
PLANS = {
    "engine/plan": ("plan_run", "plan_together", "check_room"),
    "tuning/plan": ("plan_memory",),
}
FUNCTIONS = {(str(PACKAGE / f"{module}.py"), name) for module, names in PLANS.items() for name in names}


def module_of(frame):
    return frame.f_code.co_filename.removeprefix(f"{PACKAGE}/").removesuffix(".py")


def plans_made(call):
    """The functions of `FUNCTIONS` that a call comes to, each with the module that called it."""
    made = []

    def watch(frame, event, _):
        if event == "call" and (frame.f_code.co_filename, frame.f_code.co_name) in FUNCTIONS:
            made.append((frame.f_code.co_name, module_of(frame.f_back)))

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return made


def typed(*words):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 0


@pytest.fixture
def headers(monkeypatch):
    """How often the header of each file was read."""
    read, counts = safetensors._read_json_header, Counter()

    def counted(path):
        counts[path] += 1
        return read(path)

    monkeypatch.setattr(safetensors, "_read_json_header", counted)
    return counts


@pytest.fixture
def sharded(tmp_path):
    """The bundled model in two files."""
    directory = shutil.copytree(TINY, tmp_path / "sharded")
    arrays = mx.load(str(TINY / "model.safetensors"))
    mx.eval(arrays)
    (directory / "model.safetensors").unlink()
    names, files = sorted(arrays), [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    homes = {name: files[n % 2] for n, name in enumerate(names)}
    for file in files:
        mx.save_safetensors(str(directory / file), {name: arrays[name] for name in names if homes[name] == file})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return directory


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "my.jsonl", facts(12))


def once(directory):
    return dict.fromkeys(safetensors.find_weights(directory).files, 1)


def test_generate_plans_from_headers_and_then_what_is_in_memory(headers, sharded):
    expected = once(sharded)
    headers.clear()
    made = plans_made(lambda: typed("generate", "-m", sharded, "-p", "Tell me a story.", "--max-tokens", 4))
    assert made == [("plan_run", "cli/options"), ("plan_together", "engine/scheduler")]
    assert headers == expected


def test_loading_in_python_is_planned_and_then_each_answer(headers, sharded):
    expected = once(sharded)
    headers.clear()
    loaded = []
    assert plans_made(lambda: loaded.extend(phi3_mlx.load(sharded))) == [("check_room", "generation/loading")]
    assert headers == expected
    answer = lambda: phi3_mlx.generate(*loaded, "Tell me a story.", max_tokens=4)  # noqa: E731
    assert plans_made(answer) == [("plan_together", "engine/scheduler")]
    several = lambda: phi3_mlx.batch_generate(*loaded, ["A story.", "A song."], max_tokens=4)  # noqa: E731
    assert {caller for _, caller in plans_made(several)} == {"engine/scheduler"}
    assert headers == expected


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["dry run", "run"])
def test_a_training_is_planned_once(headers, sharded, data, tmp_path, more):
    expected = once(sharded)
    headers.clear()
    words = ["tune", "-m", sharded, "-d", data, "-o", tmp_path / "adapter", "--steps", 1, "--rank", 1, *more]
    assert plans_made(lambda: typed(*words)) == [("plan_memory", "tuning/run")]
    assert headers == expected


def test_an_adapter_beside_its_base_is_read_once_too(headers, sharded, data, tmp_path):
    adapter = tmp_path / "adapter"
    typed("tune", "-m", sharded, "-d", data, "-o", adapter, "--steps", 1, "--rank", 1)
    expected = {**once(sharded), adapter / "adapters.safetensors": 1}
    headers.clear()
    typed("generate", "-m", sharded, "--adapter", adapter, "-p", "Hi", "--max-tokens", 2)
    assert headers == expected


def test_what_is_made_of_a_checkpoint_reads_no_header(headers):
    checkpoint = open_checkpoint(TINY)
    headers.clear()
    assert model_size(checkpoint) == model_size(open_checkpoint(checkpoint))
    outline(checkpoint)
    read_model(checkpoint)
    assert headers == {}


def test_a_model_that_is_changed_before_its_weights_are_read_is_refused(tmp_path):
    directory = shutil.copytree(TINY, tmp_path / "model")
    checkpoint, arrays = open_checkpoint(directory), mx.load(str(TINY / "model.safetensors"))
    mx.eval(arrays)
    for changed in (
        {**arrays, "model.norm.weight": mx.zeros(7)},
        {name: array for name, array in arrays.items() if name != "model.norm.weight"},
    ):
        mx.save_safetensors(str(directory / "model.safetensors"), changed)
        with pytest.raises(CheckpointError, match="was changed while it was read; type the command again"):
            read_model(checkpoint)


def test_a_workload_is_made_where_plans_are():
    """By one of its constructors; others say what differs with `replace`."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / "weights" / "training").glob("*.py")]
    code = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code[notebook.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(code) > 150
    home = code.pop("phi3_mlx/engine/plan.py")
    assert {name for name, lines in code.items() if constructs(lines, "Workload")} == set()
    assert home.count("return cls(") + home.count("workload = kind(") == 3
    assert constructs("from phi3_mlx.engine import plan\nplan.Workload(config, 0, 1)", "Workload")
    assert not constructs("Workload.of_model(model, 1)", "Workload")


def constructs(lines, name):
    """Whether code calls a class by its name; commands of a notebook are not code."""
    lines = "\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in lines.splitlines())
    calls = [node.func for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Call)]
    return any(getattr(call, "id", getattr(call, "attr", None)) == name for call in calls)
