"""The application: paths, and what each answers. Imports no torch."""

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from llava import __version__
from llava.assets import SAMPLES
from llava.files import read_json
from llava.report_page.html import STATIC, api_page, front_page
from llava.serve.chat import ChatBody, complete, read_chat, stream
from llava.serve.events import KEEP_ALIVE, Emit, event, while_working
from llava.serve.guard import Guard
from llava.serve.limits import RequestError
from llava.serve.service import Accepted, Service, gather
from llava.serve.uploads import AnalyzeBody, Asked, StabilityBody, Wants, read_asked, read_body, read_model

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "A key is needed."},
    413: {"description": "Too many bytes or images."},
    422: {"description": "An image, an option or a field is not as it must be; the message says which and why."},
    429: {"description": "The server is full; Retry-After says when to try again."},
    503: {"description": "The server is stopping or not ready."},
    504: {"description": "There was no answer in time."},
}
_TITLE = "Real or fake, and why"
_ABOUT = (
    "Tells AI-generated and manipulated images from real ones, and says why. Images are never stored and addresses "
    "never fetched."
)


def make_app(service: Service, keys: Sequence[str] = ()) -> ASGIApp:
    """Returns the application.

    Args:
        service: The model and its limits.
        keys: API keys that ``/v1`` asks for; none lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title=_TITLE, description=_ABOUT, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    _add_analysis(app, service)
    _add_openai(app, service)
    _add_health(app, service)
    _add_pages(app, service, asks_for_key=bool(keys))
    _add_errors(app)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    return Guard(app, service, keys, paths)


class _Events(StreamingResponse):
    """Server-sent events of a request that keeps its places until the last one is sent, or the client has gone.

    Args:
        events: The events.
        places: Are freed at the end, also where the events were never begun.
    """

    def __init__(self, events: AsyncIterator[bytes], places: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        with self._places:
            await super().__call__(scope, receive, send)


# --- analysis


def _add_analysis(app: FastAPI, service: Service) -> None:
    @app.post("/v1/analyze", responses=_ERRORS, openapi_extra=_body_of_images(AnalyzeBody))
    async def analyze(request: Request) -> Response:
        """Analyses one image or several.

        A single image that cannot be analysed is answered by its error; of several, each has its result or its error.
        With stream the answers come as events: text (a piece of an image's answer), result, and done at the end.
        """
        with ExitStack() as places:
            places.enter_context(service.batcher.places(1))
            asked = await read_asked(request, service.limits)
            places.enter_context(service.batcher.places(len(asked.uploads) - 1))
            if not asked.wants.stream:
                found = await service.answered(request, _results(service, asked))
                return JSONResponse({**_about(service), "results": found})
            first = None
            if len(asked.uploads) == 1:
                first = await service.answered(request, service.accept(asked.uploads[0], asked.wants))
            return _Events(_events(service, asked, first), places.pop_all())

    @app.post("/v1/stability", responses=_ERRORS, openapi_extra=_body_of_images(StabilityBody))
    async def stability(request: Request) -> Response:
        """Says whether the verdict on an image holds after JPEG, resizing and cropping."""
        with service.batcher.places(4):
            asked = await read_asked(request, service.limits)
            if len(asked.uploads) > 1:
                raise RequestError(413, "too_many_images", "one image a request is taken here")
            if asked.wants != Wants(options=asked.wants.options):
                raise RequestError(422, "bad_request", "only image and options are taken here")
            return JSONResponse(await service.answered(request, service.stability(asked.uploads[0], asked.wants)))


async def _results(service: Service, asked: Asked) -> list[dict[str, Any]]:
    """A result or an error for each image, in order.

    Raises:
        RequestError: The only image cannot be analysed.
    """

    async def one(number: int) -> dict[str, Any]:
        upload = asked.uploads[number]
        try:
            return await service.result(await service.accept(upload, asked.wants))
        except RequestError as error:
            if len(asked.uploads) == 1 or error.status >= 500:
                raise
            return {"name": upload.name, **error.body}

    return await gather([one(number) for number in range(len(asked.uploads))])


async def _events(service: Service, asked: Asked, first: Accepted | None) -> AsyncIterator[bytes]:
    """Yields what is said of each image as it comes."""

    async def one(number: int, emit: Emit) -> None:
        upload = asked.uploads[number]

        def heard(piece: str, logprob: float, fake_probability: float) -> None:
            emit(event({"index": number, "text": piece}, "text"))

        try:
            accepted = first or await service.accept(upload, asked.wants)
            found = await service.result(accepted, heard)
        except RequestError as error:
            found = {"name": upload.name, **error.body}
        emit(event({"index": number, **_about(service), **found}, "result"))

    async def work(emit: Emit) -> None:
        await gather([one(number, emit) for number in range(len(asked.uploads))])

    try:
        async for data in while_working(work, service.limits.timeout, service.late()):
            yield KEEP_ALIVE if data is None else data
    except RequestError as error:
        yield event(error.body, "error")
    yield event({}, "done")


def _about(service: Service) -> dict[str, str]:
    return {"model": service.name, "system": service.detector.system.name, "notice": service.detector.notice}


def _body_of_images(model: type[BaseModel]) -> dict[str, Any]:
    """What the documentation says of a body with images, as a form or as JSON."""
    schema = model.model_json_schema()
    wants = {name: value for name, value in schema["properties"].items() if name not in ("image", "images")}
    form = {
        **wants,
        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "Image files."},
        "options": {"type": "string", "description": "Options of the answer as a JSON object."},
    }
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": ["image"]}},
        "application/json": {"schema": schema},
    }
    return {"requestBody": {"required": True, "content": content}}


# --- OpenAI's form


def _add_openai(app: FastAPI, service: Service) -> None:
    schema = ChatBody.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs")
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post("/v1/chat/completions", responses=_ERRORS, openapi_extra=body)
    async def chat(request: Request) -> Response:
        """Answers about one image in OpenAI's form; the whole report lies under forgery."""
        with ExitStack() as places:
            places.enter_context(service.batcher.places(1))
            asked = read_model(ChatBody, await read_body(request))
            if not asked.stream:
                return JSONResponse(await service.answered(request, complete(asked, service)))
            accepted = await service.answered(request, service.accept(*read_chat(asked, service)))
            return _Events(stream(asked, accepted, service), places.pop_all())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Lists the one model that answers here."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", responses={404: {"description": "There is no such model."}})
    async def model(name: str) -> dict[str, Any]:
        """Describes the model."""
        if name != service.name:
            raise RequestError(404, "model_not_found", f"there is no such model here, but {service.name!r}")
        return _model(service)

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        described = plain()
        described.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _model(service: Service) -> dict[str, Any]:
    own = {"system": service.detector.system.name, "notice": service.detector.notice}
    options = service.options.model.model_json_schema()["properties"]
    detector = service.detector
    gives = {"streams": detector.streams, "abstains": detector.rule is not None, "attention": detector.has_attention}
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "local",
        **own,
        "options": options,
        "gives": gives,
    }


