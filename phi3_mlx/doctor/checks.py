"""The checks: what of a machine runs Phi-3, what does not, and what to type about it.

Each reads the facts of a `Machine` alone, so that any machine can be tested on any other.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .. import blas
from .facts import BACKENDS, Machine, leading_numbers

Status = Literal["ok", "note", "wrong"]

PYTHON, MACOS = (3, 10), (14, 0)  # the oldest that MLX is built for
# Metal ends kernels that hold the GPU for long, and steps of a long example do. It is read when MLX starts.
WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
_SLOW = 10e9  # float32 operations a second; a BLAS has several times as many on one core, MLX's own product fewer
_SMALLEST = 3e9  # bytes of disk that the smallest real model fills, and a bit
_ON_NVIDIA = "; with an NVIDIA GPU [cuda] instead of [cpu]"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cure` is what to type, where something can be done."""

    check: str
    status: Status
    text: str
    cure: str | None = None


def examine(machine: Machine) -> list[Finding]:
    """Every check's finding, in the order in which faults hinder."""
    findings: list[Finding] = []
    for check in _CHECKS:
        findings += check(machine)
    return findings


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
        release = _dotted(machine.macos)
        return [Finding("python", "wrong", f"macOS {release}: MLX needs {_dotted(MACOS)}", "softwareupdate --list")]
    if machine.system not in ("Darwin", "Linux"):
        return [Finding("python", "wrong", f"{text}: MLX runs on macOS and Linux, not on {machine.system}")]
    return [Finding("python", "ok", text)]


def _mlx(machine: Machine) -> list[Finding]:
    backends = {name: machine.installed[name] for name in BACKENDS if name in machine.installed}
    if machine.mlx is None:
        missing = "mlx" not in machine.installed
        reason = "it is not installed" if missing else str(machine.mlx_error)
        if machine.system == "Linux" and ("libmlx" in reason or not backends):
            cure = _install(machine, "cpu")
            reason = f"{reason if missing else f'{reason}; on Linux mlx comes without a backend'}{_ON_NVIDIA}"
        else:
            cure = f"pip install --force-reinstall {' '.join(['mlx', *backends])}"
        return [Finding("mlx", "wrong", f"MLX cannot be used: {reason}", cure)]
    mlx_version = machine.mlx["version"]
    text = f"{mlx_version}{''.join(f', {name} {number}' for name, number in backends.items())}"
    if len(backends) > 1:
        # They hold files of the same names: the one installed last decides, and removing it breaks the other.
        names = " ".join(backends)
        text += f": they overwrite each other's files{_ON_NVIDIA}"
        return [Finding("mlx", "wrong", text, f"pip uninstall -y {names} && {_install(machine, 'cpu')}")]
    if any(number != mlx_version for number in backends.values()):
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
        cure = f"pip uninstall -y mlx-cpu && {_install(machine, 'cuda')}"
        findings.append(Finding("device", "note", f"{text}, though there is an NVIDIA GPU", cure))
    else:
        findings.append(Finding("device", "ok", text))
    return [*findings, *_blas(machine, speed)]


def _blas(machine: Machine, speed: float) -> list[Finding]:
    library, why_not = machine.mlx.get("blas"), machine.mlx.get("no_blas")  # type: ignore[union-attr]
    if machine.blas_too_late:
        text = "MLX was imported before phi3_mlx in this process, which keeps its slow BLAS; import phi3_mlx first"
        return [Finding("blas", "note", text)]
    if speed >= _SLOW:
        return [Finding("blas", "ok", library)] if library else []
    reason = f" ({why_not})" if why_not else f" ({library})" if library else ""
    if why_not and why_not.startswith(blas.VARIABLE):
        return [Finding("blas", "note", f"float products are slow here{reason}", f"unset {blas.VARIABLE}")]
    cure = _install(machine, "cpu")
    return [Finding("blas", "note", f"float products are slow here{reason}; OpenBLAS is faster", cure)]


def _memory(machine: Machine) -> list[Finding]:
    if machine.mlx is None:
        return []
    from .. import sizes

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
    from ..engine.plan import Workload
    from ..store import hub

    assert machine.mlx is not None
    gpu = machine.mlx["backend"] != "CPU"
    fits = {}
    for alias in hub.ALIASES:
        workload = Workload.of_release(alias.shape, alias.bytes, fused_kernel=gpu)
        if longest := workload.crossing().longest(room):
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
    from ..engine.machine import available_ram

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
    good: list[str] = []
    missing: dict[str, list[str]] = {}  # the packages that an extra lacks
    for line in machine.required:
        requirement = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)(?:.*extra == ['\"]([\w-]+)['\"])?", line)
        if requirement is None:
            continue
        name, least, extra = requirement[1], requirement[2], requirement[3]
        have = machine.installed.get(name)
        if extra is None and (have is None or leading_numbers(have) < leading_numbers(least)):
            faults[name] = f"{name} {have or 'is missing'}{'' if have is None else f' (below {least})'}"
        elif extra is None:
            good.append(f"{name} {have}")
        elif extra in EXTRAS and have is None:
            missing.setdefault(extra, []).append(name)
    findings = []
    if faults:
        findings.append(
            Finding("packages", "wrong", ", ".join(faults.values()), f"pip install --upgrade {' '.join(faults)}")
        )
    else:
        findings.append(Finding("packages", "ok", ", ".join(good)))
    for extra, names in missing.items():
        text = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed: {EXTRAS[extra]}"
        findings.append(Finding("extras", "note", text, _install(machine, extra)))
    return findings


# What a user lacks without an extra; the others are for work on this package.
EXTRAS = {
    "schema": "answers of a given form and tools need it",
    "serve": "`phi3-mlx serve` does not start",
    "eval": "`phi3-mlx eval` asks lm-eval's tasks with it",
    "data": "`phi3-mlx data` finds near duplicates and reads Parquet and .zst files with it",
    "tiktoken": "the tokenizer of Phi-3-small needs it",
    "gguf": "`phi3-mlx convert` and `export` read and write GGUF files with it",
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


def _install(machine: Machine, extra: str) -> str:
    """What to type for an extra: of the package where it is installed, else of the clone that the doctor runs in."""
    package = "." if machine.required is None else "phi3-mlx"
    return f'pip install "{package}[{extra}]"'


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
