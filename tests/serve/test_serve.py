"""The server: predictions, limits and error messages."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import closing, contextmanager
from functools import partial

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from fedkd.core.errors import DataError, UsageError
from fedkd.data import pictures, readers, sources
from fedkd.serve import bodies, http, images, network, web
from fedkd.serve.batches import Batches
from fedkd.serve.images import Refused
from tests.conftest import ROOT, wait_for
from tests.data.test_heif import HEIC, without
from tests.serve import toy
from tests.serve.toy import direct, encoded, noise, probs, serving

PNG = {"Content-Type": "image/png"}
post, get = (partial(call, timeout=120) for call in (httpx.post, httpx.get))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("toy") / "toy.onnx")


@pytest.fixture(scope="module")
def url(file):
    with serving(file, max_bytes=2_000_000) as (address, _):
        yield address


def made(content, side, resize="crop"):
    """The pixels that the server makes."""
    return images.pixels(content, side, resize, 20_000_000)


def test_a_prediction_is_that_of_the_network(url, file):
    pixels = noise()
    answer = post(f"{url}/predict", content=encoded(pixels), headers=PNG).json()
    expected = direct(file, pixels)
    assert probs(answer) == pytest.approx(expected.tolist(), rel=1e-5)
    assert answer["class"] == expected.argmax() == answer["probabilities"][0]["class"]
    assert answer["name"] == toy.NAMES[answer["class"]]
    shares = [one["probability"] for one in answer["probabilities"]]
    assert shares == sorted(shares, reverse=True)


def test_a_form_gets_predictions_in_its_order(url, file):
    sent = [("image", (f"{seed}.png", encoded(noise(seed)))) for seed in range(5)]
    response = post(f"{url}/predict", files=sent)
    assert [probs(answer) for answer in response.json()["predictions"]] == [
        pytest.approx(direct(file, noise(seed)).tolist(), rel=1e-5) for seed in range(5)
    ]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_formats(kind):
    gray = np.repeat(noise(3, channels=1)[:, :, None], 3, 2)  # 256 colors, as GIF can hold them
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    got = made(encoded(gray if kind != "GIF" else gray[:, :, 0], kind, **options), toy.SIDE)
    assert np.abs(got.astype(int) - gray).max() <= (3 if kind == "JPEG" else 0)


def test_the_central_square_is_used():
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = noise()
    np.testing.assert_array_equal(made(encoded(wide), 8), noise())
    np.testing.assert_array_equal(made(encoded(wide.swapaxes(0, 1)), 8), noise().swapaxes(0, 1))


def test_a_large_image_is_averaged_and_not_subsampled():
    board = (np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)
    for kind in ("PNG", "JPEG"):
        got = made(encoded(board, kind, **({"quality": 95} if kind == "JPEG" else {})), 8)
        assert np.abs(got.astype(int) - 127).max() <= 3


def photo(size=(60, 36), mode="RGB"):
    """An image with a different color everywhere, which shows how it is rotated and cut."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(255, 0, size[1]))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)).convert(mode)


def transparent(mode):
    image = photo(mode="RGBA")
    image.putalpha(photo(mode="L"))
    return image.convert(mode)


def rotated(orientation):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return encoded(photo(), "JPEG", exif=exif)


def animated(kind, mode):
    return encoded(photo(mode=mode), kind, save_all=True, append_images=[photo().rotate(180).convert(mode)])


def lab():
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(photo(), *profiles, outputMode="LAB")


