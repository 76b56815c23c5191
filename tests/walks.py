"""Pages that are walks: their commands, one after the other in one folder."""

import re
import shlex
import subprocess
import sys

from conftest import ROOT


def blocks(page, language):
    """The blocks of a language in a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def walk(page, folder, monkeypatch, files=None):
    """Run a page's Python and then its commands, as they stand; what each command printed, by its line.

    `files`: where blocks of other languages go, which a reader saves.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    for language, name in (files or {}).items():
        (block,) = blocks(page, language)
        (folder / name).write_text(block, encoding="utf-8")
    (code,) = blocks(page, "python")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    said = {}
    for line in (line for block in blocks(page, "bash") for line in block.splitlines()):
        words = shlex.split(line)
        assert words[0] == "phi3-mlx"
        done = subprocess.run(
            [sys.executable, "-m", "phi3_mlx", *words[1:]], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said[line] = done.stdout
    return said
