"""An option is said once, as a field: functions, commands, checks and the pages' tables are made of it."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

import phi3_mlx
from phi3_mlx.cli import cli
from phi3_mlx.cli.declare import options_of
from phi3_mlx.cli.options import ModelOptions
from phi3_mlx.conversion import export, fuse, pipeline
from phi3_mlx.conversion.options import ConvertOptions, ExportOptions, FuseOptions
from phi3_mlx.errors import OptionError
from phi3_mlx.evaluation import quality
from phi3_mlx.evaluation.options import CompareOptions, EvalOptions
from phi3_mlx.models.decoder import LongRopeRule
from phi3_mlx.option import DTYPE_NAMES, Range, arguments, option, settle
from phi3_mlx.store.checkpoint import DTYPES
from phi3_mlx.tuning.settings import Settings

sys.path.insert(0, str(ROOT / "docs"))
from _options import doors, given_for, table, with_tables

# Of `Request` and `Settings` test_request.py and test_tuning_run.py say the same.
FUNCTIONS = {
    phi3_mlx.convert: ConvertOptions,
    phi3_mlx.fuse: FuseOptions,
    phi3_mlx.compare: CompareOptions,
    phi3_mlx.export_gguf: ExportOptions,
    phi3_mlx.evaluate: EvalOptions,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_take_the_fields_with_their_types_and_defaults(function):
    parameters = inspect.signature(function).parameters
    for field in fields(FUNCTIONS[function]):
        assert parameters[field.name].default == field.default, field.name
        assert parameters[field.name].annotation == field.type, field.name
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.fixture
def reached(monkeypatch):
    """The options with which the work itself is called, which does not begin."""
    seen = []

    def work(*given, **_):
        seen.append(next(value for value in given if isinstance(value, tuple(FUNCTIONS.values()))))
        raise InterruptedError

    monkeypatch.setattr(pipeline, "convert_as", work)
    monkeypatch.setattr(fuse, "fuse_as", work)
    monkeypatch.setattr(export, "export_as", work)

    def options_of_call(call):
        with pytest.raises(InterruptedError):
            call()
        return seen.pop()

    return options_of_call


CONVERT = {  # a value other than the default, what must stand beside it, and how both are typed
    "bits": (8, {}, ["--bits", "8"]),
    "group_size": (32, {}, ["--group-size", "32"]),
    "mode": ("mxfp4", {}, ["--mode", "mxfp4"]),
    "dtype": ("float16", {}, ["--dtype", "float16"]),
    "dequantize": (True, {}, ["--dequantize"]),
    "target_bpw": (4.5, {}, ["--target-bpw", "4.5"]),
    "target_size": ("2MB", {}, ["--target-size", "2MB"]),
    "recipe": ("r.json", {}, ["--recipe", "r.json"]),
    "method": ("gptq", {}, ["--method", "gptq"]),
    "effort": ("best", {}, ["--effort", "best"]),
    "calibration": ("Some text.", {"method": "gptq"}, ["--method", "gptq", "--calibration", "a.txt"]),
    "seed": (
        3,
        {"method": "gptq", "calibration": "self"},
        ["--method", "gptq", "--calibration", "self", "--seed", "3"],
    ),
    "text": ("Some text.", {}, ["--text", "a.txt"]),
    "report": (False, {}, ["--no-report"]),
    "force": (True, {}, ["--force"]),
    "allow_nan": (True, {}, ["--allow-nan"]),
    "revision": ("main", {}, ["--revision", "main"]),
}
FUSE = {
    "model": ("tiny", {}, ["-m", "tiny"]),
    "revision": ("main", {}, ["--revision", "main"]),
    "dequantize": (True, {}, ["--dequantize"]),
    "dtype": ("float16", {}, ["--dtype", "float16"]),
    "bits": (8, {}, ["--bits", "8"]),
    "method": ("gptq", {}, ["--method", "gptq"]),
    "calibration": ("Some text.", {"method": "gptq"}, ["--method", "gptq", "--calibration", "a.txt"]),
    "seed": (
        3,
        {"method": "gptq", "calibration": "self"},
        ["--method", "gptq", "--calibration", "self", "--seed", "3"],
    ),
    "text": ("Some text.", {}, ["--text", "a.txt"]),
    "force": (True, {}, ["--force"]),
}
EXPORT = {
    "adapter": ("a", {}, ["--adapter", "a"]),
    "type": ("q8_0", {}, ["--type", "q8_0"]),
    "name": ("Phi-3 mine", {}, ["--name", "Phi-3 mine"]),
    "longrope": ("long", {}, ["--longrope", "long"]),
    "modelfile": (True, {}, ["--modelfile"]),
    "importance": (False, {"type": "q6_k"}, ["--type", "q6_k", "--no-importance"]),
    "calibration": ("Some text.", {"type": "q6_k"}, ["--type", "q6_k", "--calibration", "a.txt"]),
    "report": (True, {}, ["--report"]),
    "text": ("Some text.", {}, ["--text", "a.txt"]),
    "split_max_size": ("4GB", {}, ["--split-max-size", "4GB"]),
    "revision": ("main", {}, ["--revision", "main"]),
    "force": (True, {}, ["--force"]),
}


@pytest.mark.parametrize("name", CONVERT)
def test_every_option_of_convert_reaches_the_work(name, reached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some text.")
    value, beside, typed = CONVERT[name]
    right = ConvertOptions(**{name: value}, **beside)
    assert reached(lambda: phi3_mlx.convert("a", "b", **{name: value}, **beside)) == right
    assert reached(lambda: cli.main(["convert", "a", "-o", "b", *typed], standalone_mode=False)) == right
    assert getattr(right, name) != getattr(ConvertOptions(), name)


@pytest.mark.parametrize("name", FUSE)
def test_every_option_of_fuse_reaches_the_work(name, reached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some text.")
    value, beside, typed = FUSE[name]
    right = FuseOptions(**{name: value}, **beside)
    assert reached(lambda: phi3_mlx.fuse("a", "b", **{name: value}, **beside)) == right
    assert reached(lambda: cli.main(["fuse", "--adapter", "a", "-o", "b", *typed], standalone_mode=False)) == right
    assert getattr(right, name) != getattr(FuseOptions(), name)


@pytest.mark.parametrize("name", EXPORT)
def test_every_option_of_export_reaches_the_work(name, reached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Some text.")
    value, beside, typed = EXPORT[name]
    right = ExportOptions(**{name: value}, **beside)
    assert reached(lambda: phi3_mlx.export_gguf("a", "b.gguf", **{name: value}, **beside)) == right
    assert reached(lambda: cli.main(["export", "-m", "a", "-o", "b.gguf", *typed], standalone_mode=False)) == right
    assert getattr(right, name) != getattr(ExportOptions(), name)


def test_no_option_of_convert_fuse_or_export_is_forgotten_above():
    assert [*EXPORT] == [field.name for field in fields(ExportOptions)]
    assert [*CONVERT] == [field.name for field in fields(ConvertOptions)]
    assert [*FUSE] == [field.name for field in fields(FuseOptions)]


def test_compare_reads_windows_of_the_options(monkeypatch):
    lengths = []

    def blocks(ids, window, bos):
        lengths.append(window)
        raise InterruptedError

    monkeypatch.setattr(quality, "blocks", blocks)
    loaded = phi3_mlx.load("tiny")
    with pytest.raises(InterruptedError):
        phi3_mlx.compare(*loaded, *loaded, "some text", window=7)
    with pytest.raises(InterruptedError):
        phi3_mlx.compare(*loaded, *loaded, "some text")
    assert lengths == [7, 512]


def test_choices_are_those_of_what_is_chosen():
    assert [*DTYPES] == [*DTYPE_NAMES]
    longrope = next(field for field in fields(ModelOptions) if field.name == "longrope")
    assert longrope.metadata["choices"] == LongRopeRule.__args__


@pytest.mark.parametrize(
    "module", ["conversion.options", "evaluation.options", "cli.convert", "cli.fuse", "cli.compare", "cli.eval"]
)
def test_options_are_known_without_mlx(module):
    script = f"import sys, phi3_mlx.{module}; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_tables_of_the_pages_are_those_of_the_fields():
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    for name, text in pages.items():
        assert text == with_tables(text), f"{name} is out of date; run python docs/_options.py"
    for kind, function in doors().items():
        rows = table(kind, function)
        assert sum(text.count(rows) for text in pages.values()) == 1
        assert rows.count("\n") == 2 + len(fields(kind))


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        ("int", "a whole number"),
        ("tuple[str, ...]", "one or more texts"),
        ("str | Sequence[str] | None", "a text or several texts"),
        ("str | Path | Mapping[str, Any] | None", "a text, a path or a dictionary"),
        ("Literal['lora', 'full'] | None", "a text"),
    ],
)
def test_the_tables_say_what_to_give_and_not_how_python_spells_it(annotation, given):
    assert given_for(annotation) == given


def test_the_tables_have_no_type_of_python_and_no_bound_that_nobody_comes_near():
    for kind, function in doors().items():
        cells = [row.split(" | ")[1:4] for row in table(kind, function).splitlines()[2:]]
        for given, _, within in cells:
            assert not re.search(r"\b(str|int|float|tuple|Sequence|Mapping)\b|\[|None", given)
            assert not re.search(r"\d{10}|,\d{3},|\*\*", within)
    assert "| `rank` | a whole number | `8` | 1 or more |" in table(Settings, phi3_mlx.tune)


# ------------------------------------------------------------------------------------- what a field says


@dataclass(frozen=True)
class Cake:
    """An example: what a cake can be told."""

    layers: int = option(
        3, "How many layers.", Range(lambda n: 1 <= n <= 9, "1 to 9"), flags="-l --layers", metavar="N"
    )
    sweet: float = option(0.0, "Sugar.", shown_default="0.0")
    cream: bool = option(False, "With cream.")
    warm: bool | None = option(None, "Warm it.", flags="--warm/--cold")
    form: str = option("round", "Its form.", choices=("round", "square"))
    oven: int | None = option(None, "Its heat.", offered=(160, 180), shown_default="180")
    fruits: tuple[str, ...] = option((), "A fruit.", flags="--fruit")

    def __post_init__(self) -> None:
        settle(self)


@click.command()
@options_of("cake", Cake, before={"form": [click.option("--name", default="Ada")]}, then={"fruits": sorted})
def bake(cake: Cake, name: str) -> None:
    """Bake."""
    print(name, cake)


def test_click_is_told_all_that_a_field_says():
    result = CliRunner().invoke(bake, ["--help"])
    assert result.output.split("Options:\n")[1].splitlines() == [
        "  -l, --layers N         How many layers.  [default: 3]",
        "  --sweet FLOAT          Sugar.  [default: 0.0]",
        "  --cream                With cream.",
        "  --warm / --cold        Warm it.",
        "  --name TEXT",
        "  --form [round|square]  Its form.  [default: round]",
        "  --oven [160|180]       Its heat.  [default: 180]",
        "  --fruit TEXT           A fruit.",
        "  --help                 Show this message and exit.",
    ]


@pytest.mark.parametrize(
    ("typed", "cake"),
    [
        ("", Cake()),
        ("-l 4", Cake(layers=4)),
        ("--sweet 2", Cake(sweet=2.0)),
        ("--cream", Cake(cream=True)),
        ("--warm", Cake(warm=True)),
        ("--cold", Cake(warm=False)),
        ("--form square", Cake(form="square")),
        ("--oven 160", Cake(oven=160)),
        ("--fruit plum --fruit apple", Cake(fruits=("apple", "plum"))),
    ],
)
def test_a_command_gets_the_dataclass(typed, cake):
    assert CliRunner().invoke(bake, typed.split()).output == f"Ada {cake}\n"


def test_a_field_is_checked_by_type_choice_and_range():
    for given, message in (
        ({"layers": "3"}, "layers is '3'; expected a whole number"),
        ({"layers": 10}, "layers 10 is outside its range; give 1 to 9"),
        ({"form": "flat"}, "form 'flat' is unknown; choose round, square"),
        ({"warm": 1}, "warm is 1; expected true or false"),
        ({"fruits": 3}, "fruits is 3; expected a list of texts"),
    ):
        with pytest.raises(OptionError) as caught:
            Cake(**given)
        assert str(caught.value) == message
        assert (
            str(CliRunner().invoke(bake, ["--layers", "10"]).exception) == "layers 10 is outside its range; give 1 to 9"
        )
    assert Cake(oven=200).oven == 200  # what the command line does not offer


def test_arguments_are_those_that_are_fields():
    rest = {field.name for field in fields(Cake)} - {"layers", "cream"}

    def function(layers=Cake.layers, *, cream=False, other=3):
        return arguments(Cake, locals(), without=rest)

    assert function(4) == {"layers": 4, "cream": False}
    assert function(other=5, cream=True) == {"layers": 3, "cream": True}


def test_a_function_that_lacks_a_field_or_takes_one_that_it_says_it_lacks_fails():
    every = {field.name: field.default for field in fields(Cake)}
    assert arguments(Cake, {**every, "other": 3}) == every
    lacking = {name: value for name, value in every.items() if name != "oven"}
    with pytest.raises(TypeError, match=r"takes every field but .*; see oven$"):
        arguments(Cake, lacking)
    assert arguments(Cake, lacking, without=["oven"]) == lacking
    with pytest.raises(TypeError, match=r"see cream$"):
        arguments(Cake, every, without=["cream"])


# ------------------------------------------------------------------------------------- one place

ADDED = """
import contextlib, dataclasses, io, json, sys
from importlib import import_module

