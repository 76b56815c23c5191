"""What of this machine runs Phi-3, what does not, and what to type about it.

`look()` gathers facts, each check reads them: a check needs no machine of its own, so that any can be tested anywhere.
`python3 -m phi3_mlx.doctor`, in a clone, needs nothing installed: it says why an installation fails.

Nothing here imports MLX before a process of its own has shown that it can be imported: a build for another processor
ends the process that tries, and Metal without a screen or a GPU does.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from . import blas
from .store.hub import cache_folder

Status = Literal["ok", "note", "wrong"]

PYTHON, MACOS = (3, 10), (14, 0)  # the oldest that MLX is built for
# Metal ends kernels that hold the GPU for long, and steps of a long example do. It is read when MLX starts.
WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
_BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_SLOW = 10e9  # float32 operations a second; a BLAS has several times as many on one core, MLX's own product fewer
_SMALLEST = 3e9  # bytes of disk that the smallest real model fills, and a bit
_SECONDS = 60
_LINUX_CURE = 'pip install "phi3-mlx[cpu]"'
_ON_NVIDIA = "; with an NVIDIA GPU [cuda] instead of [cpu]"

_PROBE = """
import json, sys, time
sys.path.append(sys.argv[1])
from phi3_mlx import blas  # first: it gives MLX a fast BLAS
import mlx.core as mx

gpu = mx.default_device().type == mx.DeviceType.gpu
info = mx.device_info(mx.gpu if gpu else mx.cpu)
x = mx.random.normal((512, 512))
mx.eval(x @ x)
seconds = []
for _ in range(2):
    started = time.perf_counter()
    mx.eval(x @ x)
    seconds.append(time.perf_counter() - started)