GRAY_16 = (np.asarray(photo(mode="L")).astype(np.uint16) * 257).astype("<u2")
SERVED = {
    **{f"{mode} {kind}": encoded(photo(mode=mode), kind) for kind in ("PNG", "BMP") for mode in ("1", "L", "P", "RGB")},
    **{f"{mode} PNG": encoded(transparent(mode), "PNG") for mode in ("LA", "RGBA")},
    "transparent colors PNG": encoded(photo(mode="P"), "PNG", transparency=bytes(range(256))),
    "color to be transparent PNG": encoded(photo(mode="L"), "PNG", transparency=100),
    "16 bits PNG": encoded(Image.fromarray(GRAY_16), "PNG"),
    "transparent WEBP": encoded(transparent("RGBA"), "WEBP"),
    "transparent GIF": encoded(photo(mode="P"), "GIF", transparency=3),
    **{f"animated {kind}": animated(kind, mode) for kind, mode in (("GIF", "P"), ("WEBP", "RGB"), ("PNG", "RGBA"))},
    **{f"{mode} JPEG": encoded(photo(mode=mode), "JPEG") for mode in ("L", "CMYK", "YCbCr")},
    **{f"orientation {number}": rotated(number) for number in range(1, 9)},
    **{f"size {size}": encoded(photo(size), "PNG") for size in ((7, 90), (144, 48), (8, 8), (3, 5), (1, 40))},
    **{f"large {kind}": encoded(photo((1600, 1000)), kind) for kind in ("JPEG", "PNG")},
    **({"AVIF": encoded(photo(), "AVIF")} if "AVIF" in images.accepted() else {}),
}
NOT_SERVED = {
    "TIFF": encoded(photo(), "TIFF"),
    "16 bits TIFF": encoded(Image.fromarray(GRAY_16), "TIFF"),
    "16 bits big-endian TIFF": encoded(Image.frombytes("I;16B", (60, 36), GRAY_16.astype(">u2").tobytes()), "TIFF"),
    "32 bits TIFF": encoded(Image.fromarray(GRAY_16.astype(np.int32)), "TIFF"),
    "floats TIFF": encoded(Image.fromarray((GRAY_16 / 65535).astype(np.float32)), "TIFF"),
    "Lab TIFF": encoded(lab(), "TIFF"),
    "JPEG2000": encoded(photo(), "JPEG2000"),
    "PPM": encoded(photo(), "PPM"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files, in the folder of one class."""
    root = tmp_path_factory.mktemp("files")
    (root / "class").mkdir()
    for index, content in enumerate((SERVED | NOT_SERVED).values()):
        (root / "class" / f"{index:03}.png").write_bytes(content)
    return root


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_an_image_has_the_bits_that_it_has_in_training(resize, folder):
    trained = readers.read(dataclasses.replace(sources.own(str(folder), 8), resize=resize), "train").pixels.numpy()
    for name, expected in zip(SERVED, trained, strict=False):
        np.testing.assert_array_equal(made(SERVED[name], 8, resize), expected, name)
    for name, content in NOT_SERVED.items():
        with pytest.raises(Refused, match="not a supported image") as refused:
            made(content, 8, resize)
        assert refused.value.status == 415, name
    assert len(trained) == len(SERVED) + len(NOT_SERVED)
    assert len({each.tobytes() for each in trained}) > len(SERVED) // 2


def test_heic_is_accepted_where_its_decoder_is_installed(monkeypatch):
    if "HEIC" in images.accepted():
        np.testing.assert_array_equal(made(HEIC, 8), pictures.decode(HEIC, 8, "crop"))
    without(monkeypatch, "HEIF")
    with pytest.raises(
        Refused, match=r"'fedkd\[heic\]'\); use PNG, JPEG, WebP, GIF(, BMP or AVIF| or BMP)\."
    ) as refused:
        made(HEIC, 8)
    assert refused.value.status == 415


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_an_image_is_made_square_as_the_networks_were_in_training(resize, tmp_path):
    content = encoded(photo((144, 48)))
    expected = {how: pictures.decode(content, toy.SIDE, how) for how in ("crop", "stretch", "pad")}
    path = toy.write(tmp_path / "a.onnx", about={**toy.ABOUT, "resize": resize})
    with serving(path) as (url, _):
        answer = probs(post(f"{url}/predict", content=content, headers=PNG).json())
    for how, pixels in expected.items():
        assert (answer == pytest.approx(direct(path, pixels).tolist(), rel=1e-5)) == (how == resize), how


def test_what_a_person_sees_is_classified():
    """On white, with the gray of its 16 bits, upright, its first frame."""
    for mode in ("LA", "RGBA"):
        assert (made(encoded(Image.new(mode, (8, 8), (0,) * len(mode))), 8) == 255).all()
    assert (made(encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), 8) == 40_000 // 256).all()
    upright, quarter = Image.fromarray(noise()), Image.Exif()
    quarter[pictures.ORIENTATION] = 6
    content = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=quarter)
    np.testing.assert_array_equal(made(content, 8), noise())
    frames = [Image.fromarray(noise(seed, channels=1)) for seed in (1, 2)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(made(content, 8)[:, :, 0], noise(1, channels=1))


def scans(count):
    """A JPEG with more scans than it needs: the last one over and over."""
    content = encoded(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + b"\xff\xd9"


def flat(width, height):
    return encoded(Image.new("1", (width, height)))


REFUSED = {
    "empty": (b"", PNG, 400, "There is no image"),
    "nothing": (b"", {}, 400, "There is no image"),
    "text": (b"hello", PNG, 415, "not a supported image"),
    "svg": (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        {"Content-Type": "image/svg+xml"},
        415,
        "not a supported image",
    ),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", PNG, 415, "not a supported image"),
    "tiff": (encoded(noise(), "TIFF"), {"Content-Type": "image/tiff"}, 415, "not a supported image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", PNG, 415, "not a supported image"),
    "type": (encoded(noise()), {"Content-Type": "application/json"}, 415, "Content-Type"),
    "no type": (encoded(noise()), {}, 415, "Content-Type"),
    "cut": (encoded(noise(0, (200, 200)))[:-5000], PNG, 422, "damaged"),
    "head only": (b"\x89PNG\r\n\x1a\n", PNG, 422, "damaged"),
    "bytes": (b"\0" * 2_000_001, PNG, 413, "larger than 2,000,000 bytes"),
    "pixels": (flat(5_001, 5_000), PNG, 413, "has 5,001 x 5,000 pixels, more than 25,000,000"),
    "bomb": (flat(30_000, 20_000), PNG, 413, "more than 25,000,000"),
    "height": (flat(1, 16_385), PNG, 413, "a side of more than 16,384"),
    "width": (flat(16_385, 1), PNG, 413, "a side of more than 16,384"),
    "scans": (scans(110), {"Content-Type": "image/jpeg"}, 422, "scans"),
    "no boundary": (b"x", {"Content-Type": "multipart/form-data"}, 400, "form"),
    "broken form": (b"--x\r\nnothing", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "form"),
    "no file": (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
        {"Content-Type": "multipart/form-data; boundary=x"},
        400,
        "no file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests(url, case):
    content, headers, status, message = REFUSED[case]
    response = post(f"{url}/predict", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert message in response.json()["error"]


def test_requests_at_the_limits_are_accepted(url):
    assert post(f"{url}/predict", content=flat(5_712, 4_284), headers=PNG).status_code == 200
    assert made(flat(1, 16_384), 8).shape == (8, 8, 3)
    bmp = encoded(noise(0, (810, 820)), "BMP")
    assert 1_990_000 < len(bmp) <= 2_000_000
    assert post(f"{url}/predict", content=bmp, headers=PNG).status_code == 200
    assert made(scans(20), 8).shape == (8, 8, 3)


def test_forms_have_limits_and_errors_name_the_file(url):
    good = ("image", ("a.png", encoded(noise())))
    many = post(f"{url}/predict", files=[good] * (bodies.FILES + 1))
    assert (many.status_code, "Too many files" in many.json()["error"]) == (413, True)
    assert len(post(f"{url}/predict", files=[good] * bodies.FILES).json()["predictions"]) == bodies.FILES
    second = post(f"{url}/predict", files=[good, ("image", ("b.txt", b"hello")), good])
    assert second.status_code == 415
    assert second.json()["error"].startswith("File 2 of 3: This is not a supported image")
    empty = post(f"{url}/predict", files={"image": ("a.png", b"")})
    assert (empty.status_code, empty.json()["error"]) == (400, "The image is empty.")


def test_damaged_requests_never_cause_a_server_error(url):
    rng = np.random.default_rng(0)
    seen = set()
    form = httpx.Request("POST", url, files={"image": ("a.png", encoded(noise()))})
    sources = [
        (encoded(noise(1, (40, 30)), kind), "image/png")
        for kind in pictures.installed(images.FORMATS)
        if kind != "HEIF"
    ]
    sources += [(HEIC, "image/heic"), (form.read(), form.headers["Content-Type"])]
    with httpx.Client(timeout=120) as client:
        for content, kind in sources:
            for _ in range(40):
                damaged = bytearray(content)
                for place in rng.integers(0, len(content) // (1 if rng.random() < 0.3 else 8), rng.integers(1, 12)):
                    damaged[place] = rng.integers(256)
                end = rng.integers(1, len(content)) if rng.random() < 0.3 else len(content)
                response = client.post(f"{url}/predict", content=bytes(damaged[:end]), headers={"Content-Type": kind})
                assert response.status_code in (200, 400, 413, 415, 422), response.text
                seen.add(response.status_code)
    assert {200, 400, 415, 422} <= seen


def test_nothing_is_written_to_disk(url, monkeypatch):
    def refuse(self):
        raise AssertionError("written to disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refuse)
    large = encoded(noise(0, (700, 700)), "BMP")
    assert len(large) > 1_000_000
    assert post(f"{url}/predict", files={"image": ("a.bmp", large)}).status_code == 200


# --- slow and endless requests


def connect(url):
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=120)
    return closing(connection)


def receive(connection):
    """All bytes until the server closes the connection."""
    got = b""
    while chunk := connection.recv(65536):
        got += chunk
    return got


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


def test_an_endless_body_is_cut_off(url):
    chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    sent = 0
    with connect(url) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while sent < 200_000_000:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < 100_000_000


def test_a_too_large_content_length_is_refused_at_once(url):
    with connect(url) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        assert receive(connection).startswith(b"HTTP/1.1 413 ")


def test_slow_clients_are_disconnected_and_others_are_served(file):
    with serving(file, timeout=0.4) as (url, _):

        def cut_off(sent):
            """What comes to a client that sends this and no more; None if it was cut off before it had sent it."""
            try:
                with connect(url) as connection:
                    connection.sendall(sent)
                    return receive(connection)
            except ConnectionError:
                return None

        with connect(url) as body:
            body.sendall(HEAD + b"Content-Length: 1000\r\n\r\nabc")
            # Again where the machine is so slow that this one, too, was late.
            wait_for(lambda: post(f"{url}/predict", content=encoded(noise()), headers=PNG).status_code == 200)
        wait_for(lambda: cut_off(HEAD[:20]) == b"")
        wait_for(lambda: cut_off(b"") == b"")
        answers = []
        wait_for(lambda: answers.append(cut_off(HEAD + b"Content-Length: 1000\r\n\r\nabc")) or answers[-1])
        assert answers[-1].startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 0.4 seconds" in answers[-1]


def test_a_disconnected_client_does_not_affect_others(file, capfd):
    with serving(file) as (url, service):
        for _ in range(3):
            with connect(url) as connection:
                connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\nabc")
        assert post(f"{url}/predict", content=encoded(noise()), headers=PNG).status_code == 200
        wait_for(lambda: service.active == 0)
    assert capfd.readouterr().err == ""


# --- batches


def test_fifty_concurrent_requests_are_batched_and_each_gets_its_own_prediction(file):
    async def ask(url):
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50), timeout=120) as client:
            sent = (client.post(f"{url}/predict", content=encoded(noise(i)), headers=PNG) for i in range(50))
            return await asyncio.gather(*sent)

    with serving(file, max_wait=300_000.0, max_batch=10) as (url, service):
        responses = asyncio.run(ask(url))
        assert [probs(response.json()) for response in responses] == [
            pytest.approx(direct(file, noise(i)).tolist(), rel=1e-4) for i in range(50)
        ]
        assert get(f"{url}/health").json() == {"status": "ok", "images": 50, "runs": 5}
        assert service.batches.runs == 5, "none begins before ten are there"


def run_batches(run, count, **options):
    """The sizes of the batches for `count` concurrent images, and their logits."""
    sizes = []

    def counted(pixels):
        sizes.append(len(pixels))
        return run(pixels)

    async def classify():
        batches = Batches(counted, **options)
        futures = (batches.logits(np.full((1, 1, 3), i, np.uint8)) for i in range(count))
        try:
            return await asyncio.gather(*futures, return_exceptions=True)
        finally:
            await batches.close()

    return sizes, asyncio.run(asyncio.wait_for(classify(), 120))


def test_batches_have_a_maximum_size_and_a_full_batch_does_not_wait():
    sizes, answers = run_batches(lambda pixels: pixels[:, 0, 0].astype(float), 20, max_batch=5, max_wait=3600)
    assert sizes == [5, 5, 5, 5]
    assert [answer.tolist() for answer in answers] == [[i] * 3 for i in range(20)]
    assert run_batches(lambda pixels: pixels[:, 0, 0], 7, max_batch=5, max_wait=0.0)[0] == [5, 2]


def test_a_failed_batch_gets_status_503_and_the_next_one_is_processed():
    def run(pixels):
        if pixels.min() == 0:
            raise MemoryError
        return pixels[:, 0, 0]

    _, answers = run_batches(run, 4, max_batch=2, max_wait=0.01)
    assert [getattr(answer, "status", 200) for answer in answers] == [503, 503, 200, 200]


def test_images_whose_requests_had_a_timeout_are_left_out_of_the_batch():
    sizes = []

    async def classify():
        batches = Batches(lambda pixels: sizes.append(len(pixels)) or pixels[:, 0, 0], max_batch=2, max_wait=3600)
        tasks = [asyncio.create_task(batches.logits(np.full((1, 1, 3), i, np.uint8))) for i in range(4)]
        await asyncio.sleep(0)  # all are in the queue; no batch has begun
        for index in (0, 1, 2):
            tasks[index].cancel()
        try:
            return await tasks[3]
        finally:
            await batches.close()

    assert asyncio.run(asyncio.wait_for(classify(), 120)).tolist() == [3, 3, 3]
    assert sizes == [1]


# --- overload


@contextmanager
def halted(slow, service, url, monkeypatch):
    """Decoder or network wait until the block ends or the event is set; their calls."""
    assert get(f"{url}/health").status_code == 200  # the service has started
    owner, name = (web, "pixels") if slow == "decoder" else (service.batches, "run")
    function, calls, go_on = getattr(owner, name), [], threading.Event()

    def waits(*arguments):
        calls.append(arguments)
        go_on.wait(120)
        return function(*arguments)

    monkeypatch.setattr(owner, name, waits)
    try:
        yield calls, go_on
    finally:
        go_on.set()


def begin(connection, count):
    """Send the head of a request with so many bytes; return once the server reads the body."""
    connection.sendall(HEAD + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % count)
    assert b"100" in connection.recv(1000)


def test_too_many_concurrent_requests_get_status_503(file, monkeypatch):
    content = encoded(noise())
    with (
        serving(file, backlog=2) as (url, service),
        halted("network", service, url, monkeypatch) as (_, go_on),
        connect(url) as first,
        connect(url) as second,
    ):
        for connection in (first, second):
            begin(connection, len(content))
            connection.sendall(content)
        wait_for(lambda: service.active == 2)
        busy = post(f"{url}/predict", content=content, headers=PNG)
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
        go_on.set()
        for connection in (first, second):
            assert receive(connection).startswith(b"HTTP/1.1 200 ")
        assert post(f"{url}/predict", content=content, headers=PNG).status_code == 200


def test_slow_uploads_take_no_place_of_other_requests(file):
    content = encoded(noise())
    with serving(file, backlog=2) as (url, _), connect(url) as first, connect(url) as second:
        for connection in (first, second):
            begin(connection, len(content))
            connection.sendall(content[:10])
        assert post(f"{url}/predict", content=content, headers=PNG).status_code == 200
        for connection in (first, second):
            connection.sendall(content[10:])
            assert receive(connection).startswith(b"HTTP/1.1 200 ")


def test_the_bodies_in_memory_have_a_limit(file, monkeypatch):
    content = encoded(noise())
    limit = len(content) + 1
    monkeypatch.setattr(web, "MEMORY", 2 * limit)
    with serving(file, backlog=2, max_bytes=limit) as (url, service), connect(url) as first, connect(url) as second:
        for connection in (first, second):
            begin(connection, limit)
            connection.sendall(content)
        wait_for(lambda: service.memory.used == 2 * len(content))
        busy = post(f"{url}/predict", content=content, headers=PNG)
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
        first.close()
        wait_for(lambda: service.memory.used == len(content))
        assert post(f"{url}/predict", content=content, headers=PNG).status_code == 200
        wait_for(lambda: service.memory.used == len(content))


def test_further_connections_are_closed(file, monkeypatch):
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)
    with serving(file) as (url, _):
        content = encoded(noise())
        with connect(url) as first, connect(url) as second:
            for connection in (first, second):
                begin(connection, len(content))
            with connect(url) as third:
                assert receive(third) == b""
            for connection in (first, second):
                connection.sendall(content)
                assert receive(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("slow", ["decoder", "network"])
def test_a_request_that_waits_too_long_gets_status_503_and_what_has_not_begun_is_not_done(slow, file, monkeypatch):
    sent = [("image", (f"{seed}.png", encoded(noise(seed)))) for seed in range(5)]
    with (
        serving(file, timeout=0.5, max_batch=2) as (url, service),
        halted(slow, service, url, monkeypatch) as (calls, go_on),
    ):
        wait_for(lambda: "No prediction within 0.5 seconds" in post(f"{url}/predict", files=sent).text)
        go_on.set()
        later = []
        wait_for(
            lambda: later.append(post(f"{url}/predict", content=sent[0][1][1], headers=PNG)) or later[-1].is_success
        )
        assert len(calls) <= 2 + len(later), "of the first request only what had begun"


def test_the_top_ten_classes_and_no_logits_that_are_not_finite():
    answer = web.prediction(np.arange(100, dtype=np.float32) * 100, [])
    assert [one["class"] for one in answer["probabilities"]] == list(range(99, 89, -1))
    assert answer["name"] is None
    assert answer["probabilities"][0]["probability"] == pytest.approx(1.0)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(Refused, match="no finite logits") as caught:
            web.prediction(np.array([0, bad], np.float32), [])
        assert caught.value.status == 422


# --- the page and the other routes


def test_the_page_is_self_contained_and_may_run_only_its_own_script(url):
    response = get(url)
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    script = response.text.partition("<script>")[2].partition("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert len(script) > 1000
    outside = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)|@import""", response.text)
    assert all(url[0].startswith("data:") for url in outside), outside
    assert "innerHTML" not in response.text


def test_metadata_and_limits(url):
    about = get(f"{url}/model").json()
    limits = about.pop("limits")
    assert about == toy.ABOUT
    assert (limits["max_bytes"], limits["max_pixels"], limits["max_side"]) == (2_000_000, 25_000_000, 16_384)
    assert limits["memory"] == 256_000_000
    assert limits["formats"][:5] == ["PNG", "JPEG", "WebP", "GIF", "BMP"]
    assert get(f"{url}/health").json()["status"] == "ok"
    for response, status in ((get(f"{url}/predict"), 405), (get(f"{url}/docs"), 404)):
        assert response.status_code == status
        assert "POST /predict" in response.json()["error"]


# --- files


def external(location):
    created = toy.model()
    tensor = created.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return created


def hidden():
    """A constant with external data, in a branch of a node of a function."""
    created = toy.model()
    tensor = external("secret").graph.initializer[1]
    body = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "branch", [], [])
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    created.functions.append(helper.make_function("own", "F", ["c"], ["y"], [node], [helper.make_opsetid("", 18)]))
    return created


