"""The routes: images in, classes and probabilities out, and a page to try it by hand."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fedkd.serve import bodies
from fedkd.serve.batches import Batches
from fedkd.serve.images import FORMATS, LARGEST, Refused, pixels
from fedkd.serve.network import Network

TOP = 10  # classes of an answer
DECODERS = 2  # threads; each may hold an image of the largest size
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


@dataclass(frozen=True)
class Limits:
    """What a server takes on: bytes of a request, requests at once, seconds for a request to arrive; and batching."""

    max_bytes: int = 5_000_000
    backlog: int = 128
    timeout: float = 20.0
    max_batch: int = 64
    max_wait: float = 2.0  # milliseconds


class Service:
    """What the routes share. Nothing of a request outlives its answer."""

    def __init__(self, network: Network, limits: Limits) -> None:
        self.network, self.limits = network, limits
        self.inside = 0  # requests that are being read or answered: their bodies are in memory
        self.batches: Batches  # made within the event loop

    @asynccontextmanager
    async def running(self, app: Starlette) -> AsyncGenerator[None, None]:
        """The threads and the task that answer, for as long as the server runs."""
        self.batches = Batches(self.network.logits, self.limits.max_batch, self.limits.max_wait / 1000)
        self.decoders = ThreadPoolExecutor(DECODERS, "decoder")
        yield
        await self.batches.close()
        self.decoders.shutdown()

    async def predict(self, request: Request) -> Response:
        """One answer for an image that is the body; for a form, one for each of its files, in their order."""
        if self.inside >= self.limits.backlog:
            raise Refused(503, "Too many requests at once; try again in a second.")
        self.inside += 1
        try:
            sent = await bodies.images(request, self.limits.max_bytes, self.limits.timeout)
            answers = await asyncio.gather(*map(self._answer, sent), return_exceptions=True)
        finally:
            self.inside -= 1
        for place, answer in enumerate(answers):
            if isinstance(answer, Refused) and len(answers) > 1:
                raise Refused(answer.status, f"File {place + 1} of {len(answers)}: {answer}")
            if isinstance(answer, BaseException):
                raise answer
        is_form = request.headers.get("content-type", "").lower().startswith("multipart/")
        return JSONResponse({"answers": answers} if is_form else answers[0], headers=HEADERS)

    async def _answer(self, content: bytes) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self.decoders, pixels, content, self.network.pixels)
        return ranked(await self.batches.ask(image), self.network.about["names"])

    async def health(self, request: Request) -> Response:
        """That it answers, and how much it has answered."""
        counts = {"images": self.batches.images, "runs": self.batches.runs}
        return JSONResponse({"status": "ok", **counts}, headers=HEADERS)

    async def model(self, request: Request) -> Response:
        """What the file says about itself, and what a request may be."""
        limits = {**asdict(self.limits), "pixels": LARGEST, "files": bodies.FILES, "formats": FORMATS}
        return JSONResponse({**self.network.about, "limits": limits}, headers=HEADERS)


def ranked(logits: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The likeliest class of logits [C], and the probabilities of the ten likeliest; a name is null if there is none.

    Raises:
        Refused: they are not all finite (422).

    """
    if not np.isfinite(logits).all():
        raise Refused(422, "The network gives no finite answer to this image.")
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probs = exponentials / exponentials.sum()
    order = np.argsort(-logits, kind="stable")[:TOP].tolist()
    classes = [{"class": c, "name": names[c] if names else None, "probability": float(probs[c])} for c in order]
    return {"class": order[0], "name": classes[0]["name"], "probabilities": classes}


def app(network: Network, limits: Limits) -> Starlette:
    """The application; its state has the `Service`."""
    service = Service(network, limits)
    page = files("fedkd.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {**HEADERS, "Content-Security-Policy": policy(page), "Referrer-Policy": "no-referrer"}

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    application = Starlette(
        routes=[
            Route("/", index),
            Route("/predict", service.predict, methods=["POST"]),
            Route("/health", service.health),
            Route("/model", service.model),
        ],
        exception_handlers={Refused: _refused, HTTPException: _no_route, ClientDisconnect: _gone},
        lifespan=service.running,
    )
    application.state.service = service
    return application


def policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own style and script, by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    # What was not read would be taken for the next request, or be read for ever.
    headers = {**HEADERS, "Connection": "close"} | ({"Retry-After": "1"} if error.status == 503 else {})
    return JSONResponse({"error": str(error)}, error.status, headers)


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "GET /, /health and /model, and POST /predict, are all there is."
    return JSONResponse({"error": message}, error.status_code, {**HEADERS, **(error.headers or {})})


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it
