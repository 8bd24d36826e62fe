"""The server as an ASGI application: routes for what the model can do, behind the guard."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from bigbatch.tools.serving.batching import Batcher
from bigbatch.tools.serving.generation import Writer, rows_of
from bigbatch.tools.serving.guard import Guard
from bigbatch.tools.serving.limits import Limits
from bigbatch.tools.serving.openai_routes import embedding_router, models_router, writing_router
from bigbatch.tools.serving.opening import Served
from bigbatch.tools.serving.page import docs_page, page_headers, try_page
from bigbatch.tools.serving.predicting import check_is_json, predict_router
from bigbatch.tools.serving.refusal import RefusedError, documented, error_document, mistake_of
from bigbatch.tools.serving.telemetry import Telemetry


class Health(BaseModel):
    """How the server is."""

    status: str
    model: str
    recipe: str
    engine: str


class Server(NamedTuple):
    """The application, and what steers it."""

    guard: Guard
    app: FastAPI


def build_server(served: Served, limits: Limits, token: str | None) -> Server:
    """Make the application that serves a model; with a token, to those who have it."""
    telemetry = Telemetry()
    routers, workers, direct = _parts(served, limits, telemetry)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for worker in workers:
            worker.thread.start()
        yield

    title = f"{served.name} ({served.recipe_name})"
    app = FastAPI(title=title, version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    for router in routers:
        app.include_router(router)
    _add_errors(app)
    paths = {"/", "/docs", "/health", "/metrics", *app.openapi()["paths"]}
    guard = Guard(app, direct, limits, token, telemetry, paths)

    @app.get("/health", responses=documented(503), summary="Whether the server is well")
    async def health() -> Health:
        if guard.is_stopping or not all(worker.thread.is_alive() for worker in workers):
            raise RefusedError(503, "the server is stopping" if guard.is_stopping else "the model's thread has ended")
        return Health(status="ok", model=served.name, recipe=served.recipe_name, engine=served.engine)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    pages = {path: make(served, token is not None) for path, make in (("/", try_page), ("/docs", docs_page))}

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page(request: Request) -> HTMLResponse:
        text = pages[request.url.path]
        return HTMLResponse(text, headers=page_headers(text))

    return Server(guard, app)


def _parts(
    served: Served, limits: Limits, telemetry: Telemetry
) -> tuple[list[Any], list[Batcher | Writer], dict[str, Any]]:
    """Return the routes, what runs the model behind them, and what answers by itself."""
    routers, workers, direct = [models_router(served)], [], {}
    if served.predict:
        router, batcher, direct["/predict"] = predict_router(served, limits, telemetry)
        routers.append(router)
        workers.append(batcher)
    if served.embedding:
        router, batcher = embedding_router(served, limits, telemetry)
        routers.append(router)
        workers.append(batcher)
    if served.generating:
        writer = Writer(rows_of(served.generating.model, limits.batch), telemetry)
        routers.append(writing_router(served, limits, writer))
        workers.append(writer)
    return routers, workers, direct


def _add_errors(app: FastAPI) -> None:
    """Tell whatever goes wrong in one form."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        document = error_document(error.status_code, error.detail, error.param)
        return JSONResponse(document, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        try:
            check_is_json(request.scope)
        except RefusedError as mistake:
            return await refused(request, mistake)
        return await refused(request, mistake_of(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        status, path = 422 if error.status_code == 400 else error.status_code, request.url.path
        told = {404: f"there is no {path} here; /docs tells what there is", 405: f"{request.method} is not for {path}"}
        return JSONResponse(error_document(status, told.get(status, str(error.detail))), status, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_document(500, f"the model failed: {type(error).__name__}"), 500)