def foreign():
    created = toy.model()
    created.graph.node[3].domain = "foreign"
    created.opset_import.append(helper.make_opsetid("foreign", 1))
    return created


BAD = {
    "external": (lambda: external("weights.bin"), "stores tensors in other files"),
    "absolute": (lambda: external("/etc/hostname"), "stores tensors in other files"),
    "hidden": (hidden, "stores tensors in other files"),
    "foreign operation": (foreign, "ONNX Runtime cannot use .*foreign"),
    "no metadata": (lambda: toy.model({}), "was not written by fedkd.export"),
    "names": (lambda: toy.model({**toy.ABOUT, "names": ["a"]}), "was not written by fedkd.export"),
    "mean": (lambda: toy.model({**toy.ABOUT, "mean": [0.5, float("nan"), 0.5]}), "was not written by fedkd.export"),
    "resize": (lambda: toy.model({**toy.ABOUT, "resize": "squash"}), "was not written by fedkd.export"),
    "list": (lambda: toy.model([1, 2]), "was not written by fedkd.export"),
    "size": (lambda: toy.model({**toy.ABOUT, "pixels": 9}), r"pixels must be tensor\(uint8\) of \[N, 9, 9, 3\]"),
    "classes": (lambda: toy.model({**toy.ABOUT, "names": [], "classes": 9}), "logits must be"),
    "type": (lambda: toy.model(kind=TensorProto.FLOAT), "pixels must be"),
    "output": (lambda: toy.model(output="probs"), "logits must be"),
    "batch": (lambda: toy.model(batch=1), "pixels must be"),
    "empty": (onnx.ModelProto, "not an ONNX file"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_of_another_form_are_refused(case, tmp_path):
    make, message = BAD[case]
    (tmp_path / "bad.onnx").write_bytes(make().SerializeToString())
    (tmp_path / "weights.bin").write_bytes(bytes(100_000))
    with pytest.raises(DataError, match=message) as caught:
        network.load(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)


def test_a_file_without_a_way_to_make_images_square_was_trained_on_stretched_ones(tmp_path):
    about = {key: value for key, value in toy.ABOUT.items() if key != "resize"}
    assert network.load(toy.write(tmp_path / "old.onnx", about=about)).resize == "stretch"


def test_damaged_files_are_refused(file, tmp_path):
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 5):
            damaged[place] = rng.integers(256)
        (tmp_path / "bad.onnx").write_bytes(damaged[: rng.integers(1, len(content))] if rng.random() < 0.5 else damaged)
        try:
            network.load(tmp_path / "bad.onnx")
        except DataError:
            refused += 1
    assert refused >= 20


def test_names_are_valid_text(tmp_path):
    names = ["\ud800", "\x1b[31m", "</script>", "", "é", "日本", "a" * 5000, "null", "\u202e", "&amp;"]
    loaded = network.load(toy.write(tmp_path / "names.onnx", about={**toy.ABOUT, "names": names}))
    assert loaded.about["names"] == ["?", *names[1:]]
    json.dumps(loaded.about, ensure_ascii=False).encode()


# --- the command


def command(*arguments):
    line = [sys.executable, "-m", "fedkd.serve", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)


def test_mistakes_at_the_start_are_reported_in_one_sentence(file, tmp_path):
    for name in ("text.onnx", "a.safetensors"):
        (tmp_path / name).write_text("hello")
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        for arguments, code, message in (
            ([tmp_path / "none.onnx"], 3, "There is no file"),
            ([tmp_path / "text.onnx"], 3, "not an ONNX file"),
            ([tmp_path / "a.safetensors"], 3, "; export a student first: python -m fedkd.export"),
            ([file, "--port", port], 2, f"Cannot listen on port {port} of 127.0.0.1 (address already in use)"),
            ([file, "--max-batch", "0"], 2, "max-batch"),
            ([], 2, "FILE"),
        ):
            done = command(*arguments)
            assert (done.returncode, done.stdout) == (code, ""), done.stderr
            assert message in done.stderr
            assert done.stderr.startswith("fedkd: ")
            assert done.stderr.count("\n") == 1


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UsageError, match=r"Cannot listen on port 0 of 203\.0\.113\.1"):
        http.listen("203.0.113.1", 0)


