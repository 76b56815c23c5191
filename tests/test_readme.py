"""Every command and every example of the README does what it says; every figure comes from a result file."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
SHELL = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```shell\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
COMMANDS = [line for line in SHELL if line.startswith("phi3-mlx ")]


def test_every_shell_line_is_known_here():
    assert COMMANDS
    assert [line.split()[0] for line in SHELL if line not in COMMANDS] == ["make", "make", "pip", "pip"]
    targets = (ROOT / "Makefile").read_text()
    for line in SHELL:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", targets, re.M), line


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path):
    (tmp_path / "notes.txt").write_text("The dog ran.")
    words = shlex.split(command)[1:]
    home = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "hub")}
    program = [sys.executable, "-c", "from phi3_mlx.cli import main; main()"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, cwd=tmp_path, env=home, input="")
    if "-m" in words:  # a real model: without the network the name is known, and the message says what is missing
        assert done.returncode == 1
        assert "HF_HUB_OFFLINE" in done.stderr
        # The same command with the bundled model instead.
        words[words.index("-m") + 1] = "tiny"
        done = subprocess.run([*program, *words], capture_output=True, text=True, cwd=tmp_path, env=home, input="")
    assert done.returncode == 0, done.stderr
    assert done.stdout or words[0] == "chat"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_examples_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("block", ["demo", "parity", "speed"])
def test_figures_and_story_come_from_their_sources(block):
    from bench.readme import BLOCKS, filled

    assert filled(README, {block: BLOCKS[block]()}) == README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
