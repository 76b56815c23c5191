"""What the tests share. `shared` is real material beside the checkout; tests that use it skip where it is not."""

import gc
import json
import os
import platform
import random
import signal
import tempfile
import time
import zlib
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from live import SKIPPED, is_live

import phi3_mlx  # noqa: F401  (before any test imports MLX, which then multiplies with a fast BLAS)

# In the background of some shells Ctrl-C is ignored, under nohup the end of the terminal, by what tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What a user's shell says of colours, widths, keys and proxies is not for the tests, nor which models are in a cache.
_SHELLS = """
COLUMNS LINES NO_COLOR FORCE_COLOR CLICOLOR CLICOLOR_FORCE PHI3_MLX_DEBUG PHI3_MLX_API_KEY TQDM_DISABLE
OPENAI_API_KEY OPENAI_BASE_URL HF_TOKEN HF_HUB_CACHE HF_HUB_OFFLINE
http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
"""
for _name in _SHELLS.split():
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose processes inherit it
    _HUB = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
    os.environ["HF_HOME"] = _HUB.name

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
SEED = os.environ.get("PHI3_MLX_TEST_SEED", "0")  # another draws other models, adapters and examples
_STARTED = time.monotonic()

settings.register_profile("every day", derandomize=True)
if SEED == "0" and not LONG:
    settings.load_profile("every day")


def long_after(count, cases):
    """Parameters of a test: the first `count` are tried every day, the others by `make test-long`."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.long] * (n >= count)) for n, case in enumerate(cases)]


def pytest_collection_modifyitems(items):
    for item in items:
        if is_live(item.path, [item.originalname, *item.fixturenames]):
            item.add_marker("live")
        if item.get_closest_marker("long") and not LONG:
            item.add_marker(pytest.mark.skip(reason="takes long; `make test-long` runs it"))


def pytest_collection_finish():
    """Half a million objects of imported modules stay, so `gc.collect`, which each tuning calls, need not visit them.

    It took half a second of every such call, and most of the time of the tests of tuning.
    """
    gc.collect()
    gc.freeze()


def _draw_anew(*names):
    """MLX's own seed is the time: what is drawn without a key would be another in each run."""
    import mlx.core as mx

    seed = zlib.crc32(" ".join([SEED, *map(str, names)]).encode())
    mx.random.seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """Wherever else it is used, and whatever drew before it."""
    _draw_anew(request.node.nodeid, fixturedef.argname, getattr(request, "param_index", 0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _draw_anew(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A test that is skipped without a reference, and that `make test-live` would not run either, fails."""
    report = yield
    if report.skipped and SKIPPED.search(str(report.longrepr)) and not item.get_closest_marker("live"):
        report.outcome, report.longrepr = "failed", f"nothing runs this test; see tests/live.py: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """What `make test-long` found stays in the tree, since it is run by hand; not what a part of it found."""
    part = config.args_source is config.ArgsSource.ARGS or config.option.keyword
    if not LONG or hasattr(config, "workerinput") or part or exitstatus > 1:
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
