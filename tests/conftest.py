"""What the tests share. `shared` is real material beside the checkout; tests that use it skip where it is not."""

import functools
import json
import os
import platform
import re
import signal
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import pytest

import phi3_mlx  # noqa: F401  (before any test imports MLX, which then multiplies with a fast BLAS)

# In the background of some shells Ctrl-C is ignored, under nohup the end of the terminal, by what tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with real configs, tokenizers and text: $PHI3_MLX_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("PHI3_MLX_SHARED", ROOT.parent / "shared"))
    if not (folder / "configs").is_dir():
        pytest.skip("no shared material beside the checkout")
    return folder


@pytest.fixture(scope="module")
def sharing_at_once():
    """Rows of like length share arrays from their first token on, not only once they have brought some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi3_mlx.models.slots.SETTLED", 0)
        yield


LONG = os.environ.get("PHI3_MLX_TEST_LONG") == "1"
_STARTED = time.monotonic()


_ORACLES = re.compile(
    r"""importorskip\("(torch|transf|peft|trl|playwright)|make_torch|reference_steps"""
    r"""|import (torch|peft|llama_cpp)|which\("go"""
)


@functools.cache
def _is_live(path):
    return _ORACLES.search(path.read_text(encoding="utf-8")) is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if _is_live(item.path):
            item.add_marker("live")
        if item.get_closest_marker("long") and not LONG:
            item.add_marker(pytest.mark.skip(reason="takes long; `make test-long` runs it"))


def pytest_terminal_summary(terminalreporter, config):
    """What `make test-long` found stays in the tree, since it is run by hand."""
    if not LONG or hasattr(config, "workerinput"):
        return
    outcomes = ("passed", "failed", "error", "skipped")
    reports = {name: terminalreporter.stats.get(name, []) for name in outcomes}
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "mlx": version("mlx")},
        "minutes": round((time.monotonic() - _STARTED) / 60, 1),
        **{name: len(found) for name, found in reports.items()},
        "tests": sorted(report.nodeid for name in ("passed", "failed") for report in reports[name]),
    }
    (ROOT / "tests" / "long.json").write_text(json.dumps(result, indent=1) + "\n")
