"""Where a source is, and of which kind; and what a GGUF file says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..paths import expanded, is_gguf
from ..store.hub import find_alias, resolve
from .directory import DirectorySource
from .sources import OpenedSource

if TYPE_CHECKING:
    from .gguf.measurement import Measurement

REVISION_KEY = "phi3_mlx.revision"


@dataclass(frozen=True)
class AboutGguf:
    """What a GGUF file is: a whole model or `is_adapter`, its `type` ("Q4_K_M"), the address of its base model and that
    one's `revision`, and what rounding cost. None: the file does not say.
    """

    is_adapter: bool
    type: str | None
    bits_per_weight: float
    base: str | None
    revision: str | None
    measured: Measurement | None


def about_gguf(path: Path) -> AboutGguf:
    """Reads the header alone, of a file or of several parts, of which `path` is the first.

    Raises CheckpointError for a file that is damaged, and where the `gguf` library is not installed.
    """
    from .gguf.file import GgufFile
    from .gguf.measurement import measurement_of
    from .gguf.types import FILE_TYPES

    file = GgufFile(path)
    metadata, tensors = file.metadata, file.tensors.values()
    number = metadata.get("general.file_type")
    base = metadata.get("general.base_model.0.repo_url", metadata.get("general.source.url"))
    revision = metadata.get(REVISION_KEY)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return AboutGguf(
        is_adapter=metadata.get("general.type") == "adapter",
        type=next((name.upper() for name, known in FILE_TYPES.items() if known.number == number), None),
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / max(1, weights),
        base=base if isinstance(base, str) else None,
        revision=revision if isinstance(revision, str) else None,
        measured=measurement_of(metadata),
    )


def open_source(path: Path) -> OpenedSource:
    """The checkpoint in a model directory or a GGUF file; headers are read, weights are not.

    Raises CheckpointError or ConfigError for what is missing, damaged, or not a model this package can compute.
    """
    if path.is_dir():
        return DirectorySource(path)
    from .gguf.source import GgufSource

    return GgufSource(path)


def find_source(source: str | Path, revision: str | None = None) -> Path:
    """The GGUF file, or the directory, of a model's name; a repository is downloaded if need be.

    Raises OptionError for the revision of a file, ModelNotFoundError.
    """
    path = expanded(source)
    named = path.suffix.lower() == ".gguf" and (path.is_file() or not path.exists())
    if named or (find_alias(str(source)) is None and is_gguf(path)):
        if revision is not None:
            raise OptionError(f"a revision is for Hugging Face repositories, and {source} is a file; leave it out")
        return path
    return resolve(str(source), revision)
