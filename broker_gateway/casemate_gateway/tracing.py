"""Spans for an operator who has a collector: how long requests and the steps of a job's road take. Off unless configured.

Sent by OTLP over HTTP to the one endpoint in the settings and nowhere else, by the OpenTelemetry SDK (the extra ``otel``;
docs/decisions/0027). A span has a name from this program, times, and attributes from a fixed list: no payload, no member, no
person, no header of a request. All spans of one job are one trace, whose id is the job's, whichever gateway made them.
What a client says about traces is not looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Final, TypedDict, Unpack

from casemate_messaging.logs import ProgramLog
from casemate_schemas.errors import SetupError

INSTALL: Final = "pip install 'casemate[otel]'"
EXPORT_TIMEOUT_S: Final = 5.0
"""How long one export may take; the end of the program waits for it."""

_QUEUE: Final = 4096
_EVERY_S: Final = 2.0
_REQUEST, _PRECHECK, _DISPATCH = "request", "precheck", "dispatch"
SPANS: Final = frozenset({_REQUEST, _PRECHECK, _DISPATCH})

ATTRIBUTES: Final = {
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "reason": "casemate.reason",
    "key_broker": "casemate.key_broker",
    "verdict": "casemate.verdict",
}
"""All that may ever stand in a span, by the name that this program has for it."""

Record = Callable[[str, int | None, int, int, dict[str, str | int]], None]


class SpanFields(TypedDict, total=False):
    """What a span may say. A route is its pattern; reason and verdict come from fixed sets, key brokers from the manifest."""

    method: str
    route: str
    status: int
    reason: str
    key_broker: str
    verdict: str


class Tracing:
    """Tells spans, or, without ``record``, does nothing."""

    def __init__(self, record: Record | None = None, shut_down: Callable[[], None] = lambda: None) -> None:
        self._record = record
        self._shut_down = shut_down

    def request(self, job_id: str | None, started_ns: int, **fields: Unpack[SpanFields]) -> None:
        """A request that was answered; ``job_id`` if it was about a job that concerned the asker. Unix nanoseconds."""
        self._tell(_REQUEST, job_id, started_ns, fields)

    def dispatched(self, job_id: str, created_ms: int) -> None:
        """A job reached the work queue, after so long in the gateway."""
        self._tell(_DISPATCH, job_id, created_ms * 1_000_000, {})

    @contextlib.contextmanager
    def precheck(self, job_id: str, key_broker: str) -> Iterator[SpanFields]:
        """One question to a key broker, while the block runs; what is put into the answer is told too."""
        started_ns, fields = time.time_ns(), SpanFields(key_broker=key_broker)
        try:
            yield fields
        finally:
            self._tell(_PRECHECK, job_id, started_ns, fields)

    async def close(self) -> None:
        """Sends what is still to be sent, if that is possible soon."""
        await asyncio.to_thread(self._shut_down)

    def _tell(self, name: str, job_id: str | None, started_ns: int, fields: SpanFields) -> None:
        if self._record is None:
            return
        told = {ATTRIBUTES[key]: value for key, value in fields.items() if key in ATTRIBUTES and value != ""}
        self._record(name, _trace_id(job_id), started_ns, time.time_ns(), told)  # type: ignore[arg-type]


OFF: Final = Tracing()


def open_tracing(endpoint: str | None, log: ProgramLog) -> Tracing:
    """What tells spans to the collector at ``endpoint``; :data:`OFF` without one. Without the extra the log says what to do.

    Raises :class:`SetupError` for an endpoint that the SDK does not take.
    """
    if endpoint is None:
        return OFF
    try:
        return _sdk_tracing(endpoint)
    except ImportError:
        log.warning("tracing_not_installed", op=INSTALL)
        return OFF
    except ValueError as error:
        raise SetupError("setting otlp_traces_url: expected the URL of a collector's traces") from error


def _sdk_tracing(endpoint: str) -> Tracing:
    """By the OpenTelemetry SDK: on a thread of its own, at most :data:`_QUEUE` spans waiting, more are dropped."""
    import requests
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    class JobIds(RandomIdGenerator):
        """A trace's id is that of the job it is about."""

        next_id: int | None = None

        def generate_trace_id(self) -> int:
            return self.next_id or super().generate_trace_id()

    session = requests.Session()
    session.trust_env = False  # no proxy, no netrc: what the settings say, and nobody else
    session.max_redirects = 0
    exporter = OTLPSpanExporter(
        endpoint, timeout=EXPORT_TIMEOUT_S, compression=Compression.NoCompression, session=session
    )
    processor = BatchSpanProcessor(
        exporter,
        max_queue_size=_QUEUE,
        schedule_delay_millis=1000 * _EVERY_S,
        max_export_batch_size=512,
        export_timeout_millis=1000 * EXPORT_TIMEOUT_S,
    )
    resource = Resource({"service.name": "casemate-gateway", "service.version": version("casemate")})
    ids = JobIds()
    provider = TracerProvider(resource=resource, id_generator=ids, sampler=ALWAYS_ON, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("casemate-gateway")

    def record(name: str, trace_id: int | None, started: int, ended: int, attributes: dict[str, str | int]) -> None:
        ids.next_id = trace_id
        span = tracer.start_span(name, context=Context(), start_time=min(started, ended), attributes=attributes)
        ids.next_id = None
        span.end(ended)

    return Tracing(record, provider.shutdown)


def _trace_id(job_id: str | None) -> int | None:
    """128 bits, as a trace's id: a job's id is random and as long."""
    if job_id is None or len(job_id) != 32 or not set(job_id) <= set("0123456789abcdef"):
        return None
    return int(job_id, 16) or None
