"""The part of OpenAI's API that a model which writes text, or makes vectors, can answer.

What a request may hold and has no effect here is refused in one line, unless it asks for nothing.
"""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bigbatch.recipes.core.data.chat import check_messages, encode_request
from bigbatch.recipes.core.data.tokenizing import encode_prompt
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.generate import Sampling
from bigbatch.tools.serving.batching import Batcher
from bigbatch.tools.serving.generation import Writer
from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.opening import Embedding, Generating, Served
from bigbatch.tools.serving.refusal import RefusedError, documented, error_document
from bigbatch.tools.serving.telemetry import Telemetry
from bigbatch.tools.serving.texts import Piece, write_text
from bigbatch.tools.serving.waiting import in_time

Text = Annotated[str, Field(max_length=1_000_000)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
REFUSALS = documented(401, 403, 413, 422, 429, 503)
NOTHING = (None, False, [], {}, "", {"type": "text"}, "none", "auto")
NEUTRAL = {"best_of": 1, "repetition_penalty": 1, "min_p": 0}
IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""What has no effect on the answer, whatever it says."""


class Asked(BaseModel):
    """What any request may hold; what is not known here may be there as long as it asks for nothing."""

    model_config = ConfigDict(extra="allow")
    model: Text | None = None

    @model_validator(mode="after")
    def _check_the_rest(self) -> "Asked":
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value not in NOTHING and value != NEUTRAL.get(name, 0):
                raise ValueError(f"{name!r} is not known to this server; leave it out")
        return self


class StreamOptions(BaseModel):
    """What is told with a stream."""

    include_usage: bool = False


class Writing(Asked):
    """How a text is to be written; what is left out is as the model was trained to be sampled."""

    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    stop: Annotated[str, Field(max_length=200)] | list[Annotated[str, Field(max_length=200)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(Writing):
    """A text, or several, to go on with."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """Something said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class ChatRequest(Writing):
    """A dialogue to reply to."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


class EmbeddingRequest(Asked):
    """Texts to make vectors of."""

    input: Text | Annotated[list[Text], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Choice(BaseModel):
    """A text that was written."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class CompletionAnswer(BaseModel):
    """Texts that go on with the prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Reply(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """A reply."""

    index: int
    message: Reply
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class ChatAnswer(BaseModel):
    """Replies to a dialogue."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Vector(BaseModel):
    """A text's vector, as numbers or as the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(BaseModel):
    """Vectors of texts."""

    object: Literal["list"]
    model: str
    data: list[Vector]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


def models_router(served: Served) -> APIRouter:
    """Return the route that lists the model."""
    router, created = APIRouter(), int(time.time())

    @router.get("/v1/models", response_model=ModelList, responses=documented(401, 403), summary="List models")
    async def models() -> Any:
        card = {"id": served.name, "object": "model", "created": created, "owned_by": "bigbatch"}
        return {"object": "list", "data": [card]}

    return router


def writing_router(served: Served, limits: Limits, writer: Writer) -> APIRouter:
    """Return the routes of a model that writes."""
    assert served.generating
    router, scribe = APIRouter(), Scribe(served, served.generating, limits, writer)

    @router.post("/v1/completions", response_model=CompletionAnswer, responses=REFUSALS, summary="Go on with a text")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        _check_model(served, body.model)
        prompts: Any = [body.prompt] if isinstance(body.prompt, str) or _is_tokens(body.prompt) else body.prompt
        encoded = [scribe.encode(prompt, n) for n, prompt in enumerate(prompts)]
        asked = [(prompt, scribe.sampling(body, prompt, body.max_tokens or 16)) for prompt in encoded]
        return await scribe.answer(body, request, asked, CompletionForm())

    @router.post("/v1/chat/completions", response_model=ChatAnswer, responses=REFUSALS, summary="Reply to a dialogue")
    async def chat(body: ChatRequest, request: Request) -> Any:
        _check_model(served, body.model)
        prompt = scribe.encode_messages(body.messages)
        most = body.max_completion_tokens or body.max_tokens or limits.new_tokens
        return await scribe.answer(body, request, [(prompt, scribe.sampling(body, prompt, most))], ChatForm())

    return router


class CompletionForm:
    """How /v1/completions tells of texts."""

    kind, chunk_kind, prefix, strip = "text_completion", "text_completion", "cmpl", False

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a whole text."""
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": None}

    def piece(self, index: int, text: str, finish: str | None, is_first: bool) -> dict[str, Any]:
        """Return a piece of a text."""
        return self.choice(index, text, finish)


class ChatForm:
    """How /v1/chat/completions tells of replies."""

    kind, chunk_kind, prefix, strip = "chat.completion", "chat.completion.chunk", "chatcmpl", True

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Return a whole reply."""
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": finish, "logprobs": None}

    def piece(self, index: int, text: str, finish: str | None, is_first: bool) -> dict[str, Any]:
        """Return a piece of a reply; the first says whose it is."""
        delta = ({"role": "assistant"} if is_first else {}) | {"content": text}
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}


Form = CompletionForm | ChatForm
Work = list[tuple[list[int], Sampling]]


class Scribe:
    """Turns requests into prompts, and what is written into answers."""

    def __init__(self, served: Served, generating: Generating, limits: Limits, writer: Writer) -> None:
        self.name, self.generating, self.limits, self.writer = served.name, generating, limits, writer
        self.positions = generating.model.section.max_positions

    def encode(self, prompt: str | list[int], number: int) -> list[int]:
        """Return a prompt's tokens; an empty one begins where a text ends."""
        tokenizer, stops = self.generating.tokenizer, self.generating.sampling.stop_tokens
        if not isinstance(prompt, str):
            if max(prompt) >= tokenizer.get_vocab_size():
                size = tokenizer.get_vocab_size()
                raise RefusedError(422, f"prompt holds the token {max(prompt)}; there are {size:,}", "prompt")
            return prompt
        try:
            tokens = encode_prompt(tokenizer, prompt, f"prompt[{number}]")
        except UserError as error:
            raise RefusedError(422, str(error), "prompt") from None
        if not tokens and not stops:
            raise RefusedError(422, "prompt is empty, and the model has no token that a text begins behind", "prompt")
        return tokens or [stops[0]]

    def encode_messages(self, messages: list[ChatMessage]) -> list[int]:
        """Return the tokens that ask for a reply."""
        chat = self.generating.chat
        if chat is None:
            raise RefusedError(422, "the model has no chat template; right is /v1/completions", "messages")
        said = [{"role": _role(one), "content": _content(one)} for one in messages]
        try:
            return encode_request(chat, check_messages(said, chat))
        except ValueError as error:
            raise RefusedError(422, str(error), "messages") from None

    def sampling(self, body: Writing, prompt: list[int], most: int) -> Sampling:
        """Return how a text is written; raise RefusedError where it cannot be so long."""
        room = self.positions - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt):,} tokens; the model has {self.positions:,} positions"
            raise RefusedError(422, f"{message}, one must be free", "prompt")
        if most > self.limits.new_tokens:
            message = f"max_tokens is {most:,}; {self.limits.new_tokens:,} are the most here"
            raise RefusedError(422, message, "max_tokens")
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        given = {name: value for name, value in given.items() if value is not None}
        seed = uuid.uuid4().int % 2**32 if body.seed is None else body.seed % 2**64
        rest = {"max_new_tokens": min(most, room), "seed": seed, "num_samples": body.n or 1}
        return self.generating.sampling._replace(**given, **rest)

    async def answer(self, body: Writing, request: Request, asked: Work, form: Form) -> Any:
        """Write; answer at the end, or with a stream of events."""
        rows = sum(sampling.num_samples for _, sampling in asked)
        if rows > self.limits.inputs:
            raise RefusedError(422, f"asks for {rows} texts; {self.limits.inputs} are the most", "n")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        stops = [stop for stop in stops if stop]
        if len(stops) > 16:
            raise RefusedError(422, f"stop has {len(stops)} texts; 16 are the most", "stop")
        head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        pieces = self._pieces(asked, stops, form.strip)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(pieces, head | {"object": form.chunk_kind}, asked, form, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await in_time(
            request.receive, _whole(pieces, head | {"object": form.kind}, asked, form), self.limits.seconds
        )

    async def _pieces(self, asked: Work, stops: list[str], strip: bool) -> AsyncIterator[Piece]:
        """Yield the pieces of all texts as they come, numbered through."""
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        async def one(first: int, prompt: list[int], sampling: Sampling) -> None:
            try:
                async for piece in write_text(self.writer, self.generating.tokenizer, prompt, sampling, stops, strip):
                    queue.put_nowait(piece._replace(sample=first + piece.sample))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks, first = [], 0
        for prompt, sampling in asked:
            tasks.append(asyncio.ensure_future(one(first, prompt, sampling)))
            first += sampling.num_samples
        try:
            left = len(tasks)
            while left:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()

    async def _events(
        self, pieces: AsyncIterator[Piece], head: dict[str, Any], asked: Work, form: Form, with_usage: bool
    ) -> AsyncIterator[str]:
        """Yield server-sent events; a mistake after the first is told as one."""
        counts: dict[int, int] = {}
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in pieces:
                    choice = form.piece(piece.sample, piece.text, piece.finish, piece.sample not in counts)
                    counts[piece.sample] = piece.num_tokens
                    yield _event(head | {"choices": [choice]})
        except TimeoutError:
            yield _event(error_document(503, f"the answer took longer than {self.limits.seconds:g} s"))
        except Exception as error:
            yield _event(error_document(500, f"the model failed: {type(error).__name__}"))
            raise
        else:
            if with_usage:
                yield _event(head | {"choices": [], "usage": _usage(asked, counts)})
        yield "data: [DONE]\n\n"


def embedding_router(served: Served, limits: Limits, telemetry: Telemetry) -> tuple[APIRouter, Batcher]:
    """Return the route of a model that makes vectors, and the batcher behind it."""
    assert served.embedding
    embedding: Embedding = served.embedding
    batcher = Batcher(_rows_of(embedding.embed), limits.batch, limits.wait_seconds, telemetry)
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=EmbeddingAnswer, responses=REFUSALS, summary="Vectors of texts")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Any:
        _check_model(served, body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if len(texts) > limits.inputs:
            raise RefusedError(422, f"input has {len(texts)} texts; {limits.inputs} are the most", "input")
        if empty := [number for number, text in enumerate(texts) if not text.strip()]:
            raise RefusedError(422, f"input[{empty[0]}] is empty", "input")
        vectors = await in_time(request.receive, batcher.answer(texts), limits.seconds)
        write = _as_base64 if body.encoding_format == "base64" else np.ndarray.tolist
        data = [{"object": "embedding", "index": n, "embedding": write(one)} for n, one in enumerate(vectors)]
        count = sum(map(embedding.count_tokens, texts))
        return {
            "object": "list",
            "model": served.name,
            "data": data,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    return router, batcher


def _rows_of(embed: Callable[[list[str]], np.ndarray]) -> Callable[[list[str]], list[np.ndarray]]:
    return lambda texts: list(embed(texts).astype("<f4"))


def _as_base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.tobytes()).decode()


async def _whole(pieces: AsyncIterator[Piece], head: dict[str, Any], asked: Work, form: Form) -> dict[str, Any]:
    texts: dict[int, list[Piece]] = {}
    async for piece in pieces:
        texts.setdefault(piece.sample, []).append(piece)
    choices = [
        form.choice(index, "".join(piece.text for piece in own), own[-1].finish) for index, own in sorted(texts.items())
    ]
    counts = {index: own[-1].num_tokens for index, own in texts.items()}
    return head | {"choices": choices, "usage": _usage(asked, counts)}


def _usage(asked: Work, counts: dict[int, int]) -> dict[str, int]:
    read, written = sum(len(prompt) for prompt, _ in asked), sum(counts.values())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _check_model(served: Served, name: str | None) -> None:
    if name not in (None, "", served.name):
        raise RefusedError(404, f"there is no model {name!r}; there is {served.name!r}", "model")


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt[0], int)


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def _content(message: ChatMessage) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
