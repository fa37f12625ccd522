"""Pictures: the one way from an image file to pixels, in training, in the proxy set, in export and in serving.

PyTorch is not imported here, so that `fedkd.serve` works without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

from fedkd.core.values import MAX_PIXELS, Resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What Pillow opens without running another program (as it does for PostScript). AVIF and HEIF need a decoder.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "avif"),
    )
)
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
ORIENTATION = 0x0112  # the EXIF tag
PHOTOMETRIC = 262  # the TIFF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Image.MAX_IMAGE_PIXELS = None  # the limit is that of `opened`, which is checked before anything is decoded


class BadPicture(Exception):  # noqa: N818 - a reason, which the caller makes a message of
    """Why a picture cannot be used, as the end of a sentence: it "is damaged"."""


class Unsupported(BadPicture):
    """It is not an image, or no decoder for it is installed."""


class TooLarge(BadPicture):
    """It has too many pixels."""


class Damaged(BadPicture):
    """It is truncated, or its content is not what its header says."""


@lru_cache
def can_read_heif() -> bool:
    """Whether the decoder of HEIC and HEIF is installed; it is registered with Pillow."""
    try:
        import pi_heif
    except ImportError:
        return False
    pi_heif.register_heif_opener()
    return True


def suffixes() -> frozenset[str]:
    """The suffixes of the files that can be read here, in lower case."""
    return SUFFIXES | HEIF_SUFFIXES if can_read_heif() else SUFFIXES


def decode(file: Path | bytes, side: int, resize: Resize, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels [side, side, 3] of an encoded image.

    Raises:
        Unsupported, TooLarge, Damaged: it cannot be used.
        OSError: the file cannot be opened.

    """
    content = file if isinstance(file, bytes) else file.read_bytes()
    with opened(content, max_pixels) as image:
        return pixels(image, side, resize)


@contextmanager
def opened(content: bytes, max_pixels: int, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """An image of which only the header has been read. It is decoded in the block, whose errors are `BadPicture` too.

    Raises:
        Unsupported, TooLarge, Damaged: it cannot be used.

    """
    try:
        with Image.open(BytesIO(content), formats=installed(formats)) as image:
            if image.width * image.height > max_pixels:
                raise TooLarge(f"has {image.width:,} x {image.height:,} pixels, more than {max_pixels:,}")
            yield image
    except BadPicture:
        raise
    except MemoryError as error:
        raise TooLarge("does not fit into memory") from error
    except UnidentifiedImageError as error:
        raise _unidentified(content, installed(formats)) from error
    except Exception as error:  # Pillow's decoders raise many types of errors for damaged bytes
        raise Damaged(f"is damaged ({type(error).__name__}: {' '.join(str(error).split()).rstrip('.')})") from error


def installed(formats: Sequence[str] = FORMATS) -> tuple[str, ...]:
    """Those of the formats that can be decoded here."""
    can_read_heif()
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN and (name != "AVIF" or features.check("avif")))


def _unidentified(content: bytes, formats: tuple[str, ...]) -> BadPicture:
    """Why Pillow does not open it: no decoder, a damaged header, or another format."""
    brands = _brands(content)
    if "HEIF" not in formats and brands & HEIF_BRANDS and not brands & AVIF_BRANDS:
        return Unsupported("is HEIC, for which no decoder is installed (pip install 'fedkd[heic]')")
    if "AVIF" not in formats and brands & AVIF_BRANDS:
        return Unsupported("is AVIF, for which no decoder is installed (pip install --upgrade pillow)")
    head = content[:16].ljust(16, b"\0")
    signatures = (Image.OPEN[name][1] for name in formats)
    if any(is_own is not None and is_own(head) is True for is_own in signatures):
        return Damaged("is damaged: its header cannot be read")
    return Unsupported("is damaged or no image of a known format")


def _brands(content: bytes) -> set[bytes]:
    """The brands of a file in the family of MPEG-4, to which HEIC and AVIF belong."""
    if content[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(content[:4], "big"), 256)
    return {content[start : start + 4] for start in range(8, end, 4)}


def pixels(image: Image.Image, side: int, resize: Resize) -> NDArray[np.uint8]:
    """The pixels [side, side, 3] of an image as a person sees it: upright, on white, the first frame of an animation.

    ``resize`` says what happens to an image that is not square: ``crop`` keeps the central square, ``stretch`` changes
    its proportions, ``pad`` adds black borders. Scaling is bicubic with antialiasing.

    Raises:
        Damaged: its values have no known range.

    """
    # A JPEG is decoded at a fraction of its size, at least four times the side: a photo takes a quarter of the time.
    # It is part of the way to the pixels, in serving as in training.
    image.draft("RGB", (4 * side, 4 * side))
    return np.asarray(_square(_upright(rgb(image), image), side, resize))


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits, on white where it is transparent.

    Raises:
        Damaged: its values have no known range.

    """
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if not image.has_transparency_data:
        return _converted(image, "RGB")
    opaque = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)  # alpha that is multiplied is divided first
    layer = _converted(_converted(image, opaque), "RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer)
    return white


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode. Pillow would copy one that has it already, and a photo takes 100 MB."""
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A gray image of 16 or 32 bits, or of floats, with 8 bits."""
    values = np.asarray(image)
    high = _range(image, values)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
        values = high - values  # white is zero; Pillow inverts only 8 bits
    is_16_bit = high == 65535 and image.mode != "F"
    gray = Image.fromarray((values >> 8 if is_16_bit else np.rint(values * (255 / high))).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:  # the one value that a PNG declares transparent
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _range(image: Image.Image, values: NDArray[np.generic]) -> int:
    """The value of white. Files of 32 bits do not state it: it is the smallest usual one that no value exceeds."""
    if image.mode.startswith("I;16") or image.format == "PPM":  # Pillow scales PPM to 16 bits
        return 65535
    low, high = float(values.min()), float(values.max())
    usual = [1, 255, 65535] if image.mode == "F" else [255, 65535]
    if not (low >= 0 and high <= 65535):  # also if one is not a number
        raise Damaged(f"has values from {low:g} to {high:g}, which no usual range has; convert it to 8 or 16 bits")
    return next(white for white in usual if high <= white)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _upright(converted: Image.Image, image: Image.Image) -> Image.Image:
    """The converted image, rotated as the EXIF data of the loaded one says."""
    try:
        transpose = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # an image with damaged EXIF data can still be decoded
        return converted
    return converted if transpose is None else converted.transpose(transpose)


def _square(image: Image.Image, side: int, resize: Resize) -> Image.Image:
    if image.size == (side, side):
        return image
    width, height = image.size
    if resize == "stretch" or width == height:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    if resize == "crop":
        shorter = min(width, height)
        left, top = (width - shorter) / 2, (height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
        return image.resize((side, side), Image.Resampling.BICUBIC, box)
    scale = side / max(width, height)
    inner = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(inner, ((side - inner.width) // 2, (side - inner.height) // 2))
    return square


def words(side: int, resize: Resize) -> str:
    """How pixels are made, for people who have to do it elsewhere."""
    shape = {
        "crop": f"the central square is resized to {side} x {side}; its edges may lie between two pixels",
        "stretch": f"resized to {side} x {side}, which stretches images that are not square",
        "pad": f"resized so that the longer side has {side} pixels, and centered on a black square of {side} x {side}",
    }[resize]
    return f"upright by EXIF, converted to RGB with 8 bits on white; {shape} (bicubic with antialiasing, as in Pillow)"
