"""From a model's name to its local directory: bundled, an alias, a path, or a repository of the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .. import values
from ..errors import ModelNotFoundError, OptionError, Phi3Error
from ..files import read_text
from ..paths import has_tokenizer, instead_of_model
from .safetensors import INDEX, weight_files

if TYPE_CHECKING:
    from ..config import Config


@dataclass(frozen=True)
class Alias:
    """A short name for a repository, which holds `member` (of `family.MEMBERS`) with `bits` bits a weight."""

    name: str
    repo_id: str
    member: str
    bits: int

    @property
    def shape(self) -> Config:
        """What memory depends on."""
        from .family import MEMBERS

        return MEMBERS[self.member].shape

    @property
    def parameters(self) -> int:
        """How many numbers the model learned."""
        from .family import MEMBERS

        return MEMBERS[self.member].parameters

    @property
    def bytes(self) -> int:
        """The size of its weights, estimated."""
        from .family import packed_bytes

        return packed_bytes(self.parameters, self.bits)


@dataclass(frozen=True)
class ModelRow:
    """A line of `phi3-mlx models`; `path` is None for a model that is not on this disk."""

    name: str
    repo_id: str | None
    parameters: int | None
    bits: int
    bytes: int
    context: int
    path: Path | None


def _alias(name: str, repo: str, member: str) -> Alias:
    width = re.search(r"-(\d)bit$", name)
    return Alias(name, f"{'mlx-community' if width else 'microsoft'}/{repo}", member, int(width[1]) if width else 16)


ALIASES = (
    _alias("phi-3-mini-4k", "Phi-3-mini-4k-instruct", "phi-3-mini-4k"),
    _alias("phi-3-mini-4k-4bit", "Phi-3-mini-4k-instruct-4bit", "phi-3-mini-4k"),
    _alias("phi-3-mini-4k-8bit", "Phi-3-mini-4k-instruct-8bit", "phi-3-mini-4k"),
    _alias("phi-3-mini-128k", "Phi-3-mini-128k-instruct", "phi-3-mini-128k"),
    _alias("phi-3-mini-128k-4bit", "Phi-3-mini-128k-instruct-4bit", "phi-3-mini-128k"),
    _alias("phi-3-mini-128k-8bit", "Phi-3-mini-128k-instruct-8bit", "phi-3-mini-128k"),
    _alias("phi-3-small-8k", "Phi-3-small-8k-instruct", "phi-3-small-8k"),
    _alias("phi-3-small-128k", "Phi-3-small-128k-instruct", "phi-3-small-128k"),
    _alias("phi-3-medium-4k", "Phi-3-medium-4k-instruct", "phi-3-medium-4k"),
    _alias("phi-3-medium-4k-4bit", "Phi-3-medium-4k-instruct-4bit", "phi-3-medium-4k"),
    _alias("phi-3-medium-128k", "Phi-3-medium-128k-instruct", "phi-3-medium-128k"),
    _alias("phi-3-medium-128k-4bit", "Phi-3-medium-128k-instruct-4bit", "phi-3-medium-128k"),
    _alias("phi-3.5-mini", "Phi-3.5-mini-instruct", "phi-3.5-mini"),
    _alias("phi-3.5-mini-4bit", "Phi-3.5-mini-instruct-4bit", "phi-3.5-mini"),
    _alias("phi-3.5-mini-8bit", "Phi-3.5-mini-instruct-8bit", "phi-3.5-mini"),
    _alias("phi-3.5-moe", "Phi-3.5-MoE-instruct", "phi-3.5-moe"),
    _alias("phi-3.5-moe-4bit", "Phi-3.5-MoE-instruct-4bit", "phi-3.5-moe"),
    _alias("phi-3.5-moe-8bit", "Phi-3.5-MoE-instruct-8bit", "phi-3.5-moe"),
    _alias("phi-4", "phi-4", "phi-4"),
    _alias("phi-4-4bit", "phi-4-4bit", "phi-4"),
    _alias("phi-4-8bit", "phi-4-8bit", "phi-4"),
    _alias("phi-4-reasoning", "Phi-4-reasoning", "phi-4-reasoning"),
    _alias("phi-4-reasoning-4bit", "Phi-4-reasoning-4bit", "phi-4-reasoning"),
    _alias("phi-4-reasoning-plus", "Phi-4-reasoning-plus", "phi-4-reasoning"),
    _alias("phi-4-reasoning-plus-4bit", "Phi-4-reasoning-plus-4bit", "phi-4-reasoning"),
    _alias("phi-4-mini", "Phi-4-mini-instruct", "phi-4-mini"),
    _alias("phi-4-mini-4bit", "Phi-4-mini-instruct-4bit", "phi-4-mini"),
    _alias("phi-4-mini-8bit", "Phi-4-mini-instruct-8bit", "phi-4-mini"),
    _alias("phi-4-mini-reasoning", "Phi-4-mini-reasoning", "phi-4-mini"),
    _alias("phi-4-mini-reasoning-4bit", "Phi-4-mini-reasoning-4bit", "phi-4-mini"),
)
_REPO_IDS = {alias.name: alias.repo_id for alias in ALIASES}

# The files that go along with config and weights. No code.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
# What is wanted of a repository; no pickle.
_DESCRIBING, _WEIGHT_PATTERNS = ("config.json", *COMPANIONS), ("model*.safetensors", INDEX)
_CACHE_PREFIX = "models--"  # of a repository's folder in Hugging Face's cache; OWNER--NAME follows
OTHER = "mlx-lm:"  # in front of the name of a model of another family, which mlx-lm's code runs; see `other`


def resolve(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local directory of a model, downloaded if need be.

    `name` is taken for, in this order: "tiny" (the bundled model), an alias of `ALIASES` (in any case), a local
    directory, an `owner/repository` of the Hugging Face hub. `revision` (a branch, tag or commit) goes with an alias or
    a repository. A repository that is on this disk is used without asking the network. Without `weights` config and
    tokenizer are enough, and nothing else is downloaded. Raises ModelNotFoundError, and
    OptionError for a name that is no text or asks for mlx-lm's code, and for a revision of a directory.
    """
    name = values.path(name, "model", "the name or directory of a model")
    if name.startswith(OTHER):
        raise OptionError(f"{name} can only answer (generate, chat, serve); name a model of the Phi family here")
    revision = values.optional(values.text, revision, "revision")
    low, path = name.lower(), os.path.expanduser(name)
    if low == "tiny" or (low not in _REPO_IDS and os.path.isdir(path)):
        if revision is not None:
            raise OptionError(f"a revision is for Hugging Face repositories, and {name} is a directory; leave it out")
        return _bundled() if low == "tiny" else Path(os.path.abspath(path))
    repo_id = repository_of(name)
    if repo_id == name:
        _check_repo_id(name)
    return on_disk(repo_id, revision, weights=weights) or _download(repo_id, revision, weights=weights)


