"""Pixels of an image in a request: made as in training, within limits that are checked before decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedkd.data import pictures

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fedkd.core.values import Resize

# Those that browsers and phones write. TIFF, JPEG 2000 and PPM are refused: each further decoder is one more that
# strangers can attack, and browsers show none of these.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
NAMES = {"WEBP": "WebP", "HEIF": "HEIC"}  # as people know them
MAX_PIXELS = 25_000_000  # by default: photos of 24 megapixels, 5712 x 4284. docs/serving.md has the memory.
MAX_SIDE = 16_384  # pixels: decoding takes time for each row too
MAX_SCANS = 16  # of a JPEG of that size. Ten are usual; each takes 40 ms, and a small file can have thousands.


class Refused(Exception):  # noqa: N818 - not an error of the server
    """A request that is refused with a message and an HTTP status, 4xx or 503."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def pixels(content: bytes, side: int, resize: Resize, max_pixels: int) -> np.ndarray:
    """The pixels [side, side, 3] of an image, with the same bits as in training.

    Raises:
        Refused: the content is empty (400), not an image (415), too large (413) or damaged (422).

    """
    if not content:
        raise Refused(400, "The image is empty.")
    try:
        with pictures.opened(content, max_pixels, FORMATS) as image:
            _check(image, content, max_pixels)
            return pictures.pixels(image, side, resize)
    except pictures.Unsupported as problem:
        *most, last = accepted()
        message = f"This is not a supported image: it {problem}; use {', '.join(most)} or {last}."
        raise Refused(415, message) from problem
    except pictures.BadPicture as problem:
        raise Refused(413 if isinstance(problem, pictures.TooLarge) else 422, f"The image {problem}.") from problem


def accepted() -> list[str]:
    """The names of the formats that can be decoded here."""
    return [NAMES.get(name, name) for name in pictures.installed(FORMATS)]


def _check(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """Refuse images that take long to decode. Only the header has been read so far."""
    if max(image.size) > MAX_SIDE:
        raise pictures.TooLarge(f"has a side of more than {MAX_SIDE:,} pixels")
    # A scan begins with this marker, which cannot occur in the data, since 255 is escaped there.
    scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 0
    if scans * image.width * image.height > MAX_SCANS * max_pixels:
        raise pictures.Damaged("has too many scans for its size")
