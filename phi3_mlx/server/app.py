"""The addresses of the server, and what stands around every request: its guard, its errors, its line in the log."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .asked import AskReader
from .chat import read_chat
from .completions import read_completions
from .faults import ApiError
from .guard import App, Cors, Guard, Origins, Scope, Send
from .limits import ClientGoneError, Receive, json_object
from .metrics import CONTENT_TYPE, metrics_text
from .responses import read_response
from .service import Service
from .static import page_routes
from .work import ModelCard

# What fields of a chat are called elsewhere.
_CALLED: dict[tuple[str, str | None], str] = {
    ("/v1/completions", "messages"): "prompt",
    ("/v1/responses", "messages"): "input",
    ("/v1/responses", "response_format"): "text",
    ("/v1/responses", "max_tokens"): "max_output_tokens",
}
Endpoint = Callable[[HTTPRequest], Awaitable[Any]]
_MOST_TOKENS = 2**31


def create_app(
    service: Service, *, hosts: Collection[str] = (), origins: Collection[str] = (), key: str | None = None
) -> App:
    """The application of an ASGI server. `hosts`, `origins` and `key` are the guard's."""
    routes = [
        Route("/v1/chat/completions", _answering(service, read_chat), methods=["POST"]),
        Route("/v1/completions", _answering(service, read_completions), methods=["POST"]),
        Route("/v1/responses", _answering(service, read_response), methods=["POST"]),
        Route("/v1/models", _models(service)),
        Route("/v1/models/{name:path}", _model(service)),
        Route("/health", _health(service)),
        Route("/metrics", _metrics(service)),
        Route("/plan", _plan(service)),
        *page_routes(),
    ]
    application = _Application(routes=routes)
    application.router.redirect_slashes = False
    pages = Origins(origins)
    guarded = Guard(application, hosts=hosts, origins=pages, key=key, limits=service.limits)
    return Cors(Around(guarded, service, {route.path for route in routes}), pages)


class _Application(Starlette):
    """Starlette without its own errors, which are texts and in a log."""

    def build_middleware_stack(self) -> Any:
        return self.router


class Around:
    """What stands around every request: errors in OpenAI's form, a line in the log, a count."""

    def __init__(self, app: App, service: Service, paths: Collection[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.monotonic(), 0

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientGoneError:
            status = 499  # nginx's number for it
        except Exception as error:
            fault = _refused(scope, error) if isinstance(error, HTTPException) else self._service.told(error)
            fault.param = _CALLED.get((scope["path"], fault.param), fault.param)
            if not status:  # or it is too late for another answer: the connection is closed
                response = JSONResponse(fault.body(), fault.status, fault.headers)
                await response(scope, receive, noting)
        path = scope["path"]
        self._service.requests.count(path if path in self._paths else "other", status)
        shown = scope["raw_path"].decode("latin-1")[:200]  # as it was sent, in which no line ends
        self._service.log(f"{scope['method']} {shown} {status} {time.monotonic() - begun:.2f} s")


def _refused(scope: Scope, error: HTTPException) -> ApiError:
    """What the routes refuse: an address that is none (404), or a method that it does not take (405)."""
    path, method = scope["path"][:200], scope["method"]
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {path}; /v1/models lists the models", "not_found")
    return ApiError(405, f"{path} does not take {method}", "method_not_allowed", headers=error.headers)


def _answering(service: Service, read: AskReader) -> Endpoint:
    async def answer(request: HTTPRequest) -> Any:
        body = await service.beside(json_object, await service.body(request))
        service.log_prompt(body)
        asked = await service.beside(read, body, service.defaults)
        return await service.answer(request, asked)

    return answer


def _models(service: Service) -> Endpoint:
    async def models(request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [_card(card) for card in service.listed()]})

    return models


def _model(service: Service) -> Endpoint:
    async def model(request: HTTPRequest) -> Response:
        name = request.path_params["name"]
        for card in service.listed():
            if card.name == name:
                return JSONResponse(_card(card))
        raise ApiError(404, f"there is no model {name[:200]!r} here; /v1/models lists them", "model_not_found", "model")

    return model


def _card(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "phi3-mlx",
        "context_length": card.context,
        "description": card.about,
    }


def _health(service: Service) -> Endpoint:
    async def health(request: HTTPRequest) -> Response:
        if await service.alive():
            return JSONResponse({"status": "ok"})
        raise ApiError(503, "the engine takes no steps; restart the server", "engine_dead")

    return health


def _metrics(service: Service) -> Endpoint:
    async def metrics(request: HTTPRequest) -> Response:
        text = metrics_text(service.engine.figures(), service.requests)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    return metrics


def _plan(service: Service) -> Endpoint:
    """The memory that a model takes: `?model=NAME&tokens=N`, or without `tokens` from short to long."""

    async def plan(request: HTTPRequest) -> Response:
        name, tokens = request.query_params.get("model", ""), request.query_params.get("tokens")
        if tokens is not None and not (tokens.isdecimal() and len(tokens) <= 10 and 0 < int(tokens) <= _MOST_TOKENS):
            raise ApiError(400, f"tokens is {tokens[:20]!a}; give a number", "invalid_value", "tokens")
        limit, plans = await service.beside(service.plans, name, None if tokens is None else int(tokens))
        lengths = [
            {"tokens": length, "weights": plan.weights, "cache": plan.cache, "work": plan.workspace}
            for length, plan in plans.items()
        ]
        return JSONResponse({"model": name, "limit": limit, "lengths": lengths})

    return plan
