"""From an image file to pixels, whatever kind of file it is and wherever it is used."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from fedkd.core.errors import DataError
from fedkd.data import pictures, sources
from fedkd.data.readers import read
from tests.data.files import COLOR, FILES, GRAY, SIDE, TALL, gray, of

NAMES = sorted(file.name for file in FILES)
KINDS = {file.name: file for file in FILES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two classes, of which the second one has a file of each kind; a flat folder of the same files."""
    root = tmp_path_factory.mktemp("kinds")
    for place in ("train/a", "train/b", "flat"):
        (root / place).mkdir(parents=True)
    of(COLOR).save(root / "train" / "a" / "one.png")
    for file in FILES:
        file.write(root / "train" / "b" / file.name)
        shutil.copy(root / "train" / "b" / file.name, root / "flat")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))


def as_folder(root):
    return read(sources.folder(str(root), pixels=SIDE), "train").pixels[1:].numpy()


def as_hugging_face(root):
    """Its own list of suffixes lacks AVIF."""
    return read(sources.hf(str(root / "train"), pixels=SIDE), "train").pixels[1:].numpy()


def as_data_of_a_node(root):
    return read(sources.own(str(root / "train"), SIDE), "train").pixels[1:].numpy()


def as_unlabeled_folder(root):
    source = dataclasses.replace(sources.folder(str(root / "flat"), pixels=SIDE), labeled=False)
    return read(source, "train").pixels.numpy()


def as_parquet(root):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": (root / "flat" / name).read_bytes(), "path": name} for name in NAMES]
    table = datasets.Dataset.from_dict({"image": images, "label": [0] * len(NAMES)}, features=features)
    table.to_parquet(str(root / "table.parquet"))
    return read(sources.own(str(root / "table.parquet"), SIDE), "train").pixels.numpy()


def test_a_file_of_each_kind_gives_what_a_person_sees(folder):
    pixels = as_folder(folder)
    off = {name: np.abs(pixels[index].astype(float) - KINDS[name].seen).max() for index, name in enumerate(NAMES)}
    assert {name: value for name, value in off.items() if value > KINDS[name].off} == {}
    assert len(pixels) == len(NAMES) == len(KINDS)


@pytest.mark.parametrize("way", [as_hugging_face, as_data_of_a_node, as_unlabeled_folder, as_parquet])
def test_every_way_to_read_a_file_gives_the_same_bits(way, folder):
    names = [name for name in NAMES if way is not as_hugging_face or name != "RGB.avif"]
    expected = [one for name, one in zip(NAMES, as_folder(folder), strict=True) if name in names]
    assert [n for n, one, other in zip(names, expected, way(folder), strict=True) if (one != other).any()] == []


def test_what_was_decoded_is_the_same_from_the_cache(folder, monkeypatch):
    cold = as_folder(folder)
    monkeypatch.setattr(pictures, "decode", None)
    assert np.array_equal(as_folder(folder), cold)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "HSV", "I;16L", "I;16N"])
def test_modes_that_no_file_has(mode):
    """Data sets in Python may give such images."""
    if mode.startswith("I"):
        image = PIL.Image.frombytes(mode, (SIDE, SIDE), (GRAY.astype("<u2") * 257).tobytes())
        assert np.array_equal(pictures.pixels(image, SIDE, "crop"), gray(GRAY))
        return
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:, :4] = 0
    is_gray = mode in ("PA", "La")
    color = np.concatenate([gray(GRAY) if is_gray else COLOR, alpha[..., None]], -1)
    layers = np.stack([GRAY, alpha], -1) if mode == "La" else color
    image = of(COLOR).convert(mode) if mode == "HSV" else of(layers).convert(mode)
    seen = gray(GRAY) if is_gray else COLOR
    if mode != "HSV":
        seen = np.where(alpha[..., None] == 0, 255, seen)
    assert np.abs(pictures.pixels(image, SIDE, "crop").astype(int) - seen).max() <= (6 if mode == "HSV" else 0)


