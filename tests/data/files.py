"""Image files of every kind with what a person sees in them, made by arithmetic on arrays and not by Pillow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

SIDE = 16
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
GRAY = (16 * ROWS).astype(np.uint8)  # lighter from top to bottom
COLOR = np.stack([16 * ROWS, 16 * COLUMNS, np.full_like(ROWS, 90)], -1).astype(np.uint8)
ALPHA = np.where(COLUMNS < SIDE // 2, 255, 16 * ROWS).astype(np.uint8)  # the right half fades in from the top


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return color * share + 255 * (1 - share)


@dataclass(frozen=True)
class File:
    """A kind of file. ``seen`` [16, 16, 3] is what a person sees, ``off`` the largest error of its coding."""

    name: str
    write: Callable[[Path], object]
    seen: np.ndarray
    off: float = 0


def saved(image: PIL.Image.Image, **options: object) -> Callable[[Path], object]:
    return lambda path: image.save(path, **options)  # type: ignore[arg-type]


def of(array: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def palette(transparent: int | None) -> Callable[[Path], object]:
    """A palette of 16 grays, of which one may be transparent."""
    image = PIL.Image.fromarray(ROWS.astype(np.uint8)).convert("P")
    image.putdata(ROWS.astype(np.uint8).ravel().tolist())
    image.putpalette([value for row in range(16) for value in (16 * row,) * 3])
    return saved(image, **({} if transparent is None else {"transparency": transparent}))


def big_endian(path: Path) -> None:
    PIL.Image.frombytes("I;16B", (SIDE, SIDE), (GRAY.astype(">u2") * 257).tobytes()).save(path)


def animated(path: Path) -> None:
    of(gray(GRAY)).save(path, save_all=True, append_images=[of(255 - gray(GRAY))], lossless=True)


def with_orientation(tag: int, turned: np.ndarray) -> Callable[[Path], object]:
    exif = PIL.Image.Exif()
    exif[0x0112] = tag
    return saved(of(turned), exif=exif)


def lightness() -> tuple[PIL.Image.Image, np.ndarray]:
    """An image in CIELAB without color, and its sRGB values by the formulas of CIE 15 and IEC 61966-2-1."""
    stored = np.stack([GRAY, np.zeros_like(GRAY), np.zeros_like(GRAY)], -1)
    lstar = GRAY * (100 / 255)
    luminance = np.where(lstar > 8, ((lstar + 16) / 116) ** 3, lstar / 903.3)
    srgb = np.where(luminance > 0.0031308, 1.055 * luminance ** (1 / 2.4) - 0.055, 12.92 * luminance)
    return PIL.Image.frombytes("LAB", (SIDE, SIDE), stored.tobytes()), gray(255 * srgb)


# What the camera stored, for each orientation in which it may have been held (EXIF 2.32, tag 0x0112).
STORED = {
    2: COLOR[:, ::-1],
    3: COLOR[::-1, ::-1],
    4: COLOR[::-1],
    5: COLOR.transpose(1, 0, 2),
    6: np.rot90(COLOR, 1),
    7: COLOR[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOR, -1),
}
BLACK_AND_WHITE = np.where(ROWS < 8, 0, 255).astype(np.uint8)
TALL = np.concatenate([np.full((8, 16, 3), 255, np.uint8), COLOR, np.zeros((8, 16, 3), np.uint8)])

FILES = [
    File("1.png", saved(of(BLACK_AND_WHITE).convert("1")), gray(BLACK_AND_WHITE)),
    File("L.png", saved(of(GRAY)), gray(GRAY)),
    File("L.pgm", saved(of(GRAY)), gray(GRAY)),
    File("L-transparent.png", saved(of(GRAY), transparency=32), gray(np.where(GRAY == 32, 255, GRAY))),
    File("LA.png", saved(of(np.stack([GRAY, ALPHA], -1))), on_white(gray(GRAY), ALPHA), 1),
    File("P.png", palette(None), gray(GRAY)),
    File("P-transparent.png", palette(3), gray(np.where(GRAY == 48, 255, GRAY))),
    File("P-transparent.gif", palette(3), gray(np.where(GRAY == 48, 255, GRAY))),
    File("RGB.png", saved(of(COLOR)), COLOR),
    File("RGB.bmp", saved(of(COLOR)), COLOR),
    File("RGB.ppm", saved(of(COLOR)), COLOR),
    File("RGB.tif", saved(of(COLOR)), COLOR),
    File("RGB.webp", saved(of(COLOR), lossless=True), COLOR),
    File("RGB.jp2", saved(of(COLOR)), COLOR),
    File("RGB.jpg", saved(of(COLOR), quality=100, subsampling=0), COLOR, 4),
    File("RGB.jfif", saved(of(COLOR), format="JPEG", quality=100, subsampling=0), COLOR, 4),
    File("RGB.avif", saved(of(COLOR), quality=100, subsampling="4:4:4"), COLOR, 4),
    File("RGBA.png", saved(of(np.concatenate([COLOR, ALPHA[..., None]], -1))), on_white(COLOR, ALPHA), 1),
    File("RGBA.tif", saved(of(np.concatenate([COLOR, ALPHA[..., None]], -1))), on_white(COLOR, ALPHA), 1),
    File("I16.png", saved(of(GRAY.astype(np.uint16) * 257)), gray(GRAY)),
    File("I16.tif", saved(of(GRAY.astype(np.uint16) * 257)), gray(GRAY)),
    File("I16.pgm", saved(of(GRAY.astype(np.uint16) * 257)), gray(GRAY)),
    File("I16B.tif", big_endian, gray(GRAY)),
    File(
        "I16-transparent.png",
        saved(of(GRAY.astype(np.uint16) * 257), transparency=32 * 257),
        gray(np.where(GRAY == 32, 255, GRAY)),
    ),
    File("I.tif", saved(of(GRAY.astype(np.int32) * 257)), gray(GRAY)),
    File("I-bytes.tif", saved(of(GRAY.astype(np.int32))), gray(GRAY)),
    File("F.tif", saved(of((GRAY / 255).astype(np.float32))), gray(GRAY)),
    File("F-bytes.tif", saved(of(GRAY.astype(np.float32))), gray(GRAY)),
    File("WhiteIsZero.tif", saved(of(65535 - GRAY.astype(np.uint16) * 257), tiffinfo={262: 0}), gray(GRAY)),
    File("CMYK.tif", saved(of(COLOR).convert("CMYK")), COLOR, 1),
    File("CMYK.jpg", saved(of(COLOR).convert("CMYK"), quality=100), COLOR, 8),
    File("YCbCr.tif", saved(of(COLOR).convert("YCbCr")), COLOR, 3),
    File("LAB.tif", saved(lightness()[0]), lightness()[1], 2),
    File("animated.gif", animated, gray(GRAY)),
    File("animated.webp", animated, gray(GRAY)),
    File("animated.png", animated, gray(GRAY)),
    *(File(f"EXIF-{tag}.png", with_orientation(tag, stored), COLOR) for tag, stored in STORED.items()),
    *(File(f"EXIF-{tag}.tif", with_orientation(tag, stored), COLOR) for tag, stored in STORED.items()),
    File("tall.png", saved(of(TALL)), COLOR),
    File("wide.png", saved(of(TALL.transpose(1, 0, 2))), COLOR.transpose(1, 0, 2)),
]
