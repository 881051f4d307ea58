"""The endpoint of embeddings."""

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxlm.inference.prompts import split_prompts, to_ids
from jaxlm.server.connections import answered
from jaxlm.server.schemas import EmbeddingBody
from jaxlm.server.state import Refused, Served, Server

MAX_INPUTS = 2048  # of a request, as in the protocol


async def embed(server: Server, http: HttpRequest) -> Response:
    server.check_load()
    body = await server.read(http, EmbeddingBody)
    served = server.served(body.model)
    if served.model.is_multiprocess:
        raise Refused(400, "a server of several processes has no embeddings: use one with a single process")
    prompts = await asyncio.to_thread(_ids, server, served, body)
    with server.admitted(1):
        vectors = await answered(http, _vectors(server, served, prompts, body))
    return await asyncio.to_thread(_response, served, body, vectors, sum(map(len, prompts)))


def _ids(server: Server, served: Served, body: EmbeddingBody) -> list[list[int]]:
    """The token ids of each input."""
    found: list[list[int]] = []
    inputs = split_prompts(body.input)[0]
    if len(inputs) > MAX_INPUTS:
        raise Refused(400, f"input has {len(inputs):,} texts: send {MAX_INPUTS:,} at most in a request")
    for number, one in enumerate(inputs):
        try:
            ids = to_ids(served.model, one, {})
        except ValueError as error:
            raise Refused(400, f"input {number}: {error}") from None
        if len(ids) > server.engine.length:
            raise Refused(
                400,
                f"input {number} has {len(ids):,} tokens, and this server takes {server.engine.length:,}: shorten it",
            )
        found.append(ids)
    return found


async def _vectors(server: Server, served: Served, prompts: list[list[int]], body: EmbeddingBody) -> np.ndarray:
    """The embeddings [n,D]. The engine runs a step between two batches, and one request is computed at a time."""
    found = np.zeros((len(prompts), served.model.config.D), np.float32)
    try:
        async with asyncio.timeout(server.request_timeout), server.embedding:
            for batch in served.embedder.batches([len(ids) for ids in prompts]):
                found[batch] = await asyncio.to_thread(served.embedder.run, [prompts[i] for i in batch], body.pooling)
    except TimeoutError:
        raise server.too_late("send fewer or shorter inputs") from None
    return found


def _response(served: Served, body: EmbeddingBody, vectors: np.ndarray, tokens: int) -> Response:
    """Runs in a thread, because thousands of numbers become text. base64 is that of little-endian float32."""

    def written(vector: np.ndarray) -> Any:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else (
            vector.tolist())  # fmt: skip

    data = [{"object": "embedding", "index": n, "embedding": written(vector)} for n, vector in enumerate(vectors)]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "model": served.name,
            "pooling": body.pooling,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )
