"""Waiting for an answer: no longer than allowed, and only while the client does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from bigbatch.tools.serving.refusal import RefusedError

Answer = TypeVar("Answer")
Receive = Callable[[], Awaitable[Any]]

AT_ONCE_SECONDS = 0.1  # before which nobody looks whether the client is still there


async def in_time(receive: Receive, work: Awaitable[Answer], seconds: float) -> Answer:
    """Return what `work` does; raise RefusedError where it takes too long, and cancel it where the client goes away."""
    future, gone = asyncio.ensure_future(work), None
    try:
        done, _ = await asyncio.wait((future,), timeout=min(seconds, AT_ONCE_SECONDS))
        if not done and seconds > AT_ONCE_SECONDS:
            gone = asyncio.ensure_future(_gone(receive))
            left = seconds - AT_ONCE_SECONDS
            await asyncio.wait((future, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone and gone.done():
            raise RefusedError(503, "the client has gone")
        raise RefusedError(503, f"the answer took longer than {seconds:g} s", retry_seconds=1)
    finally:
        future.cancel()
        if gone:
            gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
