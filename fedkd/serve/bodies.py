"""The images of a request, read into memory within limits of size, number and time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from fedkd.serve.images import Refused

FILES = 16  # of a form, and as many fields beside them, which nobody reads
DISCARD = 8  # times the limit: so much is read and thrown away, so that the sender gets to hear why


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize  # nothing is written to disk; the body as a whole is limited


async def images(request: Request, largest: int, seconds: float) -> list[bytes]:
    """The encoded images of a body: itself, or the files of a form. At least one.

    ``largest`` is in bytes, of the whole body.

    Raises:
        Refused: there is none (400), too much (413), the wrong thing (415), or it took too long (408).

    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await _body(request, largest, seconds)
    if kind == "multipart/form-data":
        return await _files(request, body)
    if not body:
        raise Refused(400, "There is no image in the request.")
    if not kind.startswith("image/"):
        raise Refused(415, "Send an image as the body, with its Content-Type (image/png, …), or a form with files.")
    return [body]


async def _body(request: Request, largest: int, seconds: float) -> bytes:
    too_much = Refused(413, f"The request is larger than {largest:,} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > DISCARD * largest:
        raise too_much
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():  # counted: what Content-Length says is a promise
                size += len(chunk)
                if size <= largest:
                    body += chunk
                elif size > DISCARD * largest:
                    break
    except TimeoutError as error:
        raise Refused(408, f"The request did not arrive within {seconds:g} seconds.") from error
    if size > largest:
        raise too_much
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
    found = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
    await form.close()
    if not found:
        raise Refused(400, "There is no file in the form.")
    return found
