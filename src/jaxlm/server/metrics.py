"""Prometheus metrics of the server."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxlm.inference.requests import Request

if TYPE_CHECKING:
    from jaxlm.server.state import Server

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters since the start of the server."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        kept = self.registry
        self._answers = Counter("jaxlm_http_answers", "HTTP answers", ["path", "status"], registry=kept)
        self._ended = Counter("jaxlm_requests", "Requests that ended", ["finish_reason"], registry=kept)
        self._prompt = Counter("jaxlm_prompt_tokens", "Tokens of prompts", registry=kept)
        self._cached = Counter("jaxlm_cached_tokens", "Tokens of prompts that were in the prefix cache", registry=kept)
        self._generated = Counter("jaxlm_generation_tokens", "Generated tokens", registry=kept)
        self._first = Histogram("jaxlm_first_token_seconds", "Time to the first token", buckets=SECONDS, registry=kept)
        self._running = Gauge("jaxlm_requests_running", "Requests that have a slot", registry=kept)
        self._waiting = Gauge("jaxlm_requests_waiting", "Requests that wait for a slot", registry=kept)

    def answered(self, path: str, status: int) -> None:
        """Counts an HTTP answer."""
        self._answers.labels(path, str(status)).inc()

    def count(self, requests: Sequence[Request]) -> None:
        """Counts requests that ended."""
        for request in requests:
            self._ended.labels(request.finished or "cancelled").inc()
            self._prompt.inc(len(request.ids))
            self._cached.inc(request.cached)
            self._generated.inc(len(request.tokens))
            if request.first:
                self._first.observe(request.first - request.started)

    def text(self, server: "Server") -> tuple[bytes, str]:
        """The metrics in Prometheus' format, and its media type."""
        running = sum(slot.request is not None for slot in server.engine.scheduler.rows)
        self._running.set(running)
        self._waiting.set(max(0, server.active - running))
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
