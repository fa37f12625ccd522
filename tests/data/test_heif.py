"""HEIC and AVIF, which need a decoder, and what is said of content that is not opened."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, features

from fedkd.data import pictures

#: 64 x 32 pixels, the left half red, the right half blue. No encoder of HEIC is installed for the tests.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAA"
    "AERAAAEAAQAAAAABoQABAAAAAAAAAF0AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADd"
    "aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAA"
    "AwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xh"
    "cAAAAEAAAAABAAAAIAAAAAEAAAAAAAAAAv///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAGVtZGF0AAAA"
    "WSgBrxOA+BDhp//4lqP/5y88PzVJ5if/3J10f1qCv/0nUju72cblwEBsROPwG3kahBTahHGKu5/0zT1QdqI1MTMBDOTvTH5WQdHxvjxR23q/Wu9o"
    "h27yw367"
)


def without(monkeypatch, name):
    """Pretend that a decoder is not installed."""
    original = pictures.installed
    monkeypatch.setattr(
        pictures, "installed", lambda formats=pictures.FORMATS: tuple(one for one in original(formats) if one != name)
    )


def avif():
    stream = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(stream, "AVIF")
    return stream.getvalue()


def ftyp(*brands):
    return (8 + 4 * len(brands)).to_bytes(4, "big") + b"ftyp" + b"".join(brands) + bytes(100)


def test_a_heic_is_decoded():
    pytest.importorskip("pi_heif")
    got = pictures.decode(HEIC, 8, "stretch").astype(int)
    for half, color in ((got[:, :3], (250, 40, 30)), (got[:, 5:], (30, 60, 240))):
        assert np.abs(half - color).max() < 40
    assert ".heic" in pictures.suffixes()


def test_the_extra_is_named_if_no_decoder_of_heic_is_installed(monkeypatch):
    without(monkeypatch, "HEIF")
    for content in (HEIC, ftyp(b"heix", b"\0\0\0\0", b"mif1"), ftyp(b"mif1", b"\0\0\0\0", b"heic")):
        with pytest.raises(pictures.Unsupported, match=r"is HEIC.*pip install 'fedkd\[heic\]'"):
            pictures.decode(content, 8, "crop")


@pytest.mark.skipif(not features.check("avif"), reason="Pillow has no decoder of AVIF")
def test_avif(monkeypatch):
    assert (pictures.decode(avif(), 8, "crop")[..., 0] > 240).all()
    without(monkeypatch, "AVIF")
    with pytest.raises(pictures.Unsupported, match=r"is AVIF.*pip install --upgrade pillow"):
        pictures.decode(avif(), 8, "crop")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"hello", pictures.Unsupported, "damaged or no image of a known format"),
        (b"", pictures.Unsupported, "damaged or no image of a known format"),
        (ftyp(b"isom", b"\0\0\0\0", b"mp42"), pictures.Unsupported, "damaged or no image of a known format"),
        (b"\x89PNG\r\n\x1a\n", pictures.Damaged, "its header cannot be read"),
        (b"GIF89a", pictures.Damaged, "its header cannot be read"),
    ],
)
def test_content_that_is_not_opened(content, kind, message):
    with pytest.raises(kind, match=message):
        pictures.decode(content, 8, "crop")
