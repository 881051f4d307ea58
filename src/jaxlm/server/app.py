"""The HTTP application: its endpoints, API keys, models, tokens and state."""

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.server import responses
from jaxlm.server.completions import chat, complete
from jaxlm.server.connections import Timed
from jaxlm.server.embeddings import embed
from jaxlm.server.schemas import DetokenizeBody, TokenizeBody
from jaxlm.server.state import Refused, Served, Server, as_refused
from jaxlm.server.static_files import is_page, page_routes

OPEN = {"/health", "/ready"}  # paths without an API key


def create_app(server: Server) -> Starlette:
    """The application. Its engine is closed when the application ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    handlers: dict[tuple[str, str], Callable[[Server, HttpRequest], Awaitable[Response]]] = {
        ("/v1/chat/completions", "POST"): chat,
        ("/v1/completions", "POST"): complete,
        ("/v1/embeddings", "POST"): embed,
        ("/v1/models", "GET"): models,
        ("/v1/models/{name:path}", "GET"): one_model,
        ("/tokenize", "POST"): tokenize,
        ("/detokenize", "POST"): detokenize,
        ("/tokenizer_info", "GET"): tokenizer_info,
        ("/health", "GET"): health,
        ("/ready", "GET"): ready,
        ("/metrics", "GET"): metrics,
    }
    routes = [Route(path, _handled(server, handler), methods=[method]) for (path, method), handler in handlers.items()]
    routes += page_routes()
    errors: Any = dict.fromkeys((404, 405), _plain_error)
    middleware = [Middleware(Timed), Middleware(KeyCheck, keys=server.keys)]
    if server.hosts is not None:
        middleware.insert(1, Middleware(HostCheck, hosts=server.hosts))
    if server.origins:  # outside of the check of keys: browsers ask without a key whether they may send one
        methods, headers = ["GET", "POST"], ["*"]
        cors = Middleware(
            CORSMiddleware, allow_origins=list(server.origins), allow_methods=methods, allow_headers=headers
        )
        middleware.insert(-1, cors)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=errors, middleware=middleware)


class HostCheck:
    """Refuses requests for other host names. A web page could make a browser look up its own name as the address of
    this machine (DNS rebinding), and would then be of the same origin as the server."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self.app: ASGIApp = app
        self.hosts: set[str] = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = re.sub(r":\d*$", "", host).strip("[]")
            if name not in self.hosts and not _is_ip(name):
                text = f"this server does not answer for the host {name!r}: start it with --allow-host {name}"
                return await Refused(403, text, "permission_error").response()(scope, receive, send)
        return await self.app(scope, receive, send)


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


class KeyCheck:
    """Refuses requests without an API key. The comparison takes the same time for every key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app: ASGIApp = app
        self.keys: list[bytes] = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN and not is_page(scope):
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            given = given if scheme.lower() == b"bearer" else b""
            if sum(hmac.compare_digest(given, key) for key in self.keys) == 0:  # compares all of them
                refused = Refused(
                    401, "the API key is missing or wrong", "authentication_error", WWW_Authenticate="Bearer"
                )
                return await refused.response()(scope, receive, send)
        return await self.app(scope, receive, send)


def _handled(
    server: Server, handler: Callable[[Server, HttpRequest], Awaitable[Response]]
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """A handler whose errors are answers."""

    async def handle(http: HttpRequest) -> Response:
        try:
            response = await handler(server, http)
        except Exception as error:
            response = as_refused(error).response()
        server.metrics.answered(http.scope["route"].path, response.status_code)
        return response

    return handle


async def _plain_error(http: HttpRequest, error: Any) -> Response:
    return JSONResponse(responses.error(error.detail, "not_found_error"), error.status_code)


# Models, tokens, state


def _card(server: Server, served: Served) -> dict[str, Any]:
    base = {} if served.adapter is None else {"parent": server.name}
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "jaxlm",
        "max_model_len": server.engine.length,
        **base,
    }


async def models(server: Server, http: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_card(server, served) for served in server.models.values()]})


async def one_model(server: Server, http: HttpRequest) -> Response:
    return JSONResponse(_card(server, server.served(http.path_params["name"])))


def _tokenizer(served: Served) -> Tokenizer:
    if served.model.tokenizer is None:
        raise Refused(400, f"{served.name} has no tokenizer: send token ids to /v1/completions")
    return served.model.tokenizer


async def tokenize(server: Server, http: HttpRequest) -> Response:
    body = await server.read(http, TokenizeBody)
    tokenizer = _tokenizer(server.served(body.model))
    if (body.prompt is None) == (body.messages is None):
        raise Refused(400, "prompt or messages: one of them is needed")
    if body.messages is not None:
        ids = await asyncio.to_thread(tokenizer.chat, body.messages)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", body.add_special_tokens)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": server.engine.length})


async def detokenize(server: Server, http: HttpRequest) -> Response:
    body = await server.read(http, DetokenizeBody)
    tokenizer, V = _tokenizer(server.served(body.model)), server.model.config.V
    if any(not 0 <= i < V for i in body.tokens):
        raise Refused(400, f"tokens: ids are 0 to {V - 1}")
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)})


async def tokenizer_info(server: Server, http: HttpRequest) -> Response:
    """What clients that tokenize with this server need to know, as in vLLM."""
    hf = _tokenizer(server.served(None)).hf
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    return JSONResponse({"tokenizer_class": type(hf).__name__, **{name: getattr(hf, name) for name in names}})


async def health(server: Server, http: HttpRequest) -> Response:
    return JSONResponse({"status": "ok"})


async def ready(server: Server, http: HttpRequest) -> Response:
    """Status 200. While the command loads the model, all requests get status 503 (starting.py)."""
    return JSONResponse({"status": "ready"})


async def metrics(server: Server, http: HttpRequest) -> Response:
    text, kind = server.metrics.text(server)
    return Response(text, media_type=kind)
