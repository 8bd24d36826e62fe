"""`/predict`: what a recipe says of texts, objects or files, with the types of its own inputs and answers."""

import base64
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.predict import shaped
from bigbatch.tools.serving.batching import Batcher
from bigbatch.tools.serving.guard import send_json
from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.opening import Served
from bigbatch.tools.serving.refusal import RefusedError, documented, mistake_of
from bigbatch.tools.serving.telemetry import Telemetry
from bigbatch.tools.serving.waiting import in_time

Text = Annotated[str, Field(max_length=1_000_000)]


class FileInput(BaseModel):
    """An image or a recording."""

    data: Annotated[str, Field(description="the file's bytes in base64")]


class MessageInput(BaseModel):
    """Something said in a dialogue."""

    role: Annotated[str, Field(description="system, user or assistant")]
    content: Text


class Chance(BaseModel):
    """A label and how likely it is."""

    label: str
    probability: float


class LabelAnswer(BaseModel):
    """The likeliest label; with `top` also the likeliest ones. Of any number that an input may have, all."""

    label: str | None = None
    probability: float | None = None
    labels: list[Chance] | None = None


class WordChance(BaseModel):
    """A word and how likely it is."""

    word: str
    probability: float


class WordsAnswer(BaseModel):
    """The likeliest next words."""

    words: list[WordChance]


class Entity(BaseModel):
    """An entity; start and end are characters of the text."""

    text: str
    type: str
    start: int
    end: int


class ExtractAnswer(LabelAnswer):
    """The entities of a text, or the relation between the two that are marked."""

    entities: list[Entity] | None = None


class Candidate(BaseModel):
    """A possible answer; start and end are characters of the context."""

    answer: str
    start: int | None
    end: int | None
    probability: float


class AnswerAnswer(Candidate):
    """The best answer; "" with null for start and end where there is none."""

    null_score: float | None = None
    candidates: list[Candidate] | None = None


class ScoreAnswer(BaseModel):
    """How well two texts match."""

    score: float


class TranslateAnswer(BaseModel):
    """A translation and the score of its search, or how good a given one is."""

    translation: str | None = None
    score: float | None = None
    quality: float | None = None


class ChosenSentence(BaseModel):
    """A sentence of the document."""

    sentence: str
    place: int
    score: float


class SummaryAnswer(BaseModel):
    """A summary, and where it is chosen from the document its sentences."""

    summary: str
    sentences: list[ChosenSentence] | None = None


class TranscriptAnswer(BaseModel):
    """What is said in a recording, and how long it is."""

    transcript: str
    seconds: float


ANSWERS: dict[str, Any] = {
    "classify": LabelAnswer,
    "classify_images": LabelAnswer,
    "extract": ExtractAnswer,
    "match": ScoreAnswer,
    "next_word": WordsAnswer,
    "question_answering": AnswerAnswer,
    "summarize": SummaryAnswer,
    "transcribe": TranscriptAnswer,
    "translate": TranslateAnswer,
}
"""By recipe; one that is not here answers with objects of no fixed form."""


def input_type(served: Served) -> Any:
    """Return the type of one input."""
    if served.reads_files:
        return FileInput
    if not served.fields:
        return Text
    kinds: dict[str, Any] = {"messages": list[MessageInput], "document": Text | list[Text]}
    fields: dict[str, Any] = {name: (kinds.get(name, Text), ...) for name in served.fields}
    return create_model("PredictInput", **fields)


def predict_router(served: Served, limits: Limits, telemetry: Telemetry) -> tuple[APIRouter, Batcher, Any]:
    """Return the route as it is described, the batcher behind it, and what answers in its place."""
    batcher = Batcher(_work(served), limits.batch, limits.wait_seconds, telemetry)
    one, answer = input_type(served), ANSWERS.get(served.recipe_name, dict[str, Any])
    some: Any = Annotated[list[one], Field(min_length=1, max_length=limits.inputs)]
    top = Annotated[int | None, Field(ge=1, le=1000, description="how many of the likeliest to tell of")]
    asked: Any = create_model("PredictRequest", inputs=(some, ...), top=(top, None))
    told: Any = create_model("PredictAnswer", model=(str, ...), answers=(list[answer], ...))  # pyright: ignore[reportArgumentType, reportInvalidTypeForm] - made above
    router = APIRouter()
    router.add_api_route(
        "/predict",
        _described(asked),
        methods=["POST"],
        response_model=told,
        responses=documented(401, 403, 413, 422, 429, 503),
        summary=f"{served.recipe_name.replace('_', ' ').capitalize()}",
    )
    reader, writer = TypeAdapter(asked), TypeAdapter(told)

    async def predict(scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer as an ASGI application: half a millisecond less a request than FastAPI takes."""
        check_is_json(scope)
        try:
            body = reader.validate_json(await _read(receive))
        except ValidationError as error:
            raise mistake_of(error) from None
        inputs = [item if isinstance(item, str) else item.model_dump() for item in body.inputs]
        found = await in_time(receive, batcher.answer(inputs), limits.seconds)
        answers = told.model_validate({"model": served.name, "answers": [shaped(each, body.top) for each in found]})
        await send_json(send, writer.dump_json(answers, exclude_unset=True))

    return router, batcher, predict


def check_is_json(scope: MutableMapping[str, Any]) -> None:
    """Refuse a body of another kind, which a page elsewhere could send without asking."""
    kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(422, f"found the Content-Type {kind!r}; right is application/json")


async def _read(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(503, "the client has gone")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _described(asked: Any) -> Any:
    async def predict(body: asked) -> None:  # pyright: ignore[reportInvalidTypeForm] - made above
        """Answer all inputs in their order, or none: 422 names the first that cannot be taken."""

    return predict


def _work(served: Served) -> Callable[[list[Any]], list[Any]]:
    assert served.predict
    return _of_files(served.predict) if served.reads_files else served.predict


def _of_files(predict: Callable[[list[str]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """Return a function of files' contents, which a predictor of paths reads from a folder that passes."""

    def work(inputs: list[dict[str, str]]) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="bigbatch-serve-") as folder:
            paths = []
            for number, item in enumerate(inputs):
                path = Path(folder) / str(number)
                try:
                    path.write_bytes(base64.b64decode(item["data"], validate=True))
                except ValueError as error:
                    raise UserError("data", f"is not base64: {error}") from None
                paths.append(str(path))
            try:
                return predict(paths)
            except UserError as error:
                message = error.message
                for path in paths:
                    message = message.replace(path, "the file")
                raise UserError("data", message) from None

    return work
