"""Every notebook runs from beginning to end, and shows what is saved in it."""

import json
import subprocess
import sys

import click
import nbformat
import pytest
from conftest import ROOT

from bench.notebooks import VARIES, alike, differences, run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {
    "quickstart",
    "longrope",
    "quantization",
    "evaluation",
    "fine_tuning",
    "long_documents",
    "structured_answers",
    "better_data",
    "steering",
    "circuits",
}
EVERY_DAY = {"quickstart", "structured_answers"}  # the others take up to two minutes each
NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == NAMES


def test_the_readme_counts_them_and_the_docs_list_each():
    assert f"**A notebook.** {NUMBERS[len(NAMES)]} of them" in (ROOT / "README.md").read_text(encoding="utf-8")
    listed = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in sorted(NAMES) if f"| [{name}](../notebooks/{name}.ipynb) |" not in listed] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_in_order_without_an_error_or_warning(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_begins_with_the_model_and_ends_with_what_to_read_next(path):
    cells = json.loads(path.read_text())["cells"]
    assert "minute" in "".join(cells[0]["source"])
    assert "".join(cells[1]["source"]).startswith('MODEL = "tiny"\n')
    assert "".join(cells[-1]["source"]).startswith("## What to read next")


@pytest.mark.parametrize(
    "path",
    [path if path.stem in EVERY_DAY else pytest.param(path, marks=pytest.mark.long) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_it_runs_and_nothing_saved_is_stale(path):
    command = [sys.executable, "-m", "bench.notebooks", "--check", path.stem]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def notebook(*sources, tags=()):
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


def executed(text, tags=()):
    made = notebook("print()", tags=tags)
    made.cells[0].execution_count = 1
    made.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return made


def test_a_stale_output_is_found():
    assert differences(executed("a dog\n"), executed("a dog\n")) == []
    (line,) = differences(executed("a dog\n"), executed("a cat\n"))
    assert "cell 0 shows\na cat" in line
    assert differences(executed("a dog\n", [VARIES]), executed("a cat\n", [VARIES])) == []
    assert differences(notebook("print()"), executed("a dog\n")) == ["cell 0 was never run"]


def test_numbers_may_differ_a_little_and_words_not():
    assert alike("KL 0.2646, 1,024 tokens", "KL 0.2650, 1,024 tokens")
    assert not alike("KL 0.2646, 1,024 tokens", "KL 0.2946, 1,024 tokens")
    assert not alike("1,024 tokens", "1,100 tokens")
    assert not alike("8 of 8 facts", "7 of 8 facts")
    assert not alike("8 of 8 facts", "8 of 8 dogs")
    assert alike("0.0001 nats", "0.0004 nats")
    assert alike("same choice  100.0%\n", "same choice   99.9%\n")
    assert not alike("same choice 99.9%", "same choice99.9%")


def test_a_failing_cell_is_named(tmp_path):
    path = tmp_path / "broken.ipynb"
    nbformat.write(notebook("1 + 1", "1 / 0"), path)
    with pytest.raises(click.ClickException, match=r"broken\.ipynb fails") as caught:
        run(path)
    assert "ZeroDivisionError" in caught.value.message
