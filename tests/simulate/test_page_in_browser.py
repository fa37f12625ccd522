"""``report.html`` in a real browser: narrow and wide, light and dark, on paper, and for a screen reader."""

from __future__ import annotations

import pytest

from fedkd.compare.__main__ import compare
from tests.conftest import BROWSER, simulated

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")

A4 = 688  # pixels of the width of a page of paper without its margins

#: The contrast of each text and each line with what is behind it, for those below a limit.
CONTRAST = """() => {
    const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => {
        const [r, g, b] = color.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const color = rgba(getComputedStyle(each).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color.slice(0, 3);
        }
        return [255, 255, 255];
    };
    const ratio = (a, b) => {
        const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    let checked = 0;
    for (const element of document.querySelectorAll("body *")) {
        const style = getComputedStyle(element), isSvg = element instanceof SVGElement;
        const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        const colors = isText ? [[isSvg ? style.fill : style.color, 4.5]] : [];
        if (element.matches("path.curve, path.axis")) colors.push([style.stroke, 3]);
        if (element.matches("path[class^=f], path.size")) colors.push([style.fill, 3]);
        for (const [color, least] of colors) {
            checked += 1;
            const got = ratio(rgba(color).slice(0, 3), behind(element));
            const what = `${element.tagName}.${element.getAttribute("class")}`;
            if (got < least) found.push(`${what} ${color} ${got.toFixed(2)}`);
        }
    }
    return [checked, [...new Set(found)]];
}"""

#: What a screen reader lacks.
UNNAMED = """() => {
    const found = [];
    const check = (selector, isFine) => document.querySelectorAll(selector).forEach((each) => {
        if (!isFine(each)) found.push(`${selector}: ${each.outerHTML.slice(0, 120)}`);
    });
    check("html", (each) => each.lang === "en" && document.title);
    check("svg", (each) => each.getAttribute("aria-hidden") === "true"
        || (each.getAttribute("role") === "img" && each.getAttribute("aria-label").length > 20));
    check("table", (each) => each.caption?.textContent && each.tHead && each.querySelector("tbody th"));
    check("th", (each) => each.textContent.trim() && ["col", "row"].includes(each.scope));
    check("tr", (each) => each.cells.length === each.closest("table").tHead.rows[0].cells.length);
    check(".scroll", (each) => each.tabIndex === 0 && each.getAttribute("aria-label"));
    check("pre", (each) => each.tabIndex === 0);
    check("figure", (each) => each.querySelector("figcaption").textContent);
    check("nav", (each) => each.getAttribute("aria-label"));
    check("nav a", (each) => document.querySelector(each.getAttribute("href")));
    check("details", (each) => each.firstElementChild.tagName === "SUMMARY" && each.firstElementChild.textContent);
    check("body > *", (each) => each.tagName === "MAIN");
    const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
    if (new Set(ids).size < ids.length) found.push("an id is there twice");
    const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((each) => Number(each.tagName[1]));
    levels.forEach((level, place) => {
        if (level > (levels[place - 1] ?? 0) + 1) found.push(`heading ${place} skips a level`);
    });
    if (levels.filter((level) => level === 1).length !== 1) found.push("not one h1");
    return found;
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The page of a run and that of a comparison with two settings."""
    root = tmp_path_factory.mktemp("pages")
    options = {"clients": 4, "local_test": 0.2, "faults": "dropout=0.3", "min_clients": 1}
    skewed = {**options, "partitioner": "dirichlet:alpha=0.5"}
    simulated(root / "run", compare="fedavg local", seeds=2, **skewed)
    simulated(root / "other", algorithm="fedavg", **options)
    compare(root / "run", root / "other", by=("partitioner",), out=root / "table", name=(f"fedavg={'W' * 80}",))
    return [root / "run" / "report.html", root / "table" / "report.html"]


@pytest.fixture(params=[0, 1], ids=["run", "comparison"])
def page(request, browser, files):
    """A page as it opens; the test fails if the browser reports an error, or anything but the file is asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    errors, requests = [], []
    opened.on("console", lambda message: errors.append(message.text))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(files[request.param].as_uri())
    yield opened
    context.close()
    assert errors == []
    assert requests == [files[request.param].as_uri()]


def open_all(page):
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_can_be_read_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    open_all(page)
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    checked, low = page.evaluate(CONTRAST)
    assert checked > 200
    assert low == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert dark == (scheme == "dark")


def test_a_screen_reader_finds_names_captions_and_headings(page):
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate("document.querySelectorAll('figure svg[role=img]').length") >= 4


def test_a_wide_table_scrolls_with_the_keyboard(page):
    page.set_viewport_size({"width": 360, "height": 800})
    wide = page.locator(".scroll").first
    wide.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.scroll').scrollLeft > 0")


def test_text_in_figures_is_large_enough_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 800})
    heights = page.evaluate(
        "[...document.querySelectorAll('figure svg')].filter((each) => each.checkVisibility())"
        ".map((each) => each.getBoundingClientRect().width / 420 * parseFloat(getComputedStyle("
        "each.querySelector('text')).fontSize))"
    )
    assert min(heights) >= 10


def test_on_paper_it_is_light_and_no_table_is_cut(page):
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": A4, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") == A4
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(22, 32, 44)"
    over = (
        "[...document.querySelectorAll('table')].filter((each) => each.getBoundingClientRect().right > innerWidth + 1)"
    )
    assert page.evaluate(f"{over}.length") == 0
    assert page.locator("tr").first.evaluate("row => getComputedStyle(row).breakInside") == "avoid"
    assert page.locator("nav").is_hidden()
    assert page.pdf(format="A4").startswith(b"%PDF")
