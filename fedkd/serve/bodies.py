"""The images of a request, read into memory within limits of size, number and time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from fedkd.serve.images import Refused

FILES = 16  # of a form, at most, and the same number of other fields, which are ignored
DISCARD = 8  # times the limit: up to this size the body is read and discarded, so that the sender receives the error


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize  # nothing is written to disk; the size of the body is limited


class Memory:
    """The memory for the bodies of all requests, at most ``limit`` bytes. A slow upload takes only what has arrived."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    @contextmanager
    def for_body(self) -> Iterator[Callable[[int], None]]:
        """A function that reserves bytes for one body, or raises `Refused` (503). The block's end releases them."""
        reserved = 0

        def reserve(count: int) -> None:
            nonlocal reserved
            if self.used + count > self.limit:
                raise Refused(503, "Too many concurrent requests; try again in a second.")
            reserved += count
            self.used += count

        try:
            yield reserve
        finally:
            self.used -= reserved


async def images(request: Request, max_bytes: int, seconds: float, reserve: Callable[[int], None]) -> list[bytes]:
    """The encoded images of a request: the body itself, or the files of a form. At least one.

    ``max_bytes`` is the size of the whole body; ``reserve`` is called with the size of each part that arrives.

    Raises:
        Refused: there is no image (400), too many bytes (413), another content type (415), a timeout (408), or no
            memory (503).

    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await _body(request, max_bytes, seconds, reserve)
    if kind == "multipart/form-data":
        return await _files(request, body)
    if not body:
        raise Refused(400, "There is no image in the request.")
    if not kind.startswith("image/"):
        raise Refused(415, "Send an image as the body, with its Content-Type (image/png, …), or a form with files.")
    return [body]


async def _body(request: Request, max_bytes: int, seconds: float, reserve: Callable[[int], None]) -> bytes:
    too_large = Refused(413, f"The request is larger than {max_bytes:,} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > DISCARD * max_bytes:
        raise too_large
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():  # counted, since Content-Length may be wrong
                size += len(chunk)
                if size <= max_bytes:
                    reserve(len(chunk))
                    body += chunk
                elif size > DISCARD * max_bytes:
                    break
    except TimeoutError as error:
        raise Refused(408, f"The request did not arrive within {seconds:g} seconds.") from error
    if size > max_bytes:
        raise too_large
    return bytes(body)


async def _files(request: Request, body: bytes) -> list[bytes]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _InMemory(request.headers, whole(), max_files=FILES, max_fields=FILES).parse()
    except MultiPartException as error:
        status = 413 if "Too many" in error.message else 400
        raise Refused(status, f"The form cannot be used: {error.message}") from error
    except FormParserError as error:
        raise Refused(400, "The form is damaged.") from error
    contents = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
    await form.close()
    if not contents:
        raise Refused(400, "There is no file in the form.")
    return contents
