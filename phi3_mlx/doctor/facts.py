"""The facts about this machine that the checks read.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from .. import blas
from ..store.hub import cache_folder

BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_SECONDS = 60

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


def look() -> Machine:
    """This machine."""
    system = platform.system()
    facts, error = ask_mlx()
    return Machine(
        system=system,
        architecture=platform.machine(),
        translated=system == "Darwin" and _sysctl("sysctl.proc_translated") == "1",
        macos=leading_numbers(platform.mac_ver()[0]),
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
    command = [sys.executable, "-c", _PROBE, str(Path(__file__).resolve().parents[2])]
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


def _installed() -> dict[str, str]:
    """Versions of MLX, its backends and what this package asks for."""
    versions = {}
    for name in {"mlx", *BACKENDS, *(re.split(r"[\s\[<>=;]", line)[0] for line in _required() or ())}:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


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


def leading_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "0.32.4.dev1" is (0, 32, 4)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
