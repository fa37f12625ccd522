"""Pixels of an image in a request; limits are checked before decoding."""

from __future__ import annotations

import re
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP", re.DOTALL)
MAX_PIXELS = 20_000_000  # pixels: 60 MB when decoded, 250 MB while decoding WebP
MAX_SIDE = 16_384  # pixels: decoding takes time for each row too
MAX_SCANS = 16  # of a JPEG of that size. Ten are usual; each takes 40 ms, and a small file can have thousands.
ORIENTATION = 0x0112  # the EXIF tag
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower


class Refused(Exception):  # noqa: N818 - not an error of the server
    """A request that is refused with a message and an HTTP status, 4xx or 503."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def pixels(content: bytes, side: int) -> np.ndarray:
    """The central square of an image, upright, on white: uint8 [side, side, 3]. Of an animation, the first frame.

    Raises:
        Refused: the content is empty (400), not an image (415), too large (413) or damaged (422).

    """
    if not content:
        raise Refused(400, "The image is empty.")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            _check(image, content)
            # A JPEG can be decoded at a fraction of its size: a quarter of the time for a photograph of 12 megapixels.
            image.draft("RGB", (4 * side, 4 * side))
            square = _square(image, side)
            transpose = _transpose(image)
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(413, _too_large()) from error
    except UnidentifiedImageError as error:
        if SIGNATURE.match(content):
            raise Refused(422, "The image is damaged: it cannot be decoded.") from error
        raise Refused(415, "This is not a supported image; use PNG, JPEG, WebP, GIF or BMP.") from error
    except Exception as error:  # Pillow's decoders raise many types of errors for damaged bytes
        raise Refused(422, "The image is damaged: it cannot be decoded.") from error
    return np.array(square if transpose is None else square.transpose(transpose), np.uint8)


def _check(image: Image.Image, content: bytes) -> None:
    """Refuse images that take long to decode. Only the header has been read so far."""
    size = image.width * image.height
    if size > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise Refused(413, _too_large())
    # A scan begins with this marker, which cannot occur in the data, since 255 is escaped there.
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") * size > MAX_SCANS * MAX_PIXELS:
        raise Refused(422, "This JPEG has too many scans for its size.")


def _too_large() -> str:
    return f"The image has more than {MAX_PIXELS // 1_000_000} million pixels, or a side of more than {MAX_SIDE:,}."


def _square(image: Image.Image, side: int) -> Image.Image:
    """The central square, resized as in training. It is the same before and after a rotation."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    converted = image if image.mode == mode else image.convert(mode)
    left, top = (converted.width - min(converted.size)) / 2, (converted.height - min(converted.size)) / 2
    box = (left, top, left + min(converted.size), top + min(converted.size))
    square = converted.resize((side, side), Image.Resampling.BICUBIC, box)
    if mode == "RGBA":
        white = Image.new("RGBA", square.size, "white")
        square = Image.alpha_composite(white, square).convert("RGB")
    return square


def _transpose(image: Image.Image) -> Image.Transpose | None:
    try:
        return ORIENTATIONS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # an image with damaged EXIF data can still be decoded
        return None
