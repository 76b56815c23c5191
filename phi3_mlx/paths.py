"""Paths that people give. For one that is not a model or an adapter: what it is instead, and what to type."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path

from .fields import shorten
from .files import open_file, read_any_json

_GGUF = b"GGUF"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with the home directory for ~. A ~name of nobody stays: pathlib would raise RuntimeError."""
    return Path(os.path.expanduser(path))


def absolute_path(path: str) -> str:
    """A path that holds from any working folder; ~ is the home directory. Links stay."""
    return os.path.abspath(os.path.expanduser(path))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do; ollama keeps them under names without an ending."""
    try:
        with open_file(path) as file:
            return file.read(len(_GGUF)) == _GGUF
    except OSError:
        return False


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files of a directory, by name; of ollama's blobs too."""
    return [file for pattern in ("*.gguf", "sha256-*") for file in sorted(directory.glob(pattern)) if is_gguf(file)]


def convert_command(gguf: Path) -> str:
    """What to type for a GGUF file."""
    return f"phi3-mlx convert {shlex.quote(os.fspath(gguf))} -o NEW_DIRECTORY"


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has the file of some vocabulary (a link to a file that is gone is none)."""
    return any(path.exists() for pattern in _TOKENIZERS for path in directory.glob(pattern))


def no_model(directory: Path) -> str:
    """The message for a directory that was given as a model and has no config.json."""
    return f"{directory} has no config.json, so it is not a model directory; {instead_of_model(directory)}"


def instead_of_model(path: Path) -> str:
    """What a file, or a directory without config.json, is rather than a model; with what to type."""
    try:
        return _file(path) if path.is_file() else _directory(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def instead_of_adapter(path: Path) -> str:
    """What a path is rather than an adapter's folder; with what to type."""
    try:
        return _no_adapter(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _no_adapter(path: Path) -> str:
    if path.is_file():
        return f"it is a file; name its folder, {path.parent}"
    if not path.is_dir():
        return "check the path"
    if (path / "config.json").exists():
        return f"it is a model, to be given as such (model={os.fspath(path)!r})"
    if adapters := list(filter(_is_adapter, _below(path))):
        return f"its folder {adapters[0].name} is one; name {adapters[0]}"
    return _peft(path) or "name a folder that phi3-mlx tune or mlx-lm has written"


def _file(path: Path) -> str:
    if is_gguf(path):
        return f"it is a GGUF file: `{convert_command(path)}` makes a model directory of it"
    if path.suffix.lower() == ".gguf":
        return "it does not begin as a GGUF file does; download it again"
    if _is_adapter(path.parent):
        return _adapter(path.parent)
    if path.name == "adapter_model.safetensors":
        return _peft(path.parent)
    if (path.parent / "config.json").exists():
        return f"name the directory it is in, {path.parent}"
    return "name the directory it is in, with config.json and tokenizer files beside it"


def _directory(path: Path) -> str:
    if _is_adapter(path):
        return _adapter(path)
    if peft := _peft(path):
        return peft
    if (path / "snapshots").is_dir() and path.name.startswith("models--"):
        return f"it is a repository in the hub's cache; name {path.name.removeprefix('models--').replace('--', '/')}"
    if ggufs := gguf_files(path):
        return f"it holds a GGUF file: `{convert_command(ggufs[0])}` makes a model directory of it"
    models = [folder for folder in _below(path) if (folder / "config.json").exists()]
    if models:
        return f"its folder {models[0].name} has one; name {models[0]}"
    if adapters := list(filter(_is_adapter, _below(path))):
        return _adapter(adapters[0]).replace("it is", f"its folder {adapters[0].name} is", 1)
    if any(path.glob("*.safetensors")):
        return "it has weights; copy config.json and the tokenizer files there from the original model"
    if any(file for pattern in PICKLES for file in path.glob(pattern)):
        return "its weights are pickles, which are never read; get the model with model.safetensors"
    if has_tokenizer(path):
        return "it has a tokenizer alone; name one with config.json and weights"
    return "name one that has" if any(path.iterdir()) else "it is empty; name one that has"


def _is_adapter(path: Path) -> bool:
    return (path / "adapters.safetensors").is_file() and (path / "adapter_config.json").is_file()


def _adapter(path: Path) -> str:
    base = "a model"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        config = read_any_json(path / "adapter_config.json")
        base = shorten((config.get("base_model") or {}).get("name") or config.get("model") or base, quote=False)
    return (
        f"it is an adapter of {base}, to be given beside that (adapter={os.fspath(path)!r}); "
        f"`phi3-mlx fuse --adapter {shlex.quote(os.fspath(path))} -o NEW_DIRECTORY` makes one model of both"
    )


def _peft(path: Path) -> str:
    """ "" where it is not PEFT's folder."""
    if (path / "adapter_model.safetensors").is_file():
        return (
            f"it is a PEFT adapter: `phi3-mlx adapter import {shlex.quote(os.fspath(path))} -o NEW_FOLDER -m MODEL` "
            "makes an adapter of it"
        )
    if (path / "adapter_model.bin").is_file():
        return "it is a PEFT adapter as a pickle, which is never read; save it again as safetensors"
    return ""


def _below(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
