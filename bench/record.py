"""A published number's passport: machine, versions, date and the command, beside the rows.

One file a machine, in bench/results/ or where the environment variable PHI3_MLX_BENCH_RESULTS says:

    {"machine": ..., "results": {"decode": {"command": ..., "date": ..., "versions": {...}, "blas": ..., the bench's own
                                            facts ..., "rows": [{...}, ...]}, ...}}

`blas` is what multiplied floats on a CPU, in both packages; null: the reference BLAS of MLX's wheel.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phi3_mlx import blas
from phi3_mlx.store.atomic import replace_file

ELSEWHERE = "PHI3_MLX_BENCH_RESULTS"
PUBLISHED = Path(__file__).resolve().parent / "results"
RESULTS = Path(os.environ.get(ELSEWHERE) or PUBLISHED)


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, where the benches take whole models by default."""
    import mlx.core as mx  # here: a list of the benches loads no MLX

    return mx.default_device().type == mx.DeviceType.gpu


def machine() -> str:
    """What computes, the cores of a processor, and the system; machines that are alike end alike."""
    system = f"{platform.system()} {platform.machine()}"
    if on_gpu() and platform.system() != "Darwin":
        import mlx.core as mx

        return f"{mx.device_info(mx.gpu)['device_name']}, {system} with CUDA"
    name = platform.processor() or platform.machine()
    if platform.system() == "Darwin":  # which says "arm" of all its processors
        brand = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(brand, capture_output=True, text=True, check=False).stdout.strip() or name
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {system}"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, Python's first; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle and the ends of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def offline() -> dict[str, str]:
    """The environment of a process of either package: no hub, and this process' BLAS."""
    return {**os.environ, **blas.environment(), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def command() -> str:
    """What was typed: `python -m bench NAME ...`, also where the bench was run as `python -m bench.NAME ...`."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", "bench", *([] if module == "__main__" else [module]), *sys.argv[1:]])


def file_here() -> Path:
    """The file of this machine's results."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', machine().lower()).strip('-')}.json"


def write(name: str, rows: list[dict[str, Any]], *packages: str, **facts: Any) -> dict[str, Any]:
    """Put the result `name` into this machine's file and return it."""
    result = {
        "command": command(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(*packages),
        **({} if on_gpu() else {"blas": blas.describe()}),
        **facts,
        "rows": rows,
    }
    file = file_here()
    known = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else {}
    content = {"machine": machine(), "results": dict(sorted((known | {name: result}).items()))}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(content, indent=1) + "\n").encode())
    return result


def read(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The results by name, each with its machine: those of the system that most was measured on."""
    return next(iter(read_systems(folder).values()), {})


def read_systems(folder: Path | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """System ("Linux x86_64", "Linux x86_64 with CUDA") -> its results by name, in their order, each with its machine.

    Of the machines of a system the newest result; first the system that most was measured on.
    """
    files = sorted((RESULTS if folder is None else folder).glob("*.json"))
    systems: dict[str, list[dict[str, Any]]] = {}
    for content in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        results = [
            {"name": name, "machine": content["machine"], **result} for name, result in content["results"].items()
        ]
        systems.setdefault(content["machine"].rsplit(", ", 1)[-1], []).extend(results)
    found = {}
    for system, results in sorted(systems.items(), key=lambda item: -len(item[1])):
        newest = {result["name"]: result for result in sorted(results, key=lambda result: result["date"])}
        found[system] = dict(sorted(newest.items()))
    return found