from phi3_mlx.errors import OptionError
from phi3_mlx.option import Range, arguments, option

said = {}
for home, name in json.loads(sys.argv[1]):
    module = import_module(home)
    gusto = option(3, "How much gusto.", Range(lambda n: n >= 0, "0 or more"), metavar="N")
    kind = dataclasses.make_dataclass(name, [("gusto", "int", gusto)], bases=(getattr(module, name),), frozen=True)
    setattr(module, name, kind)

    def function(*, gusto=kind.gusto):
        given = arguments(kind, locals(), without={field.name for field in dataclasses.fields(kind)} - {"gusto"})
        return kind.of({"data": "d", "output": "o", **given}) if name == "Settings" else kind(**given)

    assert function().gusto == 3
    for wrong in (-1, "much"):
        try:
            function(gusto=wrong)
        except OptionError as error:
            said[f"{name} {wrong}"] = str(error)

from phi3_mlx.cli import main

for line in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        with contextlib.suppress(SystemExit):
            main(line.split())
    said[line] = " ".join(out.getvalue().split())
print(json.dumps(said))
"""
HOMES = {
    "Request": "phi3_mlx.generation.request",
    "ConvertOptions": "phi3_mlx.conversion.options",
    "FuseOptions": "phi3_mlx.conversion.options",
    "CompareOptions": "phi3_mlx.evaluation.options",
    "EvalOptions": "phi3_mlx.evaluation.options",
    "Settings": "phi3_mlx.tuning.settings",
}
LINES = {
    "generate -p Hi": "How much gusto. [default: 3] --kv-bits",  # in its place
    "chat": "How much gusto. [default: 3] --kv-bits",
    "convert tiny -o new": "How much gusto. [default: 3]",
    "fuse --adapter a -o new": "How much gusto. [default: 3]",
    "compare tiny tiny": "How much gusto. [default: 3]",
    "eval --tasks mmlu": "How much gusto. [default: 3]",
    "tune -d data.jsonl -o new": "How much gusto. [default: 3]",
}


@pytest.fixture(scope="module")
def added():
    """What a Python of its own says, where each dataclass of options got one field more before anything is made of it.

    A function would get one keyword more, whose default is the field's.
    """
    lines = [f"{line} {end}" for line in LINES for end in ("-h", "--gusto -1", "--gusto much")]
    homes = json.dumps([(home, name) for name, home in HOMES.items()])
    done = subprocess.run(
        [sys.executable, "-c", ADDED, homes, *lines],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", LINES)
def test_an_option_that_is_added_to_a_dataclass_is_one_of_its_commands(added, line):
    assert f"--gusto N {LINES[line]}" in added[f"{line} -h"]
    assert added[f"{line} --gusto -1"] == "phi3-mlx: --gusto -1 is outside its range; give 0 or more"
    assert added[f"{line} --gusto much"].startswith(
        "phi3-mlx: Invalid value for '--gusto': 'much' is not a valid integer"
    )


@pytest.mark.parametrize("name", HOMES)
def test_an_option_that_is_added_to_a_dataclass_is_checked_in_python(added, name):
    assert added[f"{name} -1"] == "gusto -1 is outside its range; give 0 or more"
    assert added[f"{name} much"] == "gusto is 'much'; expected a whole number"


def test_an_option_that_is_added_to_a_dataclass_is_in_its_table():
    @dataclass(frozen=True)
    class More(FuseOptions):
        gusto: int | None = option(None, "How much gusto.", Range(lambda n: n >= 0, "0 or more"))

    def function(*, model, revision, gusto, dequantize, dtype, bits, method, calibration, seed, text, force):
        pass

    rows, before = (table(kind, function).splitlines() for kind in (More, FuseOptions))
    assert rows[4] == "| `gusto` | a whole number | `None` | 0 or more | How much gusto. |"
    assert [*rows[:4], *rows[5:]] == before