def on_disk(repo_id: str, revision: str | None = None, *, weights: bool = True) -> Path | None:
    """The snapshot of a repository in Hugging Face's cache, if all that is wanted of it is there."""
    folder = cache_folder() / f"{_CACHE_PREFIX}{repo_id.replace('/', '--')}"
    revision = revision or "main"
    try:
        commit = read_text(folder / "refs" / revision, most=1000).strip()
    except (OSError, ValueError):
        commit = revision  # a commit hash names itself
    snapshot = folder / "snapshots" / commit
    return snapshot if _is_complete(snapshot, weights) else None


def snapshot_of(directory: Path) -> tuple[str, str] | None:
    """(repository, commit) of a directory in Hugging Face's cache; None for any other."""
    folder = directory.parent.parent
    if directory.parent.name != "snapshots" or not folder.name.startswith(_CACHE_PREFIX):
        return None
    return folder.name.removeprefix(_CACHE_PREFIX).replace("--", "/", 1), directory.name


def is_repository(name: str) -> bool:
    """Whether `resolve` takes a name for an alias or a repository, which have revisions, and not for a directory."""
    low = name.lower()
    return low in _REPO_IDS or (low != "tiny" and "/" in name and not os.path.isdir(os.path.expanduser(name)))


def repository_of(name: str) -> str:
    """The repository that an alias stands for; any other name unchanged."""
    return _REPO_IDS.get(name.lower(), name)


def find_alias(name: str) -> Alias | None:
    """The alias of that name, or of that repository."""
    return next((alias for alias in ALIASES if name.lower() == alias.name or name == alias.repo_id), None)


