"""What stands before the routes: who may ask, how much, how many at a time, and for how long."""

import asyncio
import hmac
import json
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.refusal import RefusedError, error_document
from bigbatch.tools.serving.telemetry import Telemetry

OPEN_PATHS = ("/", "/docs", "/health")
"""That need no token: pages that hold nothing of the model, and whether the server is well."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "testserver")
MEMORY_OF_PACE = 0.9  # of the average time between two answers
MOST_OF_THE_TIME = 0.8  # that a request may be expected to take; beyond, it would be accepted in vain
NO_ANSWER = 499  # the status that is counted where the client has gone

Message = dict[str, Any]


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: Any,
        direct: dict[str, Any],
        limits: Limits,
        token: str | None,
        telemetry: Telemetry,
        paths: set[str],
    ) -> None:
        """Guard an application, and those that answer POST requests to a path `direct`ly, which costs less."""
        self.app, self.direct, self.limits, self.telemetry = app, direct, limits, telemetry
        self.token, self.paths = token and token.encode(), paths
        self.running: Counter[str] = Counter()
        self.pace_seconds = 0.0  # between two answers while there is work
        self.last_end = 0.0
        self.is_stopping = False
        telemetry.running.set_function(self.running.total)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, is_work = time.perf_counter(), NO_ANSWER, scope["method"] == "POST"
        client = (scope.get("client") or ("",))[0]

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope, client, is_work)
            if not is_work:
                await self.app(scope, receive, note_status)
                return
            self.last_end = self.last_end if self.running.total() else begin
            self.running[client] += 1
            try:
                app = self.direct.get(scope["path"], self.app)
                await app(scope, self._bounded(receive, begin), note_status)
            finally:
                self.running[client] -= 1
                if not self.running[client]:
                    del self.running[client]
                self._note_pace(status)
        except RefusedError as refusal:
            await refuse(note_status, refusal)
        except Exception as error:
            if status != NO_ANSWER:  # it has been told already
                raise
            traceback.print_exc()
            await refuse(note_status, RefusedError(500, f"the model failed: {type(error).__name__}"))
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            requests, seconds = self.telemetry.of_request(path, status)
            requests.inc()
            seconds.observe(time.perf_counter() - begin)

    def _check(self, scope: Message, client: str, is_work: bool) -> None:
        """Raise RefusedError for what is not to be looked at."""
        headers = dict(scope["headers"])
        if self.token is None:
            name = headers.get(b"host", b"").decode("latin-1").lower()
            name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
            if name not in LOCAL_NAMES:  # a page elsewhere that has its name lead here
                raise RefusedError(403, f"this server answers to localhost alone, not to {name!r}")
        elif scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                raise RefusedError(401, "the token is missing or wrong; right is a header Authorization: Bearer TOKEN")
        if not is_work:
            return
        if self.is_stopping:
            raise RefusedError(503, "the server is stopping", retry_seconds=10)
        self._check_load(client)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            raise RefusedError(413, f"the body has {int(length):,} bytes; {self.limits.body_bytes:,} are the most")

    def _check_load(self, client: str) -> None:
        running, limits = self.running.total(), self.limits
        if running >= limits.requests:
            raise RefusedError(503, f"{running} requests are at work or waiting; come again later", retry_seconds=1)
        if self.running[client] >= limits.client_requests:
            message = f"{self.running[client]} requests of yours are at work; {limits.client_requests} are the most"
            raise RefusedError(429, message, retry_seconds=1)
        expected = running * self.pace_seconds if running >= limits.batch else 0.0
        if expected > MOST_OF_THE_TIME * limits.seconds:
            message = f"it would take about {expected:.0f} s; {limits.seconds:g} s are the most"
            raise RefusedError(503, message, retry_seconds=max(1, int(expected - limits.seconds)))

    def _bounded(self, receive: Any, begin: float) -> Any:
        """Return a `receive` that ends a body which is too long, or takes too long to come."""
        seen, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal seen, is_whole
            if is_whole:
                return await receive()
            try:
                left = self.limits.seconds - (time.perf_counter() - begin)
                async with asyncio.timeout(max(left, 0.0)):
                    message = await receive()
            except TimeoutError:
                raise RefusedError(503, "the body took too long to come") from None
            seen += len(message.get("body", b""))
            is_whole = not message.get("more_body")
            if seen > self.limits.body_bytes:
                raise RefusedError(413, f"the body has more than {self.limits.body_bytes:,} bytes")
            return message

        return bounded

    def _note_pace(self, status: int) -> None:
        now = time.perf_counter()
        if status == 200:
            pace = now - self.last_end
            self.pace_seconds = MEMORY_OF_PACE * self.pace_seconds + (1 - MEMORY_OF_PACE) * pace
        self.last_end = now


async def refuse(send: Any, refusal: RefusedError) -> None:
    """Send the JSON of a refusal."""
    body = json.dumps(error_document(refusal.status_code, refusal.detail, refusal.param)).encode()
    await send_json(send, body, refusal.status_code, refusal.headers or {})


async def send_json(send: Any, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """Send an answer."""
    given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
