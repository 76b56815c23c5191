"""Which files of a directory belong in a repository, and which stay here.

Files are taken by name, so what nobody thought of stays here. A file with a secret in it is refused.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..adapters.config import CONFIG as ADAPTER_CONFIG
from ..adapters.folder import WEIGHTS as ADAPTER_WEIGHTS
from ..errors import CheckpointError
from ..files import read_bytes
from ..store.hub import COMPANIONS
from ..store.safetensors import INDEX, weight_files

CARD = "README.md"
ContentKind = Literal["model", "adapter", "gguf"]
_WITH_ANY = (CARD, "LICENSE*", "LICENCE*", "NOTICE*")
_REPORTS = ("REPORT.md", "report.json", "report.png", "recipe.json", "calibration.json")
_BELONG: dict[ContentKind, tuple[str, ...]] = {
    "model": ("config.json", "model*.safetensors", INDEX, *COMPANIONS, *_REPORTS),
    "adapter": (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.safetensors", "loss.png"),
    "gguf": ("*.gguf", "*.Modelfile", "Modelfile"),
}
_DEEPEST_FOLDER, _MOST_FILES = 4, 20_000  # folders within folders, and files in all, that are looked at
_TEXT_SUFFIXES = (".json", ".md", ".txt", ".jinja", ".Modelfile", "")
_LONGEST_TEXT = 64 << 20
_SECRET_NAME = re.compile(
    r"\.env\b|\.netrc|(^|[._-])(tokens?|secrets?|credentials?|passwords?)([._-]|$)|id_(rsa|ed25519|ecdsa)|\.(pem|p12|key)$",
    re.IGNORECASE,
)
_SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b"),
    "a GitHub token": re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,})\b"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{24,}\b"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


@dataclass(frozen=True)
class Contents:
    """What is in a directory of `kind`: `files`, by their names in the repository, that go there; `left` stay here.

    `suspicious`: those that stay and whose names say that they hold secrets.
    """

    kind: ContentKind
    directory: Path
    files: dict[str, Path]
    left: tuple[str, ...]
    suspicious: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def contents_of(directory: Path) -> Contents:
    """Raises CheckpointError for a directory that is none of a model, an adapter or GGUF files, or is not complete, for
    links that lead out of it, and for files with a secret in them."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; name one that convert, fuse, tune or export has written")
    kind = _kind(directory)
    files: dict[str, Path] = {}
    left: list[str] = []
    for path in _paths(directory):
        name = path.relative_to(directory).as_posix()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in (*_BELONG[kind], *_WITH_ANY)):
            _check_is_here(directory, path)
            files[name] = path
        else:
            left.append(f"{name}/" if path.is_dir() else name)
    for name, path in files.items():
        if path.suffix in _TEXT_SUFFIXES:
            _check_no_secret(name, path)
    suspicious = tuple(name for name in left if _SECRET_NAME.search(name))
    return Contents(kind, directory, files, tuple(left), suspicious)


def _kind(directory: Path) -> ContentKind:
    if (directory / "config.json").is_file():
        files, missing = weight_files(directory)
        if not files or missing:
            lacking = f" ({missing[0]} is missing)" if missing else ""
            raise CheckpointError(
                f"{directory} has no complete model*.safetensors{lacking}; convert or download it again"
            )
        return "model"
    if (directory / ADAPTER_CONFIG).is_file():
        if not any((directory / name).is_file() for name in (ADAPTER_WEIGHTS, "adapter_model.safetensors")):
            raise CheckpointError(f"{directory} has no {ADAPTER_WEIGHTS}; name the folder of a run that has ended")
        return "adapter"
    if any(directory.glob("*.gguf")):
        return "gguf"
    raise CheckpointError(f"{directory} holds no model, adapter or GGUF file (no config.json); name one that does")


def _paths(directory: Path) -> Iterator[Path]:
    """Files, and the folders that are not looked into because nothing of theirs can belong."""
    count = 0
    for place, folders, names in os.walk(directory):
        inside = Path(place)
        depth = len(inside.relative_to(directory).parts)
        for folder in sorted(folders):
            if folder != "additional_chat_templates" or depth + 1 > _DEEPEST_FOLDER or (inside / folder).is_symlink():
                folders.remove(folder)
                yield inside / folder
        for name in sorted(names):
            count += 1
            if count > _MOST_FILES:
                raise CheckpointError(
                    f"{directory} has more than {_MOST_FILES:,} files; name a directory of a model alone"
                )
            yield inside / name


def _check_is_here(directory: Path, path: Path) -> None:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(directory)):
        raise CheckpointError(f"{path} is a link to {real}, outside {directory}; put a copy of the file there")
    if not real.is_file():
        raise CheckpointError(f"{path} is no file that can be read; remove it")


def _check_no_secret(name: str, path: Path) -> None:
    data = read_bytes(path, most=_LONGEST_TEXT)
    what = next((what for what, pattern in _SECRETS.items() if pattern.search(data)), None)
    if what is not None:
        raise CheckpointError(
            f"{path} holds {what}; take it out of the file, and revoke it, before {name} is published"
        )
