"""Waiting for an answer: no longer than allowed, and only while the client does."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from bigbatch.tools.serving.refusal import RefusedError

Answer = TypeVar("Answer")


async def in_time(request: Request, work: Coroutine[Any, Any, Answer], seconds: float) -> Answer:
    """Return what `work` does; raise RefusedError where it takes too long, and cancel it where the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise RefusedError(503, "the client has gone")
        raise RefusedError(503, f"the answer took longer than {seconds:g} s", retry_seconds=1)
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