backend = "Metal" if gpu and mx.metal.is_available() else "CUDA" if gpu else "CPU"
facts = {"version": mx.__version__, "backend": backend, "flops": 2 * 512**3 / min(seconds)}
facts |= {"blas": blas.describe(), "no_blas": blas.preload()}
json.dump(facts | {key: value for key, value in info.items() if isinstance(value, (int, str))}, sys.stdout)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cure` is what to type, where something can be done."""

    check: str
    status: Status
    text: str
    cure: str | None = None


@dataclass(frozen=True)
class Machine:
    """The facts that the checks read; `look()` finds this machine's.

    `mlx`: what MLX says of itself and its device, or `mlx_error`, why it cannot be asked. `installed`: versions by
    package; `required`: the lines of this package's metadata, None where it is not installed.
    """

    system: str = "Darwin"
    architecture: str = "arm64"
    translated: bool = False  # an Intel program on Apple silicon
    macos: tuple[int, ...] = (15, 0)
    python: tuple[int, ...] = (3, 12, 0)
    executable: str = "python3"
    mlx: Mapping[str, Any] | None = None
    mlx_error: str | None = None
    nvidia: bool = False
    installed: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] | None = ()
    cache: Path | None = None
    blas_too_late: bool = False  # in this process MLX was imported before this package
    environment: Mapping[str, str] = field(default_factory=dict)


def examine(machine: Machine) -> list[Finding]:
    """Every check's finding, in the order in which faults hinder."""
    findings: list[Finding] = []
    for check in _CHECKS:
        findings += check(machine)
    return findings


def look() -> Machine:
    """This machine."""
    system = platform.system()
    facts, error = ask_mlx()
    return Machine(
        system=system,
        architecture=platform.machine(),
        translated=system == "Darwin" and _sysctl("sysctl.proc_translated") == "1",
        macos=_numbers(platform.mac_ver()[0]),
        python=tuple(sys.version_info[:3]),
        executable=sys.executable,
        mlx=facts,
        mlx_error=error,
        nvidia=shutil.which("nvidia-smi") is not None,
        installed=_installed(),
        required=_required(),
        cache=_cache(),
        blas_too_late=blas.preload() == blas.TOO_LATE,
        environment=os.environ,
    )


def ask_mlx() -> tuple[dict[str, Any] | None, str | None]:
    """What MLX says of itself in a process of its own, or why it does not: the last line of its complaint."""
    command = [sys.executable, "-c", _PROBE, str(Path(__file__).resolve().parents[1])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_SECONDS} seconds"
    try:
        return json.loads(done.stdout), None
    except ValueError:
        lines = done.stderr.strip().splitlines()
        ended = f"the process ended with signal {-done.returncode}" if done.returncode < 0 else "no answer"
        return None, lines[-1] if lines else ended


def report(findings: Sequence[Finding], status: Callable[[str], str] = "{:6}".format) -> str:
    """What `phi3-mlx doctor` prints; `status` writes the first column."""
    lines = []
    for finding in findings:
        lines.append(f"{status(finding.status)} {finding.check:9} {finding.text}")
        if finding.cure:
            lines.append(f"{'':16} → {finding.cure}")
    wrong = sum(finding.status == "wrong" for finding in findings)
    return "\n".join([*lines, "", f"{wrong} wrong." if wrong else "Nothing is wrong."])


def _python(machine: Machine) -> list[Finding]:
    text = f"{'.'.join(map(str, machine.python))}, {machine.architecture}, {machine.executable}"
    if machine.system == "Darwin" and machine.translated:
        return [
            Finding(
                "python",
                "wrong",
                f"{text}: an Intel build, which Rosetta translates; MLX exists for Apple silicon's own alone. Make "
                "a new environment with python.org's or Homebrew's Python",
                "arch -arm64 /bin/zsh -c 'brew install python'",
            )
        ]
    if machine.system == "Darwin" and machine.architecture != "arm64":
        return [Finding("python", "wrong", f"{text}: MLX does not run on Intel Macs; use Linux or Apple silicon")]
    if machine.python[:2] < PYTHON:
        cure = "brew install python@3.12" if machine.system == "Darwin" else "sudo apt-get install python3.12-venv"
        return [Finding("python", "wrong", f"{text}: older than {_dotted(PYTHON)}", cure)]
    if machine.system == "Darwin" and machine.macos < MACOS:
        found = _dotted(machine.macos)
        return [Finding("python", "wrong", f"macOS {found}: MLX needs {_dotted(MACOS)}", "softwareupdate --list")]
    if machine.system not in ("Darwin", "Linux"):
        return [Finding("python", "wrong", f"{text}: MLX runs on macOS and Linux, not on {machine.system}")]
    return [Finding("python", "ok", text)]


def _mlx(machine: Machine) -> list[Finding]:
    backends = {name: machine.installed[name] for name in _BACKENDS if name in machine.installed}
    if machine.mlx is None:
        missing = "mlx" not in machine.installed
        reason = "it is not installed" if missing else str(machine.mlx_error)
        if machine.system == "Linux" and ("libmlx" in reason or not backends):
            cure = _LINUX_CURE
            reason = f"{reason if missing else f'{reason}; on Linux mlx comes without a backend'}{_ON_NVIDIA}"
        else:
            cure = f"pip install --force-reinstall {' '.join(['mlx', *backends])}"
        return [Finding("mlx", "wrong", f"MLX cannot be used: {reason}", cure)]
    found = machine.mlx["version"]
    text = f"{found}{''.join(f', {name} {number}' for name, number in backends.items())}"
    if len(backends) > 1:
        # They hold files of the same names: the one installed last decides, and removing it breaks the other.
        names = " ".join(backends)
        text += f": they overwrite each other's files{_ON_NVIDIA}"
        return [Finding("mlx", "wrong", text, f"pip uninstall -y {names} && {_LINUX_CURE}")]
    if any(number != found for number in backends.values()):
        cure = f"pip install --upgrade mlx {' '.join(backends)}"
        return [Finding("mlx", "wrong", f"{text}: the two must be of one version", cure)]
    return [Finding("mlx", "ok", text)]


def _device(machine: Machine) -> list[Finding]:
    if machine.mlx is None:
        return []
    name, backend = machine.mlx.get("device_name", "unknown"), machine.mlx["backend"]
    if backend != "CPU":
        return [Finding("device", "ok", f"{backend}, {name}")]
    speed = machine.mlx["flops"]
    text = f"CPU, {name}, {speed / 1e9:,.0f} GFLOP/s in float32"
    if machine.system == "Darwin":
        return [Finding("device", "note", f"{text}: MLX sees no Metal here (a virtual machine, say), and is slow")]
    findings = []
    if machine.nvidia:
        cure = 'pip uninstall -y mlx-cpu && pip install "phi3-mlx[cuda]"'
        findings.append(Finding("device", "note", f"{text}, though there is an NVIDIA GPU", cure))
    else:
        findings.append(Finding("device", "ok", text))
    return [*findings, *_blas(machine, speed)]


def _blas(machine: Machine, speed: float) -> list[Finding]:
    found, why_not = machine.mlx.get("blas"), machine.mlx.get("no_blas")  # type: ignore[union-attr]
    if machine.blas_too_late:
        text = "MLX was imported before phi3_mlx in this process, which keeps its slow BLAS; import phi3_mlx first"
        return [Finding("blas", "note", text)]
    if speed >= _SLOW:
        return [Finding("blas", "ok", found)] if found else []
    reason = f" ({why_not})" if why_not else f" ({found})" if found else ""
    if why_not and why_not.startswith(blas.VARIABLE):
        return [Finding("blas", "note", f"float products are slow here{reason}", f"unset {blas.VARIABLE}")]
    return [Finding("blas", "note", f"float products are slow here{reason}; OpenBLAS is faster", _LINUX_CURE)]


def _memory(machine: Machine) -> list[Finding]:
    if machine.mlx is None:
        return []
    from . import sizes

    total, room = _room(machine)
    text = sizes.size_text(room)
    if machine.mlx["backend"] == "Metal":
        text = f"{sizes.size_text(total)}, of which Metal recommends to use {text}"
    elif machine.mlx["backend"] == "CUDA":
        text = f"{text} on the GPU"
    else:
        text = f"{text} are free"
    return [Finding("memory", "ok", text), _models(machine, room)]


def _models(machine: Machine, room: int) -> Finding:
    """What of the family fits, and the longest context of the largest that does."""
    from .engine import plan
    from .store import hub

    assert machine.mlx is not None
    gpu = machine.mlx["backend"] != "CPU"
    fits = {}
    for alias in hub.ALIASES:
        again = plan.reread_at_boundary(alias.shape)
        run = plan.Run(alias.shape, alias.bytes, 1, itemsize=2 if gpu else 4, fused=gpu, rereads=again)
        if longest := run.longest(room):
            fits[alias] = longest
    if not fits:
        return Finding("models", "note", "none of the released models fits; the bundled one does", "phi3-mlx models")
    largest = max(fits, key=lambda alias: alias.bytes)
    small = next((alias for alias in fits if alias.name == "phi-3.5-mini-4bit"), largest)
    named = f"the largest is {largest.name}, up to {fits[largest]:,} tokens"
    if small is not largest:
        named += f"; {small.name} up to {fits[small]:,}"
    status: Status = "ok" if len(fits) == len(hub.ALIASES) else "note"
    return Finding("models", status, f"{len(fits)} of {len(hub.ALIASES)} fit: {named}", "phi3-mlx plan -m NAME --here")


def _room(machine: Machine) -> tuple[int, int]:
    """(bytes there are, bytes that may be used)"""
    from .engine.machine import available_ram

    assert machine.mlx is not None
    if machine.mlx["backend"] == "CPU":
        room = available_ram()
        return room, room
    total = int(machine.mlx.get("memory_size") or machine.mlx.get("total_memory") or 0)
    return total, int(machine.mlx.get("max_recommended_working_set_size") or total)


def _disk(machine: Machine) -> list[Finding]:
    cache = machine.cache
    if cache is None:
        return []
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    cure = 'export HF_HOME="$HOME/.cache/huggingface"'
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        name = next((name for name in ("HF_HUB_CACHE", "HF_HOME") if machine.environment.get(name)), None)
        why = f" ({name} names it)" if name else ""
        return [
            Finding(
                "cache",
                "wrong",
                f"{cache}{why} cannot be written to, so nothing can be downloaded; name one that can",
                cure,
            )
        ]
    free = shutil.disk_usage(there).free
    text = f"{cache}, {free / 1e9:,.1f} GB free"
    if free < _SMALLEST:
        return [Finding("cache", "note", f"{text}: too little for a released model", "hf cache ls")]
    return [Finding("cache", "ok", text)]


def _offline(machine: Machine) -> list[Finding]:
    if machine.environment.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        return []
    return [Finding("network", "note", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE")]


def _packages(machine: Machine) -> list[Finding]:
    if machine.required is None:
        text = "phi3-mlx runs from a folder and is not installed, so no versions are known that it needs"
        return [Finding("packages", "note", text, "pip install -e .")]
    faults: dict[str, str] = {}
    good, missing = [], {}
    for line in machine.required:
        found = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)(?:.*extra == ['\"]([\w-]+)['\"])?", line)
        if found is None:
            continue
        name, least, extra = found[1], found[2], found[3]
        have = machine.installed.get(name)
        if extra is None and (have is None or _numbers(have) < _numbers(least)):
            faults[name] = f"{name} {have or 'is missing'}{'' if have is None else f' (below {least})'}"
        elif extra is None:
            good.append(f"{name} {have}")
        elif extra in EXTRAS and have is None:
            missing[extra] = name
    findings = []
    if faults:
        findings.append(
            Finding("packages", "wrong", ", ".join(faults.values()), f"pip install --upgrade {' '.join(faults)}")
        )
    else:
        findings.append(Finding("packages", "ok", ", ".join(good)))
    for extra, name in missing.items():
        text = f"{name} is not installed: {EXTRAS[extra]}"
        findings.append(Finding("extras", "note", text, f'pip install "phi3-mlx[{extra}]"'))
    return findings


# What a user lacks without an extra; the others are for work on this package.
EXTRAS = {
    "tiktoken": "the tokenizer of Phi-3-small needs it",
    "gguf": "`phi3-mlx convert` reads GGUF files with it",
    "plot": "`tune` and `convert` draw their plots with it",
}


def _watchdog(machine: Machine) -> list[Finding]:
    if machine.system != "Darwin" or machine.mlx is None:
        return []
    if machine.environment.get(WATCHDOG) == "1":
        return [Finding("tune", "ok", f"{WATCHDOG}=1: macOS does not kill long training steps")]
    text = (
        f"macOS may kill long training steps; `phi3-mlx tune` sets {WATCHDOG}; "
        "for a notebook, set it before you start Jupyter"
    )
    return [Finding("tune", "note", text, f"export {WATCHDOG}=1")]


_CHECKS: tuple[Callable[[Machine], list[Finding]], ...] = (
    _python,
    _mlx,
    _device,
    _memory,
    _disk,
    _offline,
    _packages,
    _watchdog,
)


def _installed() -> dict[str, str]:
    """Versions of MLX, its backends and what this package asks for."""
    found = {}
    for name in {"mlx", *_BACKENDS, *(re.split(r"[\s\[<>=;]", line)[0] for line in _required() or ())}:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _required() -> tuple[str, ...] | None:
    try:
        return tuple(requires("phi3-mlx") or ())
    except PackageNotFoundError:
        return None


def _cache() -> Path | None:
    try:
        return cache_folder()
    except ImportError:
        return None


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "0.32.4.dev1" is (0, 32, 4)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


if __name__ == "__main__":
    every = examine(look())
    print(report(every))
    sys.exit(any(finding.status == "wrong" for finding in every))
