"""The routes: prediction, health, metadata, and a web page."""

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
from fedkd.serve.images import MAX_PIXELS, MAX_SIDE, Refused, accepted, pixels
from fedkd.serve.network import Network

TOP = 10  # classes in a response, at most
DECODERS = 2  # threads; each needs memory for one image of the maximum size
MEMORY = 256_000_000  # bytes of the bodies of all requests; those of forms are there twice while they are read
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


@dataclass(frozen=True)
class Limits:
    """Limits of a server: bytes per request, pixels per image, concurrent requests, and batching.

    ``timeout`` is the number of seconds until a request has arrived, and of those that it then waits for its response.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = MAX_PIXELS
    backlog: int = 128
    timeout: float = 20.0
    max_batch: int = 64
    max_wait: float = 2.0  # milliseconds


class Service:
    """The state that the routes share. Nothing of a request is stored after its response."""

    def __init__(self, network: Network, limits: Limits) -> None:
        self.network, self.limits = network, limits
        self.active = 0  # requests that have arrived and wait for their response
        self.memory = bodies.Memory(max(MEMORY, limits.max_bytes))
        self.batches: Batches  # created within the event loop

    @asynccontextmanager
    async def running(self, app: Starlette) -> AsyncGenerator[None, None]:
        """Start the threads and the batching task, and stop them when the server stops."""
        self.batches = Batches(self.network.logits, self.limits.max_batch, self.limits.max_wait / 1000)
        self.decoders = ThreadPoolExecutor(DECODERS, "decoder")
        yield
        await self.batches.close()
        self.decoders.shutdown()

    async def predict(self, request: Request) -> Response:
        """The prediction for the image in the body; for a form, a list with one for each file, in their order."""
        with self.memory.for_body() as reserve:
            contents = await bodies.images(request, self.limits.max_bytes, self.limits.timeout, reserve)
            answers = await self._answers(contents)
        for index, answer in enumerate(answers):
            if isinstance(answer, Refused) and len(answers) > 1:
                raise Refused(answer.status, f"File {index + 1} of {len(answers)}: {answer}")
            if isinstance(answer, BaseException):
                raise answer
        is_form = request.headers.get("content-type", "").lower().startswith("multipart/")
        return JSONResponse({"predictions": answers} if is_form else answers[0], headers=HEADERS)

    async def _answers(self, contents: list[bytes]) -> list[dict[str, Any] | BaseException]:
        """The prediction, or the error, for each image. What has not begun at the timeout is not done."""
        if self.active >= self.limits.backlog:
            raise Refused(503, "Too many concurrent requests; try again in a second.")
        self.active += 1
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await asyncio.gather(*map(self._predict_one, contents), return_exceptions=True)
        except TimeoutError as error:
            message = f"No prediction within {self.limits.timeout:g} seconds; try again later."
            raise Refused(503, message) from error
        finally:
            self.active -= 1

    async def _predict_one(self, content: bytes) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        network, limit = self.network, self.limits.max_pixels
        image = await loop.run_in_executor(self.decoders, pixels, content, network.pixels, network.resize, limit)
        return prediction(await self.batches.logits(image), network.about["names"])

    async def health(self, request: Request) -> Response:
        """The status, and the numbers of images and of batches so far."""
        counts = {"images": self.batches.images, "runs": self.batches.runs}
        return JSONResponse({"status": "ok", **counts}, headers=HEADERS)

    async def model(self, request: Request) -> Response:
        """The metadata of the file and the limits of a request."""
        fixed = {"max_side": MAX_SIDE, "max_files": bodies.FILES, "memory": self.memory.limit, "formats": accepted()}
        return JSONResponse({**self.network.about, "limits": asdict(self.limits) | fixed}, headers=HEADERS)


def prediction(logits: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The class with the highest logit [C], and the probabilities of the top ten; a name is None if there is none.

    Raises:
        Refused: the logits are not finite (422).

    """
    if not np.isfinite(logits).all():
        raise Refused(422, "The network returns no finite logits for this image.")
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probs = exponentials / exponentials.sum()
    order = np.argsort(-logits, kind="stable")[:TOP].tolist()
    classes = [{"class": c, "name": names[c] if names else None, "probability": float(probs[c])} for c in order]
    return {"class": order[0], "name": classes[0]["name"], "probabilities": classes}


def app(network: Network, limits: Limits) -> Starlette:
    """The application; its state contains the `Service`."""
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
        exception_handlers={Refused: _refused, HTTPException: _http_error, ClientDisconnect: _disconnected},
        lifespan=service.running,
    )
    application.state.service = service
    return application


def policy(page: str) -> str:
    """The Content-Security-Policy of a page: only its own style and script, by their hashes."""

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
    # Without closing, the unread rest of the body would be read as the next request.
    headers = {**HEADERS, "Connection": "close"} | ({"Retry-After": "1"} if error.status == 503 else {})
    return JSONResponse({"error": str(error)}, error.status, headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "The routes are GET /, GET /health, GET /model and POST /predict."
    return JSONResponse({"error": message}, error.status_code, {**HEADERS, **(error.headers or {})})


def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # the client has disconnected