def test_responses_are_not_delayed_by_nagles_algorithm():
    """asyncio turns it off only for a socket with a protocol; with it a kept connection waits 40 ms per response."""
    with http.listen("localhost", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_without_the_extra(file, monkeypatch):
    from fedkd import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UsageError, match=re.escape("pip install 'fedkd[serve]'")):
        serve.serve(file)


def test_pytorch_is_not_loaded(file):
    script = (
        "import sys; from pathlib import Path; import fedkd.serve; assert 'onnxruntime' not in sys.modules;"
        "from fedkd.serve import http, network, web; network.load(Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, file], cwd=ROOT, check=True, timeout=240)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_server_after_all_accepted_requests(file, sent, code):
    line = [sys.executable, "-m", "fedkd.serve", str(file), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": ""}, **pipes) as server:
        try:
            url = re.search(r"http://[^/]+", server.stdout.readline())[0]
            content = encoded(noise())
            with connect(url) as connection:
                connection.sendall(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(content))
                assert b"100" in connection.recv(1000)  # it is being read
                server.send_signal(sent)
                wait_for(lambda: not accepts(url))
                connection.sendall(content)
                assert receive(connection).startswith(b"HTTP/1.1 200 ")
            assert server.wait(120) == code
            assert re.fullmatch(r"fedkd: (terminated\.|interrupted; .*)\n", server.stderr.read())
        finally:
            server.kill()


def accepts(url):
    try:
        with connect(url):
            return True
    except OSError:
        return False