@pytest.mark.parametrize("picture", [TALL, TALL.transpose(1, 0, 2)], ids=["tall", "wide"])
def test_an_image_that_is_not_square(picture):
    """16 x 32 pixels: white, the colors, black."""
    image, is_tall = of(picture), picture is TALL
    cropped, stretched, padded = (pictures.pixels(image, SIDE, how) for how in ("crop", "stretch", "pad"))
    upright = [one if is_tall else one.transpose(1, 0, 2) for one in (cropped, stretched, padded)]
    assert np.array_equal(upright[0], COLOR)
    assert (upright[1][0] == 255).all()
    assert (upright[1][-1] == 0).all()
    assert (upright[2][:, [0, 1, 2, 3, 12, 13, 14, 15]] == 0).all(), "black borders"
    half = np.asarray(of(TALL).resize((8, 16), PIL.Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(upright[2][:, 4:12] - half).max() <= 1, "rounded between the passes by rows and by columns"


def test_small_patterns_are_averaged_and_not_sampled():
    checkered = (255 * ((np.arange(160)[:, None] + np.arange(160)) % 2)).astype(np.uint8)
    assert np.abs(pictures.pixels(of(checkered), SIDE, "crop").astype(int) - 127).max() <= 8


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(tmp_path):
    rows, columns = np.mgrid[:1024, :1024]
    large = np.stack([rows // 4, columns // 4, 255 - rows // 4], -1).astype(np.uint8)
    of(large).save(tmp_path / "large.jpg", quality=95)
    whole = pictures.pixels(of(large), SIDE, "crop").astype(int)
    assert np.abs(pictures.decode(tmp_path / "large.jpg", SIDE, "crop") - whole).max() <= 4


@pytest.mark.parametrize("values", [np.array([[0, 70_000]], np.int32), np.array([[-1, 5]], np.int32)])
def test_values_without_a_known_range_are_refused(values):
    with pytest.raises(pictures.Damaged, match="convert it to 8 or 16 bits"):
        pictures.pixels(of(values), SIDE, "crop")


def test_values_that_are_not_numbers_are_refused():
    with pytest.raises(pictures.Damaged, match="from nan"):
        pictures.pixels(of(np.array([[0.0, np.nan]], np.float32)), SIDE, "crop")


def content(kind: str, keep: float = 1.0) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    of(noise).save(buffer, kind)
    return buffer.getvalue()[: int(keep * len(buffer.getvalue()))]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_a_truncated_image_is_damaged_whatever_its_format(kind):
    assert pictures.decode(content(kind), SIDE, "crop").shape == (SIDE, SIDE, 3)
    with pytest.raises(pictures.BadPicture, match=r"^is damaged"):
        pictures.decode(content(kind, 0.5), SIDE, "crop")


@pytest.mark.parametrize("text", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_refused_and_no_program_is_started_for_it(text):
    with pytest.raises(pictures.Unsupported):
        pictures.decode(text, SIDE, "crop")


def test_the_limit_of_pixels_is_checked_before_an_image_is_decoded():
    header = content("PNG", 0.01) + content("PNG")[len(content("PNG", 0.01)) : 60]
    with pytest.raises(pictures.TooLarge, match=r"has 64 x 64 pixels, more than 4,095"):
        pictures.decode(header, SIDE, "crop", 4095)
    assert pictures.decode(content("PNG"), SIDE, "crop", 4096).shape == (SIDE, SIDE, 3)


def test_a_bad_image_is_named_or_left_out_and_counted(folder, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    of(COLOR).save(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "train" / "a" / "2.png").write_bytes(content("PNG", 0.5))
    of(gray(GRAY)).save(tmp_path / "train" / "b" / "3.png")
    PIL.Image.new("RGB", (80, 70)).save(tmp_path / "train" / "b" / "4.png")
    source = dataclasses.replace(sources.folder(str(tmp_path), pixels=SIDE), max_pixels=5000)
    with pytest.raises(DataError, match=rf"^{tmp_path}/train/a/2.png is damaged .*--skip-damaged"):
        read(source, "train")
    (tmp_path / "train" / "a" / "2.png").rename(tmp_path / "train" / "b" / "5.png")
    with pytest.raises(DataError, match=rf"^{tmp_path}/train/b/4.png has 80 x 70 pixels, .*--max-pixels"):
        read(source, "train")
    for _ in range(2):  # decoded, and from the cache
        images = read(dataclasses.replace(source, skip_damaged=True), "train")
        assert images.labels.tolist() == [0, 1]
        assert torch.equal(images.pixels, torch.from_numpy(np.stack([COLOR, gray(GRAY)])))
    assert (
        f"{tmp_path}/train: 2 images left out, the first since {tmp_path}/train/b/4.png has" in capsys.readouterr().err
    )


def test_how_pixels_are_made_in_words():
    assert "central square" in pictures.words(32, "crop")
    assert "centered on a black square" in pictures.words(32, "pad")
    assert "stretches" in pictures.words(64, "stretch")
    assert "64 x 64" in pictures.words(64, "stretch")
