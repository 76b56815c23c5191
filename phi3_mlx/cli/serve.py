"""phi3-mlx serve"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import re
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from .. import files
from ..errors import OptionError, Phi3Error
from ..paths import expanded
from .options import (
    compute_dtype,
    longrope_option,
    memory_option,
    note_idle,
    note_unwritten,
    open_prefixes,
    prefixes_option,
    serving_options,
)
from .terminal import say

if TYPE_CHECKING:
    from ..generation.request import Request
    from ..models.decoder import LongRopeRule

_KEY_VARIABLE = "PHI3_MLX_API_KEY"
_MOST_KEY_BYTES = 4096


def _whole(least: int, most: float = math.inf) -> Callable[[click.Context, click.Parameter, int], int]:
    """A callback of Click's that refuses numbers outside a range."""

    def check(_: click.Context, param: click.Parameter, value: int) -> int:
        if least <= value <= most:
            return value
        allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise OptionError(f"--{param.name} {value} is outside its range; give {allowed}")

    return check


@click.command()
@click.option(
    "-m", "--model", "names", multiple=True, default=("tiny",), show_default=True, metavar="NAME",
    help="As in generate; may be repeated. Loaded on first use.",
)  # fmt: skip
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME=DIR",
    help="Serve the model with the adapter in this folder, as a model called NAME; may be repeated.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The address to listen at.")
@click.option(
    "--port", default=8080, show_default=True, metavar="N", callback=_whole(0, 65535), help="0: any free port."
)
@memory_option
@click.option(
    "--prefix-memory", default="2GB", show_default=True, metavar="SIZE",
    help="What was read stays in this much memory, for requests that begin alike. It gives way to what runs.",
)  # fmt: skip
@click.option(
    "--queue", default=256, show_default=True, metavar="N", callback=_whole(1), help="Requests that may wait."
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    help=f"Clients must know the key in this file. Without it: that of {_KEY_VARIABLE}.",
)
@click.option(
    "--allowed-host", "hosts", multiple=True, metavar="NAME",
    help="A name that clients call this server by, beside localhost and addresses; may be repeated; '*': any.",
)  # fmt: skip
@click.option(
    "--cors-origin", "origins", multiple=True, metavar="ORIGIN",
    help="Let pages of this origin (https://page.example) ask from a browser; may be repeated; '*': all.",
)  # fmt: skip
@click.option("--open", "opens", is_flag=True, help="Show the page that tries the server in a browser.")
@click.option("--log-prompts", is_flag=True, help="Write what is asked into the log. Without it no word of that is.")
@compute_dtype
@longrope_option
@prefixes_option
@serving_options
def serve(
    names: tuple[str, ...],
    adapters: tuple[str, ...],
    host: str,
    port: int,
    memory: str | None,
    prefix_memory: str,
    queue: int,
    api_key_file: str | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    opens: bool,
    log_prompts: bool,
    dtype: str | None,
    longrope: LongRopeRule,
    prefixes: str | None,
    request: Request,
) -> None:
    """Serve models over HTTP, to OpenAI's clients.

    \b
    phi3-mlx serve -m phi-3.5-mini-4bit
    phi3-mlx serve -m phi-3.5-mini-4bit -m phi-4-mini-4bit --memory 12GB
    curl http://127.0.0.1:8080/v1/models

    Options of answers hold for requests that do not say otherwise. Ctrl-C lets answers end; a second one ends them.

    -m mlx-lm:OWNER/REPO serves a model of another family; exactness is promised for the Phi family alone.
    """
    _check_installed()
    _check_names(hosts, origins)
    key = _read_key(api_key_file)
    address = _address(host)
    if key is None and not ipaddress.ip_address(address).is_loopback:
        raise OptionError(
            f"--host {host} lets other machines ask, and there is no key that they must know; "
            f"set {_KEY_VARIABLE} or give --api-key-file"
        )
    from ..engine.prefixes import PrefixStore
    from ..server.app import create_app
    from ..server.asked import Defaults
    from ..server.limits import Limits
    from ..server.models import Models
    from ..server.running import run
    from ..server.service import Service
    from ..server.worker import Worker

    note_idle(request)
    with _listen(address, port) as listening:
        store = open_prefixes(prefixes, prefix_memory) or PrefixStore(prefix_memory)
        models = Models(
            names,
            adapters_of(adapters, names),
            memory=memory,
            prefixes=store,
            dtype=dtype,
            longrope=longrope,
            kv_bits=request.kv_bits,
        )
        worker = Worker(models, queue=queue)
        try:
            defaults = Defaults(request, longrope, Limits(), models.others)
            service = Service(worker, models.listed, defaults, _log, prompts=log_prompts, plans=models.plans)
            called = [*hosts, *([] if host == address else [host])]
            app = create_app(service, hosts=called, origins=origins, key=key)
            signal.signal(signal.SIGTERM, _end)
            listed = [card.name for card in models.listed()]
            run(app, service, listening, lambda: _say_where(listening, listed, opens=opens))
        finally:
            worker.close(wait=False)
            note_unwritten(store)


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise Phi3Error(
            'serve needs starlette and uvicorn, which are not installed: pip install "phi3-mlx[serve]"'
        ) from None


