"""A published number's passport: machine, versions, date and the command, beside the rows.

One file a bench, in bench/results/ or where the environment variable PHI3_MLX_BENCH_RESULTS says:

    {"command": ..., "date": ..., "machine": ..., "versions": {...}, the bench's own facts ..., "rows": [{...}, ...]}
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ELSEWHERE = "PHI3_MLX_BENCH_RESULTS"
PUBLISHED = Path(__file__).resolve().parent / "results"
RESULTS = Path(os.environ.get(ELSEWHERE) or PUBLISHED)


def machine() -> str:
    """The processor's name and core count, and the system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


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


def command() -> str:
    """What was typed: `python -m bench NAME ...`, also where the bench was run as `python -m bench.NAME ...`."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", "bench", *([] if module == "__main__" else [module]), *sys.argv[1:]])


def write(path: Path, rows: list[dict[str, Any]], *packages: str, **facts: Any) -> dict[str, Any]:
    """Write a result file and return what it holds."""
    record = {
        "command": command(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(*packages),
        **facts,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
