"""The HTTP interface."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from ddops import __version__
from ddops.class_names import UnknownClass, class_number
from ddops.export.manifest import ModelFacts
from ddops.inference.seeds import Draw, Pixels, to_picture
from ddops.serving.batcher import QueueFull
from ddops.serving.context import RequestContext
from ddops.serving.metrics import Metrics
from ddops.serving.models import ModelSlot, ServedModel
from ddops.serving.schemas import LARGEST_SEED, EncodedImage, Health, ImageRequest, ImageResponse, Problem
from ddops.serving.settings import ServeSettings

log = logging.getLogger("ddops.serving")

RETRY_STARTING: Final = 2
"""Seconds after which to ask again a server that is still loading its model."""
IMAGE_TYPES: Final = {"png": "image/png", "webp": "image/webp"}
WEBP_SIDE: Final = 16_383
"""Pixels that the format can say."""

bearer = HTTPBearer(auto_error=False, description="Needed where the server was started with a token")


class Service:
    """What the endpoints share."""

    def __init__(self, place: Path, settings: ServeSettings, token: str | None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.slot = ModelSlot(place, settings, self.metrics)
        self.metrics.watch_queue(lambda: self.slot.current.batcher.waiting if self.slot.current else 0)
        self.draining = False
        self.failure: Exception | None = None
        """Why the first model could not be loaded: the server stops then."""
        self._token = token.encode() if token is not None else None

    def check_token(self, given: HTTPAuthorizationCredentials | None) -> None:
        """Raises HTTPException 401. The comparison takes as long whatever is given."""
        if self._token is None:
            return
        offered = given.credentials.encode("utf-8", "surrogateescape") if given is not None else b""
        if not hmac.compare_digest(offered, self._token):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    def model(self) -> ServedModel:
        """The current model; raises HTTPException 503 while there is none."""
        if self.slot.current is None:
            raise HTTPException(503, "the model is still loading", {"Retry-After": str(RETRY_STARTING)})
        return self.slot.current

    def _label(self, request: ImageRequest, facts: ModelFacts) -> int | str:
        """The class or the prompt, whichever the model draws for; raises HTTPException 422."""
        if facts.captions is not None:
            if request.prompt is None or request.class_label is not None:
                raise HTTPException(422, "prompt: this model draws for a prompt, and for no class")
            if len(request.prompt) > self.settings.max_prompt:
                raise HTTPException(422, f"prompt: this server takes {self.settings.max_prompt} characters at most")
            return request.prompt
        if request.class_label is None or request.prompt is not None:
            raise HTTPException(422, "class: this model draws for a class, and for no prompt")
        try:
            return class_number(str(request.class_label), facts.num_classes, facts.class_names or ())
        except UnknownClass as error:
            raise HTTPException(422, f"class: {error}") from None

    async def draw(self, request: ImageRequest) -> tuple[ServedModel, list[Draw], list[Pixels]]:
        """Raises HTTPException: 422 unknown class or too many images, 429 no room, 503 not ready, 504 too late."""
        settings, model = self.settings, self.model()
        facts = model.manifest.model
        if request.count > settings.max_count:
            raise HTTPException(422, f"count: this server draws at most {settings.max_count} images a request")
        if request.format == "webp" and request.count * facts.image_size > WEBP_SIDE:
            raise HTTPException(422, f"count: {request.count} images are wider than a webp's {WEBP_SIDE} pixels")
        label = self._label(request, facts)
        seed = secrets.randbelow(LARGEST_SEED + 1) if request.seed is None else request.seed
        draws = [Draw(seed, index, label) for index in range(request.count)]
        timeout_s = min(request.timeout_s or settings.deadline_s, settings.deadline_s)
        try:
            return model, draws, await model.batcher.draw(draws, timeout_s)
        except QueueFull as full:
            raise HTTPException(429, str(full), {"Retry-After": str(full.retry_after_s)}) from None
        except TimeoutError:
            raise HTTPException(504, f"not drawn within {timeout_s:g} s") from None


def encode(pixels: Sequence[Pixels], format: str) -> bytes:
    """One lossless picture of images side by side."""
    buffer = io.BytesIO()
    to_picture(np.concatenate(pixels, axis=1)).save(buffer, format=format.upper(), **_OPTIONS[format])
    return buffer.getvalue()


_OPTIONS: Final[dict[str, dict[str, Any]]] = {"png": {"compress_level": 3}, "webp": {"lossless": True}}


def _lifespan(service: Service) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def serve() -> None:
            try:
                await service.slot.refresh()
            except Exception as error:
                service.failure = error
                log.error("no model to serve", extra={"error": str(error)})
                return
            await service.slot.watch()

        task = asyncio.create_task(serve())
        yield
        task.cancel()
        await service.slot.close()
        log.info("drained")

    return lifespan


_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": Problem, "description": "The body is no text"},
    401: {"model": Problem, "description": "No token, or a wrong one"},
    408: {"model": Problem, "description": "The body came too slowly"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Problem, "description": "The request asks for something that there is not"},
    429: {"model": Problem, "description": "Too many images are waiting; see Retry-After"},
    500: {"model": Problem, "description": "The model failed"},
    503: {"model": Problem, "description": "No model is loaded yet; see Retry-After"},
    504: {"model": Problem, "description": "The deadline has passed"},
}
_PICTURE: Final = {"schema": {"type": "string", "format": "binary"}}


def create_app(place: Path, settings: ServeSettings, token: str | None = None) -> FastAPI:
    """The application; ``app.state.service`` is its :class:`Service`. ``place`` is watched for newer bundles."""
    service = Service(place, settings, token)
    app = FastAPI(
        title="ddops",
        version=__version__,
        summary="Images in one step",
        lifespan=_lifespan(service),
        redoc_url=None,
        docs_url=None,
    )
    app.state.service = service
    app.add_middleware(RequestContext, metrics=service.metrics, max_body_bytes=settings.max_body_bytes)
    app.add_exception_handler(HTTPException, _explain_http)
    app.add_exception_handler(RequestValidationError, _explain_validation)
    app.add_exception_handler(Exception, _explain_failure)

    @app.post(
        "/v1/images",
        summary="Draw images of a class, or for a prompt",
        response_class=Response,
        responses={
            200: {
                "model": ImageResponse,
                "description": "The images; `X-Seed` and `X-Model` say what they were made of",
                "content": {"image/png": _PICTURE, "image/webp": _PICTURE},
            },
            **_PROBLEMS,
        },
    )
    async def images(
        request: ImageRequest, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> Response:
        service.check_token(credentials)
        model, draws, pixels = await service.draw(request)
        identity, first = model.manifest.identity, draws[0]
        headers = {"X-Model": identity, "X-Seed": str(first.seed)}
        if request.format != "base64":
            content = await asyncio.to_thread(encode, pixels, request.format)
            return Response(content, media_type=IMAGE_TYPES[request.format], headers=headers)
        encoded = await asyncio.to_thread(lambda: [base64.b64encode(encode([one], "png")).decode() for one in pixels])
        answer = ImageResponse(
            model=identity,
            class_number=first.label if isinstance(first.label, int) else None,
            prompt=first.label if isinstance(first.label, str) else None,
            seed=first.seed,
            images=[EncodedImage(index=index, media_type="image/png", data=data) for index, data in enumerate(encoded)],
        )
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    @app.get("/healthz", summary="Is the process alive?")
    async def healthz() -> Health:
        return Health(status="alive")

    @app.get("/readyz", summary="May it be sent requests?", responses={503: {"model": Health}})
    async def readyz(response: Response) -> Health:
        current = service.slot.current
        if service.draining or current is None:
            response.status_code = 503
            return Health(status="draining" if service.draining else "starting")
        return Health(status="ready", model=current.manifest.identity)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(files("ddops.serving").joinpath("page.html").read_text())

    return app


def _problem(request: Request, status: int, error: str, headers: dict[str, str] | None = None) -> Response:
    # Plain ASCII: a name may hold half of a surrogate pair, which UTF-8 cannot.
    body = json.dumps({"error": error, "request_id": request.state.request_id})
    return Response(body, status, headers, media_type="application/json")


async def _explain_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(request, error.status_code, error.detail, dict(error.headers or {}))


async def _explain_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
    return _problem(request, 422, "; ".join(problems))


async def _explain_failure(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error, extra={"request_id": request.state.request_id})
    return _problem(request, 500, "the model failed; the log says why")