def _check_names(hosts: Sequence[str], origins: Sequence[str]) -> None:
    """OptionError for a name or an origin that no client could have."""
    for host in hosts:
        if not re.fullmatch(r"\*|[\w.-]+", host):
            raise OptionError(f"--allowed-host {host} is no name; give one such as mac.local, without http:// and port")
    for origin in origins:
        if not re.fullmatch(r"\*|null|[a-zA-Z][\w+.-]*://[^/\s]+/?", origin):
            raise OptionError(f"--cors-origin {origin} is no origin; give one such as https://page.example")


def _read_key(file: str | None) -> str | None:
    """What clients must know: the first line of a file, else what the environment says; None: nothing."""
    if file is None:
        return _checked_key(os.environ[_KEY_VARIABLE], _KEY_VARIABLE) if _KEY_VARIABLE in os.environ else None
    try:
        text = files.read_text(file, most=_MOST_KEY_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--api-key-file {file} cannot be read: {getattr(error, 'strerror', error)}") from None
    return _checked_key(text.strip(), f"--api-key-file {file}")


def _checked_key(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(f"{where} has no key; give one of letters, digits and signs, without spaces")
    return key


def _address(host: str) -> str:
    """The address of a name of this machine; of localhost 127.0.0.1, which all clients try."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return str(min(addresses, key=lambda info: info[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError):
        raise OptionError(f"--host {host} is no address of this machine; give one such as 127.0.0.1") from None


def adapters_of(given: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The adapters NAME=DIR: name -> (the model that it changes, folder).

    Raises OptionError, and AdapterError for a folder that is no adapter.
    """
    folders: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise OptionError(f"--adapter {text} has no name and folder; write --adapter NAME=DIR")
        if name in folders:
            raise OptionError(f"two adapters are called {name}; give one of them another name")
        folders[name] = folder
    return {name: (_base(folder, names), folder) for name, folder in folders.items()}


def _base(folder: str, names: Sequence[str]) -> str:
    """Which of several models an adapter was trained on."""
    from ..adapters.folder import base_of, read_config_of, trained_on
    from ..store.hub import resolve

    directory = expanded(folder)
    config = read_config_of(directory)
    if len(names) == 1:
        return names[0]
    trained, _ = trained_on(directory, config)
    for name in names:
        if trained in (name, base_of(resolve(name), name).name):
            return name
    raise OptionError(f"{folder} was trained on {trained}, which is not among the models; add -m {trained}")


def _listen(address: str, port: int) -> socket.socket:
    from ..server.running import listen

    try:
        return listen(address, port)
    except OSError as error:
        advice = "; give another --port" if error.errno == errno.EADDRINUSE else ""
        raise Phi3Error(f"{address}:{port} cannot be listened at: {error.strerror}{advice}") from None


def _say_where(listening: socket.socket, names: Sequence[str], *, opens: bool) -> None:
    address, port = listening.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    page = f"http://{'localhost' if ipaddress.ip_address(address).is_unspecified else host}:{port}/"
    say(f"{', '.join(names)} at http://{host}:{port}/v1, with a page to try it at {page} (Ctrl-C stops it)")
    if opens:
        # Beside the event loop: a browser in the terminal takes as long as it is used.
        threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()


def _log(line: str) -> None:
    say(f"{time.strftime('%H:%M:%S')} {line}")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM, as systemd and launchd send it, is a proper end. uvicorn gives it back once it has stopped."""
    raise SystemExit(0)
