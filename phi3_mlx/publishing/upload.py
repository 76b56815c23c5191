"""`publish`: the files of a directory, and a model card, as one commit of a repository on the hub.

Large files go up first, each on its own; the hub keeps them, so that a run that was cut goes on where it was. The
commit, by which all of them appear, comes last.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import values
from ..adapters.config import CONFIG as ADAPTER_CONFIG
from ..config import read_json
from ..errors import OptionError, PublishError
from ..files import json_text
from ..paths import expanded
from .card import make_card
from .contents import CARD, Contents, contents_of
from .facts import KnownFacts, known_facts

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OWNER_AND_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")


@dataclass(frozen=True)
class Publication:
    """What goes, or went, to `url`: names and bytes of the files, the `card`, the names of files that stay here.

    `notes` are sentences that the user should see.
    """

    url: str
    public: bool
    files: dict[str, int]
    left: tuple[str, ...]
    card: str
    notes: tuple[str, ...]


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    base: str | None = None,
    licence: str | None = None,
    results: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Publication:
    """Upload a model directory, an adapter's folder or a folder of GGUF files to the repository OWNER/NAME.

    The repository is made if need be, private unless `public`. The model card says what is known; `base` (OWNER/NAME)
    and `licence` say what is not, `results` is a results.json of `evaluate`, or its directory. With `dry_run` nothing
    is sent and nobody is asked. `progress` gets a file's name, how many are sent, and how many there are. Who uploads,
    the hub's library knows as always: from `hf auth login`, or HF_TOKEN.

    Raises OptionError for a name that cannot be; CheckpointError for a directory that is not complete, with a secret in
    a file, or a link out of it; PublishError for what the hub or the network refuses.
    """
    folder = expanded(values.path(directory, "directory"))
    public, dry_run = values.flag(public, "public"), values.flag(dry_run, "dry_run")
    base, licence = values.optional(values.text, base, "base"), values.optional(values.text, licence, "licence")
    given = values.optional(values.path, results, "results")
    figures = None if given is None else expanded(given)
    values.check_function(progress, "progress")
    _check_name(repo_id, "repo_id")
    if base is not None:
        _check_name(base, "base")
    contents = contents_of(folder)
    facts = known_facts(contents, base=base, licence=licence, results=figures)
    card = make_card(contents, facts, repo_id)
    made = _made(contents, facts, str(card))
    from huggingface_hub import constants

    sizes = {
        name: len(made[name]) if name in made else contents.files[name].stat().st_size for name in _names(contents)
    }
    planned = Publication(
        f"{constants.ENDPOINT}/{repo_id}", public, sizes, contents.left, str(card), _notes(contents, facts)
    )
    if not dry_run:
        _send(contents, repo_id, made, public, progress or (lambda *_: None))
    return planned


def _names(contents: Contents) -> list[str]:
    return sorted({*contents.files, CARD})


def _made(contents: Contents, facts: KnownFacts, card: str) -> dict[str, bytes]:
    """What is not sent as it lies there: the card, and files that name a directory of this disk."""
    made = {CARD: card.encode()}
    if contents.kind == "adapter":
        config = read_json(contents.directory / ADAPTER_CONFIG)
        for place in (config, config.get("base_model")):
            for key in ("model", "name", "base_model_name_or_path"):
                if isinstance(place, dict) and isinstance(place.get(key), str) and Path(place[key]).is_absolute():
                    place[key] = facts.base or Path(place[key]).name
        made[ADAPTER_CONFIG] = f"{json_text(config, indent=2)}\n".encode()
    return made


def _notes(contents: Contents, facts: KnownFacts) -> tuple[str, ...]:
    left = f"{len(contents.left)} of {contents.directory} stay here: {_some(contents.left)}"
    secret = f"{_some(contents.suspicious)}: by the name a secret; it stays here"
    return (*facts.notes, *([left] if contents.left else []), *([secret] if contents.suspicious else []))


def _some(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _check_name(name: Any, option: str) -> None:
    """OptionError unless it may name a repository, owner and all."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    text = values.text(name, option)
    try:
        validate_repo_id(text)
        if _OWNER_AND_NAME.fullmatch(text):
            return
    except HFValidationError:
        pass
    raise OptionError(f"{option} {values.shown(text)} is no OWNER/NAME of letters, digits, '-', '_' and '.'")


def _send(
    contents: Contents, repo_id: str, made: dict[str, bytes], public: bool, progress: Callable[[str, int, int], None]
) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="phi3-mlx")
    try:
        _open_repository(api, repo_id, public)
        operations = []
        names = _names(contents)
        for count, name in enumerate(names):
            progress(name, count, len(names))
            operation = CommitOperationAdd(name, made[name] if name in made else str(contents.files[name]))
            api.preupload_lfs_files(repo_id, [operation])
            operations.append(operation)
        progress("", len(names), len(names))
        api.create_commit(repo_id, operations, commit_message="Upload with phi3-mlx")
    except PublishError:
        raise
    except Exception as error:  # the transports share no class across the library's versions
        _explain(error, repo_id)


def _open_repository(api: HfApi, repo_id: str, public: bool) -> None:
    """Make the repository, or see that the one that is there is as private as was asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repo_id)
    except RepositoryNotFoundError:  # also where nobody is logged in
        api.create_repo(repo_id, private=not public, exist_ok=True)
        return
    if bool(there.private) == public:
        now, wanted = ("private", "public") if there.private else ("public", "private")
        way_out = "change that on its page first" if there.private else "give public=True to add to it, or another name"
        raise PublishError(f"{repo_id} exists already and is {now}, not {wanted}; {way_out}")


def _explain(error: Exception, repo_id: str) -> NoReturn:
    """PublishError in a line, without tokens."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError

    cause = error.__cause__ or error  # of a file that did not arrive
    status = getattr(getattr(cause, "response", None), "status_code", None)
    reason = _TOKEN.sub("***", " ".join(str(cause).split()) or type(cause).__name__)[:200]
    host = constants.ENDPOINT
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        message = f"{host} does not know who you are; type `hf auth login` with a token that may write, or set HF_TOKEN"
    elif status == 403:
        message = f"{host} does not let you write to {repo_id}; name your own account or an organization of yours"
    elif status is not None:
        message = f"{host} refused {repo_id} ({status}: {reason}); the same command again goes on with it"
    else:
        message = f"the upload of {repo_id} stopped ({reason}); the same command again goes on with it"
    raise PublishError(message) from None