# --- health


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Says that the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Not ready."}})
    async def readyz() -> Response:
        """Says whether images are taken."""
        if service.stopping or not service.batcher.is_working:
            status = "stopping" if service.stopping else "the model's thread has ended; restart the server"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ready", "model": service.name})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' form."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# --- pages


def _add_pages(app: FastAPI, service: Service, *, asks_for_key: bool) -> None:
    samples = [entry["image"] for entry in read_json(SAMPLES / "samples.json")["samples"]]
    about = {
        **_about(service),
        "streams": service.detector.streams,
        "attention": service.detector.has_attention,
        "asks_for_key": asks_for_key,
        "samples": samples,
        "max_images": service.limits.images,
        "upload_mb": service.limits.upload_mb,
    }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(front_page(about))

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))

    @app.get("/samples/{name}", include_in_schema=False)
    async def sample(name: str) -> FileResponse:
        if name not in samples:
            raise RequestError(404, "not_found", "there is no such sample")
        return FileResponse(SAMPLES / name)

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


# --- errors


def _add_errors(app: FastAPI) -> None:
    """Gives every error one form."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body = RequestError(error.status_code, "http_error", str(error.detail)).body
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Exception) -> Response:
        return JSONResponse(RequestError(422, "bad_request", "the request is not as it must be").body, 422)
