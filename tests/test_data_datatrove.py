"""docs/data.md shares the files of a step out by datatrove: its script runs, and goes on where it was killed."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("datatrove")
SCRIPTS = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.M | re.S)
(LOCAL,) = (script for script in SCRIPTS if "LocalPipelineExecutor(" in script)
(CLUSTER,) = (script for script in SCRIPTS if "SlurmPipelineExecutor(" in script)
SHORT = "A dog."
GOOD = "The {n}. dog ran to the river and met a frog that lives with a duck, and number {n} was glad."


@pytest.fixture
def pages(tmp_path):
    (tmp_path / "pages").mkdir()
    for shard in range(8):
        rows = [{"text": SHORT if n % 5 == 0 else GOOD.format(n=f"{shard}x{n}")} for n in range(20)]
        (tmp_path / "pages" / f"{shard}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def run_script(folder):
    (folder / "run.py").write_text(LOCAL, encoding="utf-8")
    ran = subprocess.run([sys.executable, "run.py"], cwd=folder, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]


def kept(*folders):
    return sorted(line for folder in folders for line in (folder / "data.jsonl").read_text().splitlines())


@pytest.mark.long
def test_the_script_of_the_page_gives_the_records_of_one_run_and_repeats_only_tasks_that_were_not_complete(pages):
    from phi3_mlx import data_stats, filter_data

    run_script(pages)
    parts = sorted((pages / "good").iterdir())
    assert [part.name for part in parts] == ["00000", "00001", "00002", "00003"]
    report = filter_data([pages / "pages"], pages / "whole", rules="gopher", min_words=3)
    assert 0 < report["kept"] < report["read"] == 160
    assert kept(*parts) == kept(pages / "whole")
    assert data_stats(pages / "good")["read"] == report["kept"]
    (pages / "logs" / "completions" / "00002").unlink()  # as if that task had been killed
    before = {part.name: part.stat().st_ino for part in parts}
    run_script(pages)
    changed = [name for name, place in before.items() if (pages / "good" / name).stat().st_ino != place]
    assert changed == ["00002"]
    assert kept(*parts) == kept(pages / "whole")


def test_the_executors_of_clusters_take_what_the_page_gives_them():
    import ast
    import inspect

    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

    kinds = {"RayPipelineExecutor": RayPipelineExecutor, "SlurmPipelineExecutor": SlurmPipelineExecutor}
    calls = [
        node for node in ast.walk(ast.parse(CLUSTER)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert {call.func.id for call in calls} == {*kinds}
    for call in calls:
        inspect.signature(kinds[call.func.id]).bind(*call.args, **{key.arg: key.value for key in call.keywords})
