"""`phi3-mlx doctor`: each fault of a faked machine is found and named, and a broken MLX does not break the doctor."""

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from phi3_mlx.cli import training
from phi3_mlx.doctor import checks, facts
from phi3_mlx.doctor.checks import examine
from phi3_mlx.doctor.facts import Machine

GB = 2**30
METAL = {
    "version": "0.32.4",
    "backend": "Metal",
    "flops": 3e12,
    "device_name": "Apple M2",
    "memory_size": 16 * GB,
    "max_recommended_working_set_size": 16 * GB * 2 // 3,
}
CPU = {"version": "0.32.4", "backend": "CPU", "flops": 80e9, "device_name": "a Xeon"}
REQUIRED = (
    "mlx>=0.32.0",
    "numpy>=1.26",
    'gguf>=0.17; extra == "gguf"',
    "tiktoken>=0.8; extra == 'tiktoken'",
    'pytest>=8.3; extra == "test"',
    'mlx[cpu]>=0.32.0; extra == "cpu"',
)
ALL = {"mlx": "0.32.4", "numpy": "2.4.6", "gguf": "0.17", "tiktoken": "0.8.1"}


@pytest.fixture
def mac(tmp_path):
    return Machine(mlx=METAL, installed=ALL | {"mlx-metal": "0.32.4"}, required=REQUIRED, cache=tmp_path / "hub")


@pytest.fixture
def linux(mac):
    return replace(mac, system="Linux", architecture="x86_64", mlx=CPU, installed=ALL | {"mlx-cpu": "0.32.4"})


def found(machine, check):
    """The status and the words of a check's one finding."""
    (finding,) = [one for one in examine(machine) if one.check == check]
    return finding.status, f"{finding.text} → {finding.cure}"


def wrong(machine):
    return [finding.check for finding in examine(machine) if finding.status == "wrong"]


def test_nothing_is_wrong_with_a_good_mac_or_linux_machine(mac, linux):
    for machine in (mac, linux):
        assert wrong(machine) == []
        assert all(finding.status == "ok" or finding.cure for finding in examine(machine))
    assert found(mac, "device") == ("ok", "Metal, Apple M2 → None")
    assert found(linux, "device")[0] == "ok"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "x86_64", "translated": True}, ["Rosetta", "Apple silicon", "arch -arm64"]),
        ({"architecture": "x86_64"}, ["Intel Macs"]),
        ({"python": (3, 9, 6)}, ["3.9.6", "older than 3.10", "brew install python"]),
        ({"macos": (13, 6)}, ["macOS 13.6", "14.0"]),
        ({"system": "Windows", "architecture": "AMD64"}, ["not on Windows"]),
    ],
)
def test_a_python_that_mlx_is_not_built_for(mac, change, words):
    status, text = found(replace(mac, **change), "python")
    assert status == "wrong"
    assert all(word in text for word in words), text


def test_oldest_supported_versions_are_fine(mac):
    assert wrong(replace(mac, python=(3, 10, 0), macos=(14, 0))) == []


def test_a_missing_backend_on_linux_names_both_extras(linux):
    broken = replace(linux, mlx=None, mlx_error="ImportError: libmlx.so: cannot open shared object file", installed=ALL)
    status, text = found(broken, "mlx")
    assert status == "wrong"
    assert "libmlx.so" in text
    assert 'pip install "phi3-mlx[cpu]"' in text
    assert "with an NVIDIA GPU [cuda]" in text
    # What needs MLX is left out, the rest is still looked at.
    assert {finding.check for finding in examine(broken)} == {"python", "mlx", "cache", "packages"}


def test_in_a_clone_that_is_not_installed_the_cure_installs_the_clone(linux):
    clone = replace(linux, required=None, installed={}, mlx=None, mlx_error="ModuleNotFoundError")
    assert 'pip install ".[cpu]"' in found(clone, "mlx")[1]
    assert 'pip install ".[cuda]"' in found(replace(linux, required=None, nvidia=True), "device")[1]


def test_mlx_that_is_missing_or_ends_its_process_on_a_mac(mac):
    gone = replace(mac, mlx=None, mlx_error="ModuleNotFoundError", installed={})
    assert "not installed" in found(gone, "mlx")[1]
    dead = replace(mac, mlx=None, mlx_error="the process ended with signal 4")
    status, text = found(dead, "mlx")
    assert status == "wrong"
    assert "signal 4" in text
    assert "pip install --force-reinstall mlx mlx-metal" in text


def test_backends_that_overwrite_each_other_or_are_of_another_version(linux):
    two = replace(linux, installed=ALL | {"mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.4"})
    status, text = found(two, "mlx")
    assert status == "wrong"
    assert "pip uninstall -y mlx-cpu mlx-cuda-13" in text
    status, text = found(replace(linux, installed=ALL | {"mlx-cpu": "0.31.0"}), "mlx")
    assert status == "wrong"
    assert "0.31.0" in text


def test_what_makes_linux_slow_is_a_note(linux):
    status, text = found(replace(linux, mlx=CPU | {"flops": 2e9, "no_blas": "no BLAS was found"}), "blas")
    assert status == "note"
    assert "no BLAS was found" in text
    assert 'pip install "phi3-mlx[cpu]"' in text
    status, text = found(replace(linux, mlx=CPU | {"flops": 2e9, "no_blas": "PHI3_MLX_BLAS=off"}), "blas")
    assert status == "note"
    assert "unset PHI3_MLX_BLAS" in text
    status, text = found(replace(linux, blas_too_late=True), "blas")
    assert status == "note"
    assert "import phi3_mlx first" in text
    assert found(replace(linux, mlx=CPU | {"blas": "OpenBLAS 0.3.23, Haswell, 2 threads"}), "blas")[0] == "ok"
    status, text = found(replace(linux, nvidia=True), "device")
    assert status == "note"
    assert "phi3-mlx[cuda]" in text


