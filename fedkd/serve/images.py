"""Pixels of an image in a request; limits are checked before decoding."""

from __future__ import annotations

import re
import warnings
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP", re.DOTALL)
LARGEST = 20_000_000  # pixels: 60 MB when decoded, and 250 MB while a WebP is
SCANS = 16  # of a JPEG of that size. Ten are usual; each takes 40 ms, and thousands fit into a small file.
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # LARGEST is lower


class Refused(Exception):  # noqa: N818 - nothing went wrong here
    """A request that is answered by words and a status of HTTP, 4xx or 503."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def pixels(content: bytes, side: int) -> np.ndarray:
    """The middle square of an image, upright, on white, [side, side, 3] in uint8. Of what moves, the first picture.

    Raises:
        Refused: it is empty (400), no image (415), too large (413) or damaged (422).

    """
    if not content:
        raise Refused(400, "The image is empty.")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            _check(image, content)
            # A JPEG can be decoded at a fraction of its size: a quarter of the time for a photograph of 12 megapixels.
            image.draft("RGB", (4 * side, 4 * side))
            square = _square(image, side)
            turn = _turn(image)
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(413, _too_large()) from error
    except UnidentifiedImageError as error:
        if SIGNATURE.match(content):
            raise Refused(422, "The image is damaged: it cannot be decoded.") from error
        raise Refused(415, "This is not an image that is understood; PNG, JPEG, WebP, GIF and BMP are.") from error
    except Exception as error:  # Pillow's decoders raise what damaged bytes lead to
        raise Refused(422, "The image is damaged: it cannot be decoded.") from error
    return np.array(square if turn is None else square.transpose(turn), np.uint8)


def _check(image: Image.Image, content: bytes) -> None:
    """Raise for what would take long to decode; only the header has been read so far."""
    size = image.width * image.height
    if size > LARGEST:
        raise Refused(413, _too_large())
    # A scan begins with this marker, and 255 is escaped among data.
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") * size > SCANS * LARGEST:
        raise Refused(422, "This JPEG has too many scans for its size.")


def _too_large() -> str:
    return f"The image has more than {LARGEST // 1_000_000} million pixels."


def _square(image: Image.Image, side: int) -> Image.Image:
    """The middle square, resized as training resizes. A square's middle is the same whichever way it is turned."""
    if image.mode.startswith("I;16"):  # Pillow would clip it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    plain = image if image.mode == mode else image.convert(mode)
    left, top = (plain.width - min(plain.size)) / 2, (plain.height - min(plain.size)) / 2
    box = (left, top, left + min(plain.size), top + min(plain.size))
    square = plain.resize((side, side), Image.Resampling.BICUBIC, box)
    if mode == "RGBA":
        white = Image.new("RGBA", square.size, "white")
        square = Image.alpha_composite(white, square).convert("RGB")
    return square


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF is no reason to refuse an image that can be seen
        return None
