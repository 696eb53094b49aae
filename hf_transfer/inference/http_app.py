"""The HTTP service of `serve`: POST /predict, GET /tasks, GET /health. Imported by the verb only: it needs FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hf_transfer import __version__
from hf_transfer.config.arguments.serving import Limits
from hf_transfer.errors import UserError
from hf_transfer.files import as_json
from hf_transfer.inference.batching import Batcher
from hf_transfer.inference.questions import (
    BAD_REQUEST,
    INVALID,
    TOO_LARGE,
    WRONG_TYPE,
    Question,
    Refused,
    examples,
    of_form,
    of_json,
)
from hf_transfer.inference.served import Served

BODY_SECONDS = 60  # within which a request has to be there
GRACE_SECONDS = 30  # for requests that are being answered when the server is stopped
TOO_SLOW, FAILED, BUSY = 408, 500, 503
_JSON, _FORM = "application/json", "multipart/form-data"
_PAGES = "POST /predict, GET /tasks, GET /health"
_READ_ON = 4  # times the limit that are read and thrown away, so that a client that is still sending sees the error

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def serve(app: FastAPI, listening: socket.socket, talks: bool = False) -> None:
    """Answer requests until SIGINT or SIGTERM, which is raised again when what had begun is answered.

    Args:
        app: see `make_app`.
        listening: bound socket.
        talks: whether each request is logged.
    """
    config = uvicorn.Config(
        app,
        log_level="info" if talks else "warning",
        access_log=talks,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listening])


def make_app(served: Served, limits: Limits, batch_wait: float) -> FastAPI:
    """The application, for uvicorn or another ASGI server with one worker.

    Args:
        served: the tasks.
        limits: what a request may hold.
        batch_wait: seconds that a request waits for others to share its batch.
    """
    service = _Service(served, limits, batch_wait)
    app = FastAPI(
        title="hf-transfer serve",
        version=__version__,
        lifespan=service.lifespan,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
    )
    app.add_api_route(
        "/predict", service.predict, methods=["POST"], response_model=None, openapi_extra={"requestBody": _body()}
    )
    app.add_api_route("/tasks", service.tasks, methods=["GET"], response_model=None)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_middleware(_BodyLimit, most=limits.max_bytes)
    return app


class _Service:
    def __init__(self, served: Served, limits: Limits, batch_wait: float):
        self.served, self.limits = served, limits
        self.batcher = Batcher(self._answers, lambda key: served[key[0]].batch_size, batch_wait)
        self.open = 0  # requests that are read or wait for their answer

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(self.batcher.work())
        yield
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working

    async def tasks(self) -> Response:
        """What each task reads, and its labels."""
        return _json({"tasks": self.served.about()})

    async def health(self) -> Response:
        """Whether it answers, and how many requests are open."""
        return _json({"status": "ok", "version": __version__, "tasks": len(self.served.names), "open": self.open})

    async def predict(self, request: Request) -> Response:
        """Answers in the order of the inputs, as `hf-transfer predict` gives them; of several tasks, by task."""
        if self.open >= self.limits.max_waiting:
            error = f"{self.open:,} requests are waiting."
            return _json({"error": error, "fix": "Try again in a moment."}, BUSY, {"Retry-After": "1"})
        self.open += 1
        try:
            question = await self._question(request)
            return _json({"answers": await self._answered(question)})
        finally:
            self.open -= 1

    async def _question(self, request: Request) -> Question:
        """Raises:
        Refused: it is not one that can be answered.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (_JSON, _FORM):
            raise Refused(
                WRONG_TYPE,
                f"The content type is {kind or 'missing'}.",
                f"Send texts as {_JSON}, images as {_FORM} in fields named inputs.",
            )
        try:
            body = await asyncio.wait_for(request.body(), BODY_SECONDS)
        except TimeoutError as error:
            raise Refused(TOO_SLOW, f"The request did not arrive within {BODY_SECONDS} seconds.") from error
        if kind == _JSON:
            return await asyncio.to_thread(of_json, body, self.served, self.limits)
        try:
            form = await request.form(max_files=self.limits.max_inputs)
        except HTTPException as error:
            status = TOO_LARGE if "Too many" in str(error.detail) else BAD_REQUEST
            raise Refused(status, f"The form cannot be read ({str(error.detail).rstrip('.')}).") from error
        files, fields = [], []
        for key, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields.append((key, value))
            elif key == "inputs":
                files.append((value.filename or "", await value.read()))
            else:
                raise Refused(INVALID, f"{key}: it is an upload.", "Uploads are in fields named inputs.")
        await form.close()
        return await asyncio.to_thread(of_form, files, fields, self.served, self.limits)

    async def _answered(self, question: Question) -> list[Any]:
        """Raises:
        Refused: an input cannot be read, or the model refuses it.
        """
        asked = [self.batcher.ask((name, question.top_k), question.inputs[name]) for name in question.tasks]
        done = await asyncio.gather(*asked, return_exceptions=True)
        for error in (one for one in done if isinstance(one, BaseException)):
            if isinstance(error, UserError):
                raise Refused(INVALID, error.message, error.fix) from error
            if isinstance(error, Exception):
                traceback.print_exception(error)
                raise Refused(FAILED, f"The model failed ({type(error).__name__}); the server's log says more.")
            raise error
        answers = [one for one in done if not isinstance(one, BaseException)]
        for i, answer in ((i, answer) for part in answers for i, answer in enumerate(part)):
            if "error" in answer:
                raise Refused(
                    INVALID, f"inputs[{i}]: {answer['error'].rstrip('.')}.", "None of the inputs was answered."
                )
        if not question.several:
            return answers[0]
        return [dict(zip(question.tasks, each, strict=True)) for each in zip(*answers, strict=True)]

    def _answers(self, key: tuple[str, int | None], inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """In the thread of the model: the answers of a batch."""
        predictor = self.served[key[0]]
        return list(predictor.stream(examples(predictor, inputs), key[1]))


class _BodyLimit:
    """Refuses a body that is longer than `most` bytes, whatever its headers say, without keeping it."""

    def __init__(self, app: Callable[..., Awaitable[None]], most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        count = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count <= self.most:
                return message
            while message.get("more_body") and count <= _READ_ON * self.most:
                message = await receive()
                count += len(message.get("body", b""))
            raise Refused(
                TOO_LARGE,
                f"The request exceeds the limit of {self.most / 1e6:g} MB.",
                "Send fewer or smaller inputs per request.",
            )

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = json.dumps(as_json(value), ensure_ascii=False, allow_nan=False)
    return Response(content.encode("utf-8", "backslashreplace"), status, headers, _JSON)


async def _refused(_: Request, error: Any) -> Response:
    return _json({"error": error.error, "fix": error.fix}, error.status)


async def _not_found(request: Request, error: Any) -> Response:
    said = f"{request.method} {request.url.path}: {str(error.detail).lower()}."
    return _json({"error": said, "fix": f"There are {_PAGES}."}, error.status_code, error.headers)


def _body() -> dict[str, Any]:
    """What `/predict` takes, as OpenAPI says it."""
    task = {"type": ["string", "array"], "items": {"type": "string"}, "description": "one task, or several"}
    top_k = {"type": "integer", "minimum": 1, "description": "only so many scores, the highest first"}
    texts = {"description": "a text, a pair [text, text] or {column: text}; or a list of those"}
    uploads = {"type": "array", "items": {"type": "string", "contentMediaType": "image/*"}}
    kinds = {_JSON: texts, _FORM: uploads}
    return {
        "required": True,
        "content": {
            kind: {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {"inputs": inputs, "task": task, "top_k": top_k},
                    "additionalProperties": False,
                }
            }
            for kind, inputs in kinds.items()
        },
    }
