"""A fast BLAS for MLX on Linux without a GPU.

MLX's CPU wheel brings the reference BLAS, whose float32 products are some twenty times slower than OpenBLAS'. The
dynamic linker binds a function to the first library in the process that has it (ld.so(8)), so an OpenBLAS that is
loaded with RTLD_GLOBAL before MLX takes the place of MLX's own. The extra `cpu` brings one with kernels for every
x86-64 and 64-bit ARM processor. Without it the system's is taken; where there is none, MLX is as slow as it was.

The environment variable PHI3_MLX_BLAS chooses: `off`, or the file of another library with the CBLAS interface.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from importlib.util import find_spec

VARIABLE = "PHI3_MLX_BLAS"
TOO_LATE = "MLX was imported before phi3_mlx"
_SYSTEM = "libopenblas.so.0"
_loaded: list[str] = []
_NEEDED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # what MLX's products call


@functools.cache
def preload() -> str | None:
    """Load a fast BLAS, once, unless MLX is in this process already or computes without the reference BLAS.

    Returns why none was loaded, None if one was (or is there, by LD_PRELOAD say). A library that PHI3_MLX_BLAS names
    and that cannot serve is a warning.
    """
    chosen = os.environ.get(VARIABLE, "")
    if sys.platform != "linux" or not _reference_blas():
        return "MLX does not use a reference BLAS here"
    if chosen.lower() in ("off", "0", "none"):
        return f"{VARIABLE}={chosen}"
    if "mlx.core" in sys.modules:
        return TOO_LATE
    if hasattr(ctypes.CDLL(None), _NEEDED[0]):
        return None
    for library in [chosen] if chosen else [_packaged(), _SYSTEM]:
        if library is None:
            continue
        try:
            _load(library)
        except OSError as error:
            if chosen:
                warnings.warn(f"{VARIABLE}={chosen} cannot be used ({error}); MLX's own BLAS is", stacklevel=2)
        else:
            return None
    return "no BLAS was found"


@functools.cache
def is_fast() -> bool:
    """Whether float32 products of MLX's CPU backend are computed by another than the reference BLAS."""
    return sys.platform != "linux" or not _reference_blas() or hasattr(ctypes.CDLL(None), _NEEDED[0])


def describe() -> str | None:
    """Name, version, kernels and threads of the OpenBLAS in this process, None without one."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "openblas_get_config"):
        return None
    process.openblas_get_config.restype = ctypes.c_char_p
    process.openblas_get_corename.restype = ctypes.c_char_p
    name, version = process.openblas_get_config().decode().split()[:2]
    threads = process.openblas_get_num_threads()
    return f"{name} {version}, {process.openblas_get_corename().decode()}, {threads} thread{'s' * (threads != 1)}"


def environment() -> dict[str, str]:
    """What gives another process, which may not import this package, the BLAS of this one."""
    return {"LD_PRELOAD": _loaded[0]} if _loaded else {}


def _reference_blas() -> bool:
    """Whether MLX is its CPU wheel, which has the reference BLAS beside it; its CUDA wheels do not."""
    package = find_spec("mlx")
    places = package.submodule_search_locations if package else None
    return any(os.path.isdir(os.path.join(place, os.pardir, "mlx_cpu.libs")) for place in places or ())


def _packaged() -> str | None:
    package = find_spec("scipy_openblas32")
    for place in (package.submodule_search_locations if package else None) or ():
        # Later releases of that package have other file and function names, which MLX does not look for.
        file = os.path.join(place, "lib", "libopenblas_python.so")
        if os.path.isfile(file):
            return file
    return None


def _load(library: str) -> None:
    """Put the functions of `library` before those of libraries loaded later. Raises OSError if it is none for MLX."""
    functions = ctypes.CDLL(library)
    missing = [name for name in _NEEDED if not hasattr(functions, name)]
    if missing:
        raise OSError(f"{library} has no {missing[0]}")
    if hasattr(functions, "openblas_get_config"):
        functions.openblas_get_config.restype = ctypes.c_char_p
        if b"USE64BITINT" in functions.openblas_get_config():
            raise OSError(f"{library} takes sizes of 64 bits, MLX gives 32")
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    _loaded.append(library)