def list_models() -> list[ModelRow]:
    """The bundled model, every alias, and the other phi3 models in Hugging Face's cache."""
    rows = []
    bundled = _describe("tiny", None, _bundled())
    if bundled is not None:
        rows.append(bundled)
    for alias in ALIASES:
        path = on_disk(alias.repo_id)
        context = alias.shape.max_position_embeddings
        rows.append(ModelRow(alias.name, alias.repo_id, alias.parameters, alias.bits, alias.bytes, context, path))
    known = set(_REPO_IDS.values())
    for folder in sorted(cache_folder().glob(f"{_CACHE_PREFIX}*")):
        repo_id = folder.name.removeprefix(_CACHE_PREFIX).replace("--", "/", 1)
        path = None if repo_id in known else on_disk(repo_id)
        row = None if path is None else _describe(repo_id, repo_id, path)
        if row is not None:
            rows.append(row)
    return rows


def _bundled() -> Path:
    """`weights/tiny`: inside the package where it is installed, beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if folder.is_dir():
            return folder
    raise ModelNotFoundError("the bundled model tiny is missing from this installation; install phi3-mlx again")


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads. ImportError without that package."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _is_complete(folder: Path, weights: bool) -> bool:
    described = has_tokenizer(folder) and (folder / "config.json").is_file()
    if not weights:
        return described
    try:
        files, absent = weight_files(folder)
    except Phi3Error:
        return False
    # A link whose blob was deleted is no file.
    return described and bool(files) and not absent


def _describe(name: str, repo_id: str | None, folder: Path) -> ModelRow | None:
    """The row of a model on this disk, None if it is not one that runs here."""
    from ..models import read_config

    try:
        config = read_config(folder)
    except Phi3Error:
        return None
    bits = 32 if config.dtype == "float32" else 16
    if config.quantization is not None:
        bits = config.quantization.get("bits", 4)
    size = sum(file.stat().st_size for file in weight_files(folder)[0])
    return ModelRow(name, repo_id, None, bits, size, config.max_position_embeddings, folder)


def _check_repo_id(name: str) -> None:
    """ModelNotFoundError unless `name`, which is no alias and no directory, may be a repository."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        raise ModelNotFoundError(f"{name} is a file, not a model directory; {instead_of_model(Path(path))}")
    rooted = name.startswith(("./", "../", "~")) or os.path.isabs(path) or name.endswith(os.sep)
    if rooted or name.count(os.sep) > 1 or (os.sep in name and os.path.isdir(os.path.dirname(path))):
        raise ModelNotFoundError(f"no such directory: {name}; check the path, or see `phi3-mlx models` for names")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return
    near = difflib.get_close_matches(name.lower(), ["tiny", *_REPO_IDS], cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ModelNotFoundError(
        f"no model {values.shown(name)}: {hint}`phi3-mlx models` lists the names; a directory or owner/repository "
        "works too"
    )


def _download(repo_id: str, revision: str | None, *, weights: bool) -> Path:
    """Download the files of a repository that are missing; huggingface_hub shows progress and resumes."""
    from huggingface_hub import constants, errors, snapshot_download

    host, fallback = constants.ENDPOINT, "a local directory and the bundled model, tiny, work without it"
    wanted = [*_DESCRIBING, *(_WEIGHT_PATTERNS if weights else ())]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        _not_found(f"{repo_id} is gated: accept its terms at {host}/{repo_id}, then type `hf auth login`", error)
    except errors.RepositoryNotFoundError as error:
        _not_found(f"no repository {repo_id} at {host}; check the name or, if it is private, `hf auth login`", error)
    except errors.RevisionNotFoundError as error:
        _not_found(f"{repo_id} has no revision {revision or 'main'!r}; see {host}/{repo_id}/commits", error)
    except errors.HFValidationError as error:
        _not_found(f"{repo_id} is not a possible repository name; `phi3-mlx models` lists some", error)
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = f"{repo_id} is not, or not wholly, on this disk, and HF_HUB_OFFLINE forbids the network"
        else:
            why = f"{repo_id} is not on this disk, and {host} did not answer ({_reason(error.__cause__ or error)})"
        _not_found(f"{why}; {fallback}", error)
    except Exception as error:  # the transports (requests, httpx, xet) share no class across their versions
        _not_found(f"the download of {repo_id} stopped ({_reason(error)}); the same command again resumes it", error)
    if weights and not weight_files(folder)[0]:
        raise ModelNotFoundError(
            f"{repo_id} has no model*.safetensors; pickle weights (*.bin) are never read, so name a repository with "
            "safetensors"
        )
    return folder


def _not_found(message: str, error: Exception) -> NoReturn:
    raise ModelNotFoundError(message) from error


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
