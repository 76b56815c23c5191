"""MLX multiplies with a fast BLAS on Linux, or as it always did; never with an error."""

import ctypes
import os
import subprocess
import sys

import pytest

from phi3_mlx import blas

_CPU = sys.platform == "linux" and blas._reference_blas()
packaged = pytest.mark.skipif(not (_CPU and blas._packaged()), reason="needs MLX's CPU wheel and the extra cpu")

MULTIPLY = """
import mlx.core as mx
import numpy as np
x, y = (mx.random.normal((97, 203), key=mx.random.key(0)), mx.random.normal((203, 61), key=mx.random.key(1)))
exact = np.array(x, dtype=np.float64) @ np.array(y, dtype=np.float64)
print(float(np.abs(np.array(x @ y) - exact).max()))
"""


def run(code, tmp_path, **environment):
    """What `code` printed, the file that MLX's `cblas_sgemm` was bound to, and what was said on stderr."""
    log = tmp_path / "linker"
    clean = {name: value for name, value in os.environ.items() if name not in (blas.VARIABLE, "LD_PRELOAD")}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(log)} | environment,
    ) as process:
        printed, said = process.communicate()
    assert process.returncode == 0, said
    lines = log.with_name(f"linker.{process.pid}").read_text(errors="replace").splitlines()
    bound = [line for line in lines if "libmlx.so" in line.split(" to ")[0] and "symbol `cblas_sgemm'" in line]
    library = os.path.basename(bound[-1].split(" to ")[1].split(" [")[0]) if bound else None
    return printed.split(), library, said


@packaged
def test_mlx_multiplies_with_the_packaged_library_to_rounding(tmp_path):
    printed, library, said = run(f"import phi3_mlx{MULTIPLY}", tmp_path)
    assert library == "libopenblas_python.so"
    assert said == ""
    assert float(printed[-1]) < 1e-4  # sums of 203 products of about 1, whose rounding is 6e-8 each


@packaged
@pytest.mark.parametrize("word", ["off", "OFF", "0"])
def test_it_is_off_where_the_variable_says_so(word, tmp_path):
    asked = "print(blas.preload(), blas.describe(), blas.environment())"
    code = f"import phi3_mlx{MULTIPLY}\nfrom phi3_mlx import blas\n{asked}"
    printed, library, said = run(code, tmp_path, PHI3_MLX_BLAS=word)
    assert library.startswith("libblas")
    assert said == ""
    assert printed[1:] == [f"PHI3_MLX_BLAS={word}", "None", "{}"]


@packaged
def test_where_mlx_was_imported_first_nothing_is_said_and_the_doctor_knows(tmp_path):
    asked = "from phi3_mlx.doctor.facts import look\nprint(look().blas_too_late)"
    code = f"import mlx.core\nimport phi3_mlx{MULTIPLY}\n{asked}"
    printed, library, said = run(code, tmp_path)
    assert library.startswith("libblas")
    assert said == ""
    assert printed[-1] == "True"


@packaged
@pytest.mark.parametrize("name", ["/no/such/library.so", "libm.so.6"])
def test_a_library_that_cannot_serve_is_named_and_nothing_else_is_taken(name, tmp_path):
    _, library, said = run(f"import phi3_mlx{MULTIPLY}", tmp_path, PHI3_MLX_BLAS=name)
    assert library.startswith("libblas")
    assert f"PHI3_MLX_BLAS={name} cannot be used" in said


@packaged
def test_a_library_that_is_preloaded_stays_and_is_what_another_process_gets(tmp_path):
    code = "import phi3_mlx\nfrom phi3_mlx import blas\nprint(blas.environment()['LD_PRELOAD'])"
    (file,), _, _ = run(code, tmp_path)
    printed, library, said = run(
        f"import phi3_mlx{MULTIPLY}\nprint(phi3_mlx.blas.preload())", tmp_path, LD_PRELOAD=file
    )
    assert library == os.path.basename(file)
    assert printed[-1] == "None"
    assert said == ""


@packaged
def test_products_of_two_threads_at_once_are_right(tmp_path):
    code = """
import phi3_mlx
import threading
import mlx.core as mx
import numpy as np
x = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
exact, errors = x.astype(np.float64) @ x, []
def work():
    for _ in range(20):
        errors.append(float(np.abs(np.array(mx.array(x) @ mx.array(x)) - exact).max()))
        x @ x  # numpy's own BLAS beside it
threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(errors), max(errors))
"""
    printed, _, _ = run(code, tmp_path)
    assert printed[0] == "40"
    assert float(printed[1]) < 5e-4


@pytest.fixture
def untouched(monkeypatch):
    """As in a process without MLX; a library that is loaded after all fails the test."""

    def loaded(*given, **_):
        raise AssertionError(f"{given} was loaded")

    monkeypatch.delenv(blas.VARIABLE, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", loaded)
    return monkeypatch


def test_nothing_is_loaded_on_a_mac(untouched):
    untouched.setattr(sys, "platform", "darwin")
    assert blas.preload.__wrapped__() is not None


def test_nothing_is_loaded_where_mlx_is_not_its_cpu_wheel(untouched, tmp_path):
    untouched.setattr(sys, "platform", "linux")
    (tmp_path / "mlx").mkdir()
    untouched.setattr(sys, "path", [str(tmp_path)])  # an MLX without the CPU wheel's libraries beside it
    untouched.delitem(sys.modules, "mlx", raising=False)
    assert blas.preload.__wrapped__() is not None