def test_a_mac_without_metal_is_told_so(mac):
    assert found(replace(mac, mlx=CPU), "device")[0] == "note"


def test_memory_says_what_of_the_family_fits(mac):
    assert "17.18 GB, of which Metal recommends to use 11.45 GB" in found(mac, "memory")[1]
    status, text = found(mac, "models")
    assert status == "note"
    assert "phi-3.5-mini-4bit up to" in text
    tokens = int(text.split("phi-3.5-mini-4bit up to ")[1].split(" ")[0].replace(",", ""))
    # 393,216 bytes a token beside 2.15 GB of weights.
    assert 0 < tokens < (METAL["max_recommended_working_set_size"] - 2.1e9) / 393_216
    big = replace(mac, mlx=METAL | {"memory_size": 128 * GB, "max_recommended_working_set_size": 96 * GB})
    assert found(big, "models")[0] == "ok"
    small = replace(mac, mlx=METAL | {"memory_size": GB, "max_recommended_working_set_size": GB})
    assert "none of the released models fits" in found(small, "models")[1]
    cuda = {"version": "0.32.4", "backend": "CUDA", "flops": 1e13, "device_name": "GPU", "total_memory": 80 * GB}
    assert found(replace(mac, system="Linux", mlx=cuda), "memory")[1].startswith("85.90 GB on the GPU")


def test_a_cache_folder_that_cannot_be_written(mac, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    broken = replace(mac, cache=file / "hub", environment={"HF_HOME": str(file)})
    status, text = found(broken, "cache")
    assert status == "wrong"
    assert "HF_HOME names it" in text
    assert "export HF_HOME" in text
    monkeypatch.setattr(checks.os, "access", lambda *_: False)  # as root every folder can be written
    assert found(mac, "cache")[0] == "wrong"


def test_a_full_disk_is_a_note(mac, monkeypatch):
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    status, text = found(mac, "cache")
    assert status == "note"
    assert "1.0 GB free" in text


def test_offline_is_a_note(mac):
    assert found(replace(mac, environment={"HF_HUB_OFFLINE": "1"}), "network")[0] == "note"
    assert not [one for one in examine(replace(mac, environment={"HF_HUB_OFFLINE": "0"})) if one.check == "network"]


def test_versions_below_what_is_needed_are_wrong_and_missing_extras_a_note(mac):
    status, text = found(replace(mac, installed=ALL | {"numpy": "1.25.9"}), "packages")
    assert status == "wrong"
    assert "numpy 1.25.9 (below 1.26)" in text
    installed = {name: number for name, number in ALL.items() if name not in ("gguf", "numpy")}
    machine = replace(mac, installed=installed)
    assert "numpy is missing" in found(machine, "packages")[1]
    status, text = found(machine, "extras")
    assert status == "note"
    assert 'pip install "phi3-mlx[gguf]"' in text
    assert found(replace(mac, required=None), "packages")[0] == "note"


def test_an_extra_that_lacks_several_packages_is_one_note(mac):
    served = tuple(f'{name}>=0.1; extra == "serve"' for name in ("starlette", "uvicorn"))
    notes = [one for one in examine(replace(mac, required=REQUIRED + served)) if one.check == "extras"]
    (note,) = notes
    assert (note.text, note.cure) == (
        "starlette, uvicorn are not installed: `phi3-mlx serve` does not start",
        'pip install "phi3-mlx[serve]"',
    )


def test_extras_named_here_are_those_of_the_package():
    listed = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", listed, re.M))
    assert extras - {*checks.EXTRAS} == {*"cpu cuda docs notebooks parity tensorboard test".split()}
    assert {*checks.EXTRAS} < extras


def test_the_watchdog_is_that_of_tune(mac):
    assert checks.WATCHDOG == training.WATCHDOG
    assert found(mac, "tune")[0] == "note"
    assert found(replace(mac, environment={checks.WATCHDOG: "1"}), "tune")[0] == "ok"


def run(path, *arguments):
    """`phi3-mlx doctor` with `path` before everything else that Python imports from."""
    code = "from phi3_mlx.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, "-c", code, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_this_machine_as_json():
    done = run([], "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["wrong"] else 0), done.stderr
    assert report["wrong"] == sum(check["status"] == "wrong" for check in report["checks"])
    statuses = {check["check"]: check["status"] for check in report["checks"]}
    assert statuses["mlx"] == statuses["device"] == "ok"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ('raise ImportError("libmlx.so: cannot open shared object file")', "libmlx.so: cannot open"),
        ("import os; os.abort()", "signal 6"),
        ("print('no JSON')", "no attribute"),
    ],
)
def test_it_works_where_mlx_does_not(tmp_path, fault, words):
    folder = Path(tmp_path, "mlx")
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(fault)
    done = run([tmp_path])
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert "mlx" in line
    assert words in line
    assert "pip install" in done.stdout
    assert done.stdout.endswith("1 wrong.\n")
    assert done.stderr == ""


def test_it_works_where_nothing_is_installed(tmp_path):
    """As after a failed installation: the standard library and the clone."""
    venv.create(tmp_path / "venv", symlinks=True)
    command = [tmp_path / "venv" / "bin" / "python", "-m", "phi3_mlx.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 1, done.stderr
    assert re.search(r"^wrong  mlx       MLX cannot be used: it is not installed", done.stdout, re.M)
    assert done.stdout.endswith(" wrong.\n")


def test_an_mlx_that_never_answers(monkeypatch):
    def never(*_, **options):
        raise subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setattr(facts.subprocess, "run", never)
    said, why = facts.ask_mlx()
    assert said is None
    assert "seconds" in why
