"""The web page in a real browser: Debian's Chromium, or any other one on the PATH."""

from __future__ import annotations

import base64

import pytest

from fedkd.serve import images
from tests.conftest import BROWSER
from tests.serve import toy
from tests.serve.toy import direct, encoded, noise, serving

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")

IMAGE = encoded(noise(5))
HIDDEN = "<img src=x onerror='document.title=1'>"  # the name of the predicted class


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = toy.write(tmp_path_factory.mktemp("page") / "toy.onnx")
    best = int(direct(path, noise(5)).argmax())
    names = [HIDDEN if c == best else "" if c == (best + 1) % 10 else f"class of {c}" for c in range(10)]
    return toy.write(path, about={**toy.ABOUT, "names": names})


@pytest.fixture
def page(browser, file):
    """The page as it opens; the test fails if the browser reports an error."""
    with serving(file, max_bytes=100_000) as (url, _):
        context = browser.new_context(viewport={"width": 360, "height": 700})
        opened = context.new_page()
        opened.set_default_timeout(120_000)
        errors, requests = [], []
        opened.on("console", lambda message: errors.append(message.text))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto(url)
        opened.get_by_text("10 classes").wait_for()
        yield opened
        context.close()
        # The browser itself reports refused and lost requests. Violations of the policy are among the other errors.
        assert [text for text in errors if not text.startswith("Failed to load resource")] == []
        assert all(address.startswith((url, "blob:", "data:")) for address in requests), requests


def choose(page, content=IMAGE, name="a.png", kind="image/png"):
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def drop(page, content):
    """Dispatch the events of a file that is dropped on the page."""
    script = """(content) => {
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, base64.b64encode(content).decode())
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer})


def check_prediction(page, file):
    """Wait for the prediction and compare it with ONNX Runtime's."""
    page.locator("#answer").wait_for()
    expected = direct(file, noise(5))
    assert page.locator("#best").inner_text() == HIDDEN
    rows = page.get_by_role("listitem")
    assert rows.count() == 10
    shares = [float(text.rstrip("%")) for text in rows.locator(".share").all_inner_texts()]
    assert shares == pytest.approx(sorted((100 * expected).tolist(), reverse=True), abs=0.051)
    widths = [box.bounding_box()["width"] for box in rows.locator(".bar").all()]
    track = rows.first.locator(".track").bounding_box()["width"]
    page.wait_for_function(
        "(share) => { const bar = document.querySelector('.bar');"
        " return Math.abs(bar.offsetWidth / bar.parentElement.offsetWidth - share) < 0.02; }",
        arg=float(expected.max()),
    )
    assert widths[0] == max(widths) <= track


def test_a_chosen_image_is_shown_and_classified(page, file):
    assert page.locator("#answer").is_hidden()
    choose(page)
    check_prediction(page, file)
    assert page.locator("#picture").evaluate("image => image.complete && image.naturalWidth") == toy.SIDE
    assert page.get_by_role("status").inner_text().startswith(f"{HIDDEN}, ")  # read by screen readers
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # no overflow in a narrow window


def test_the_file_is_sent_as_it_is_and_shown_as_the_network_gets_it(page):
    page.evaluate(
        """() => {
            const { fetch } = window;
            window.fetch = (url, options) => {
                window.sent = options.body.get("image");
                return fetch(url, options);
            };
        }"""
    )
    choose(page)
    page.locator("#answer").wait_for()
    assert bytes(page.evaluate("sent.arrayBuffer().then(buffer => [...new Uint8Array(buffer)])")) == IMAGE
    assert page.locator("#picture").evaluate("image => getComputedStyle(image).objectFit") == "cover"
    assert page.locator("#square").inner_text().startswith("The network gets its central square at 8")
    assert page.locator("#file").get_attribute("accept").split(",") == [f"image/{n.lower()}" for n in images.accepted()]


def test_a_dropped_image_is_classified(page, file):
    drop(page, IMAGE)
    check_prediction(page, file)


def test_names_are_text(page):
    choose(page)
    page.locator("#answer").wait_for()
    assert page.locator("#card img").count() == 0
    assert page.title() == "fedkd: what is in this image?"
    unnamed = (int(direct_best(page)) + 1) % 10
    assert f"class {unnamed}" in page.locator("li .name").all_inner_texts()


def direct_best(page):
    """The class whose name looks like HTML."""
    return page.evaluate("fetch('model').then(r => r.json()).then(m => m.names.findIndex(n => n.startsWith('<')))")


def test_a_file_that_is_no_image_gets_a_message_and_the_next_one_is_classified(page, file):
    choose(page, b"hello", "a.png")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("This is not a supported image: it is damaged or no image of a known format; ")
    assert page.locator("#picture").is_hidden()
    drop(page, IMAGE)
    check_prediction(page, file)
    assert alert.is_hidden()


def test_a_file_that_is_too_large_is_not_sent(page):
    choose(page, b"\0" * 100_001)
    page.get_by_text("larger than 0.1 MB").wait_for()


def test_the_page_works_with_the_keyboard_only(page, file):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.locator("#drop").evaluate("field => getComputedStyle(field).outlineStyle") == "solid"
    # A click opens the system's file dialog, which tests cannot use, so it is prevented.
    page.evaluate(
        """document.activeElement.addEventListener("click", (event) => {
            event.preventDefault();
            window.opens = true;
        }, { once: true })"""
    )
    page.keyboard.press("Space")
    page.wait_for_function("window.opens")
    choose(page)
    check_prediction(page, file)


def test_an_unreachable_server_is_reported(page):
    page.route("**/predict", lambda route: route.abort())
    choose(page)
    page.get_by_text("The server did not answer").wait_for()
    page.unroute_all()
