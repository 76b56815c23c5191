"""llama.cpp under control vectors, which node-llama-cpp has no call for: by the library itself, in another process.

llama.cpp's own function reads the file, and its layers add what it read. Its structs are passed as Linux on x86-64 does
it, so it is tried there alone. `python tests/llama_steering.py` writes tests/golden/steering.npz, for other machines.
"""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import mlx.core as mx
import numpy as np

GOLDEN = llama_cpp.ROOT / "tests" / "golden" / "steering.npz"
# The strength of the vectors, and the layers whose vectors are added, None for all; None without a file.
CASES = [None, (1.0, None), (-0.5, None), (1.0, (2, 3)), (1.0, (5, 5))]


def libraries() -> dict[str, Path]:
    """llama.cpp's libraries by name, {} where there are none."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return {}
    folders = {file.parent for file in llama_cpp.HOME.glob("node_modules/@node-llama-cpp/*/bins/*/libllama-common.so")}
    found = {}
    for name in ("libggml-base", "libggml", "libllama", "libllama-common"):
        for folder in folders:
            files = [*folder.glob(f"{name}.so"), *folder.glob(f"{name}.v*.so")]
            found.update({name: files[0]} if files else {})
    return found if len(found) == 4 else {}


MISSING = llama_cpp.MISSING or ("" if libraries() else "control vectors are tried on Linux on x86-64 alone")


def vectors() -> dict[int, mx.array]:
    """Of some layers of the bundled model."""
    rng = np.random.default_rng(0)
    return {layer: mx.array(3 * rng.standard_normal(256).astype(np.float32)) for layer in (1, 3, 5)}


def steered(
    model: Path, ids: Sequence[int], file: Path | None, strength: float = 1.0, layers: tuple[int, int] | None = None
) -> np.ndarray:
    """Logits of the last of `ids`, under the vectors of a file."""
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "model": str(model),
            "ids": list(ids),
            "file": None if file is None else str(file),
            "strength": strength,
            "layers": layers or (1, 10**6),
            "libraries": {name: str(path) for name, path in libraries().items()},
            "logits": f"{folder}/logits.npy",
        }
        child = [sys.executable, "-c", "import llama_steering; llama_steering.answer()"]
        done = subprocess.run(
            child, input=json.dumps(request), capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent
        )
        if done.returncode:
            raise llama_cpp.LlamaCppError(done.stderr.strip() or f"llama.cpp ended with {done.returncode}")
        return np.load(request["logits"])


# In the process of llama.cpp


class _Struct(ctypes.Structure):
    """Any struct of up to 1 KB that is handed on as it was got."""

    _fields_ = (("numbers", ctypes.c_uint64 * 128),)


class _String(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("length", ctypes.c_size_t), ("short", ctypes.c_char * 16))


class _Load(ctypes.Structure):
    _fields_ = (("strength", ctypes.c_float), ("_", ctypes.c_int), ("file", _String))


class _Vector(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p))


class _Loaded(ctypes.Structure):
    _fields_ = (("width", ctypes.c_int), ("_", ctypes.c_int), ("data", _Vector))


_LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def answer() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    loaded = {name: ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for name, path in request["libraries"].items()}
    llama = loaded["libllama"]
    quiet = _LOG(lambda *_: None)
    llama.llama_log_set(quiet, None)
    folder = str(Path(request["libraries"]["libggml"]).parent)
    loaded["libggml"].ggml_backend_load_all_from_path(folder.encode())
    llama.llama_backend_init()
    for name in ("llama_model_default_params", "llama_context_default_params", "llama_batch_get_one"):
        getattr(llama, name).restype = _Struct
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab"):
        getattr(llama, name).restype = ctypes.c_void_p
    params = llama.llama_model_default_params()
    model = ctypes.c_void_p(llama.llama_model_load_from_file(request["model"].encode(), params))
    context = ctypes.c_void_p(llama.llama_init_from_model(model, llama.llama_context_default_params()))
    llama.llama_set_n_threads(context, 1, 1)
    if request["file"] is not None:
        width, numbers = _read(loaded["libllama-common"], request["file"], request["strength"])
        first, last = request["layers"]
        llama.llama_set_adapter_cvec(context, numbers, ctypes.c_size_t(len(numbers)), width, first, last)
    ids = (ctypes.c_int32 * len(request["ids"]))(*request["ids"])
    if llama.llama_decode(context, llama.llama_batch_get_one(ids, len(ids))):
        raise SystemExit("llama.cpp did not read the ids")
    size = llama.llama_vocab_n_tokens(ctypes.c_void_p(llama.llama_model_get_vocab(model)))
    llama.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    np.save(request["logits"], np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size,)))


def _read(common: ctypes.CDLL, file: str, strength: float) -> tuple[int, ctypes.Array]:
    """The width of the vectors of a file, and the numbers of all layers from 1 on, `strength` times."""
    path = ctypes.create_string_buffer(file.encode())
    one = _Load(strength, 0, _String(ctypes.addressof(path), len(file.encode()), b""))
    begin, end = ctypes.addressof(one), ctypes.addressof(one) + ctypes.sizeof(one)
    read = getattr(common, _LOAD)
    read.restype = _Loaded
    loaded = read(ctypes.byref(_Vector(begin, end, end)))
    if loaded.width <= 0 or not loaded.data.begin:
        raise SystemExit("llama.cpp refuses the file of vectors")
    count = (loaded.data.end - loaded.data.begin) // ctypes.sizeof(ctypes.c_float)
    return loaded.width, (ctypes.c_float * count).from_address(loaded.data.begin)


def make_golden() -> None:
    from phi3_mlx import encode_prompt, export_gguf, load_tokenizer, save_steering

    ids = encode_prompt(load_tokenizer("tiny"), "Tell me a story about a duck and a frog.")
    with tempfile.TemporaryDirectory() as folder:
        model = export_gguf("tiny", Path(folder) / "tiny.gguf", type="f32").files[0]
        file = save_steering(vectors(), Path(folder) / "vectors.gguf")
        logits = [steered(model, ids, file, *case) if case else steered(model, ids, None) for case in CASES]
    np.savez_compressed(GOLDEN, ids=np.array(ids, np.uint16), logits=np.stack(logits)[:, ::7].astype(np.float32))


if __name__ == "__main__":
    make_golden()
