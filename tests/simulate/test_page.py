"""The text of ``report.html``."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from statistics import fmean, stdev
from xml.etree import ElementTree

import numpy as np
import pytest

from fedkd.compare import reading
from fedkd.compare.__main__ import compare
from fedkd.core import run_directory
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import RunError
from fedkd.core.report.text import percent, size, spread
from fedkd.simulate import page, simulate
from fedkd.simulate.page import charts, html, results, uploads
from fedkd.simulate.page.reading import Setting, record
from tests.conftest import ROOT, is_interrupted_after, simulated, tiny

HOSTILE = """<img src=x onerror="alert('1')">&lt;</title></svg>"""
SECTIONS = ["Results", "Learning curves", "Partition", "Teacher", "Clients", "Communication"]
SECTIONS += ["Failures", "Privacy", "Configuration", "Environment"]


class Tree(HTMLParser):
    """The elements of a page as a tree. An end tag that closes another element than the last one is an error."""

    def __init__(self, text):
        super().__init__()
        self.root = ElementTree.Element("root")
        self.open = [self.root]
        self.feed(text)
        assert self.open == [self.root], "all elements are closed"

    def handle_starttag(self, tag, attrs):
        made = ElementTree.SubElement(self.open[-1], tag, {key: value or "" for key, value in attrs})
        if tag != "meta":
            self.open.append(made)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_startendtag(self, tag, attrs):
        ElementTree.SubElement(self.open[-1], tag, {key: value or "" for key, value in attrs})

    def handle_data(self, data):
        if len(last := self.open[-1]):
            last[-1].tail = (last[-1].tail or "") + data
        else:
            last.text = (last.text or "") + data


def tree(text):
    return Tree(text).root


def words(element):
    return "".join(element.itertext()).strip()


def rows_of(root, caption):
    """The rows of the table with a caption: the first cell, and the others by the titles of their columns."""
    (found,) = (each for each in root.iter("table") if words(each.find("caption")) == caption)
    titles, *rows = ([words(cell) for cell in row] for row in found.iter("tr"))
    return [(first, dict(zip(titles[1:], cells, strict=True))) for first, *cells in rows]


def table_of(root, caption):
    """The same, where the first cells differ."""
    rows = rows_of(root, caption)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def sections(root):
    return [words(each) for each in root.iter("h2")]


def read(out):
    result = json.loads((out / "result.json").read_text())
    curves = {}
    for row in run_directory.rows(out / "rounds.jsonl"):
        curves.setdefault((row["algorithm"], row["seed"]), []).append(row)
    return result, curves


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run in which everything happens: several methods and seeds, local test splits, missing updates."""
    directory = tmp_path_factory.mktemp("page") / "run"
    options = {"compare": "fedavg local", "seeds": 2, "local_test": 0.2, "faults": "dropout=0.3,crash=0"}
    simulated(directory, clients=4, partitioner="dirichlet:alpha=0.5", **options)
    return directory


@pytest.fixture(scope="module")
def root(out):
    return tree((out / "report.html").read_text())


def test_every_section_is_there(root):
    assert sections(root) == SECTIONS
    assert [words(each) for each in root.iter("h1")] == ["ensemble, fedavg and local on digits"]
    assert words(root.find(".//title")) == "fedkd: ensemble, fedavg and local on digits"
    linked = [each.get("href") for each in root.find(".//nav").iter("a")]
    assert linked == [f"#{each.get('id')}" for each in root.iter("section")]


def test_the_numbers_are_those_of_the_result(out, root):
    result, _ = read(out)
    shown = table_of(root, "Methods side by side")
    assert list(shown) == ["ensemble", "fedavg", "local*"]
    both = table_of(root, "Bytes of both directions")
    for name, cells in shown.items():
        mine = [run for run in result["runs"] if run["algorithm"] == name.rstrip("*")]
        for title, key in {
            "test acc": "test_accuracy",
            "teacher": "teacher_accuracy",
            "local": "local_accuracy",
        }.items():
            values = [run[key] for run in mine]
            assert cells[title] == spread(fmean(values), stdev(values))
        for way in ("uplink", "downlink"):
            assert cells[way] == size(fmean(run[f"{way}_serialized_bytes"] for run in mine))
        for title, key in {"float32": "float32_bytes", "encoded": "encoded_bytes"}.items():
            assert both[name.rstrip("*")][title] == size(fmean(run[key] for run in mine))
    best = max(
        ("ensemble", "fedavg", "local"), key=lambda n: float(shown[n + "*" * (n == "local")]["test acc"].split("%")[0])
    )
    assert words(root.find(".//p[@class='lead']")).startswith(
        f"{best} has the highest test accuracy after the last round"
    )


def test_the_bytes_of_each_direction_are_the_sums_of_the_rounds(out, root):
    _, curves = read(out)
    shown = table_of(root, "Bytes of each direction")
    rows = [curves["ensemble", seed] for seed in (0, 1)]
    for way in ("uplink", "downlink"):
        for kind in ("float32", "encoded", "serialized", "metadata"):
            assert shown[f"ensemble, {way}"][kind] == size(
                fmean(sum(r[f"{way}_{kind}_bytes"] for r in of) for of in rows)
            )
    assert shown["ensemble, evaluation"]["serialized"] == size(
        fmean(sum(r["evaluation_bytes"] for r in of) for of in rows)
    )


def test_the_partition_is_that_of_the_file_with_the_skew_of_the_result(out, root):
    result, _ = read(out)
    skew = table_of(root, "Skew of the partition")
    for run in result["runs"]:
        assert skew[str(run["seed"])]["distance"] == f"{run['partition_distance']:.3f}"
        assert skew[str(run["seed"])]["clients"] == "4"
    counts = table_of(root, "Skew of the partition, samples by class, seed 0")
    with np.load(out / "partition.npz") as arrays:
        expected = arrays["seed0_counts"]
    assert [list(map(int, row.values())) for row in counts.values()] == expected.tolist()
    picture = next(each for each in root.iter("svg") if each.get("aria-label", "").startswith("Samples of 4 clients"))
    drawn = "".join(each.get("d") for each in picture.iter("path") if each.get("class") == "cell")
    assert drawn.count("M") == (expected > 0).sum(), "a cell for each class that a client has"


def test_each_client_has_its_accuracy_of_the_last_round(out, root):
    _, curves = read(out)
    for caption, key in {
        "Accuracy of the clients": "accuracy",
        "Accuracy on local test splits": "local_accuracy",
    }.items():
        shown = table_of(root, f"{caption}, each client")
        for (name, seed), rows in curves.items():
            found = {each["client"]: percent(each[key]) for each in rows[-1]["clients"]}
            for client in range(4):
                row = shown.get(f"client {client}, seed {seed}", {})
                assert row.get(name, "–") == found.get(client, "–")
        worst = [min(each[key] for each in curves["fedavg", seed][-1]["clients"]) for seed in (0, 1)]
        assert table_of(root, caption)["fedavg"]["worst"] == spread(fmean(worst), stdev(worst))


def test_missing_updates_are_counted_with_their_reasons(out, root):
    _, curves = read(out)
    failed = [each for rows in curves.values() for row in rows for each in row["failures"]]
    assert failed, "otherwise the test tests nothing"
    assert sum(int(row["count"]) for _, row in rows_of(root, "Missing updates")) == len(failed)
    reasons = rows_of(root, "Reasons")
    assert sum(int(row["count"]) for _, row in reasons if row["of"] == "update") == len(failed)
    assert {row["cause"] for _, row in reasons} == {each["cause"] for each in failed}


def test_options_that_differ_come_first_and_the_environment_is_that_of_the_run(out, root):
    changed = table_of(root, "Options that differ from the defaults")
    assert changed["clients"] == {"value": "4", "default": "20"}
    assert changed["compare"] == {"value": "fedavg local", "default": "none"}
    others = table_of(root, "Options with their default, and where output is")
    assert others["temperature"] == {"value": "1.0"}
    assert others["out"] == {"value": str(out)}
    env = json.loads((out / "env.json").read_text())
    assert (
        table_of(root, "What results may depend on besides the options")["packages: torch"]["value"]
        == env["packages"]["torch"]
    )


def test_it_follows_from_the_files_alone(out):
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    page.write_run(out, *read(out))
    assert (out / "report.html").read_bytes() == before


def test_nothing_is_loaded_and_nothing_runs(out, root):
    text = (out / "report.html").read_text()
    assert {each.tag for each in root.iter()} & {"script", "link", "img", "iframe", "image", "use"} == set()
    assert not re.search(r"url\(|@import|https?:|\bsrc=", text)
    assert "default-src 'none'" in root.find(".//meta[@http-equiv='Content-Security-Policy']").get("content")


def renamed(value, old, new):
    """The same with another name of a method, in keys and values."""
    return json.loads(json.dumps(value).replace(json.dumps(old), json.dumps(new)))


def test_texts_of_users_are_text(out):
    result, curves = read(out)
    result = renamed(result, "fedavg", HOSTILE)
    result |= {"status": "failed", "message": HOSTILE, "dataset_fallback": HOSTILE, "dataset": HOSTILE}
    result["warnings"] = [{"round": 1, "algorithm": HOSTILE, "seed": 0, "text": HOSTILE}]
    curves = {key: renamed(rows, "fedavg", HOSTILE) for key, rows in curves.items()}
    curves = {(rows[0]["algorithm"], seed): rows for (_, seed), rows in curves.items()}
    for failure in (each for rows in curves.values() for row in rows for each in row["failures"]):
        failure["reason"] = HOSTILE
    found = dataclasses.replace(
        record(out, result),
        names=[HOSTILE] * 10,
        config={"algorithm": HOSTILE, HOSTILE: HOSTILE},
        environment={HOSTILE: {HOSTILE: HOSTILE}},
        errors=[{"algorithm": HOSTILE, "reason": HOSTILE}],
    )
    setting = Setting(HOSTILE, result["runs"], curves, [found])
    for text in (
        page.run_page(setting),
        page.comparison_page([setting, setting], results.Choice(labels={"local": HOSTILE}), out / HOSTILE),
    ):
        parsed = tree(text)
        assert {each.tag for each in parsed.iter()} & {"img", "script"} == set()
        assert not [key for each in parsed.iter() for key in each.attrib if key.startswith("on")]
        assert words(parsed).count(HOSTILE) > 30
        assert {row["warning"] for _, row in rows_of(parsed, "Warnings of the runs")} == {HOSTILE}
        assert "<img" not in text


def test_warnings_come_first(out):
    result, curves = read(out)
    result["warnings"] = [{"round": 2, "algorithm": "fedavg", "seed": 1, "text": "Watch out."}]
    parsed = tree(page.run_page(Setting("", result["runs"], curves, [record(out, result)])))
    assert sections(parsed) == ["Warnings", *SECTIONS]
    assert table_of(parsed, "Warnings of the runs") == {"fedavg": {"seed": "1", "round": "2", "warning": "Watch out."}}


def test_an_interrupted_run_has_a_page_as_far_as_it_went(tmp_path):
    directory = tmp_path / "run"
    assert is_interrupted_after(3, lambda: simulate(tiny(out=str(directory), compare="local")))
    parsed = tree((directory / "report.html").read_text())
    assert "The run is interrupted" in words(parsed.find(".//p[@class='alert']"))
    assert list(table_of(parsed, "Methods side by side")) == ["ensemble", "local*†"]
    assert "Failures" not in sections(parsed)


def test_a_run_that_failed_in_its_first_round_has_a_page_that_says_why(tmp_path):
    with pytest.raises(RunError) as caught:
        simulate(tiny(out=str(tmp_path / "run"), faults="dropout=1", min_clients=3))
    parsed = tree((tmp_path / "run" / "report.html").read_text())
    assert f"The run has failed ({caught.value})" in words(parsed.find(".//p[@class='alert']"))
    assert words(parsed.find(".//p[@class='lead']")) == "No method has a test accuracy yet."
    assert sections(parsed) == ["Partition", "Configuration", "Environment"]


def test_a_local_method_alone_has_no_figure_over_bytes_and_none_of_a_student(tmp_path):
    directory = tmp_path / "run"
    simulated(directory, algorithm="local", rounds=1)
    parsed = tree((directory / "report.html").read_text())
    assert next(words(each) for each in parsed.iter("figcaption")) == "Test accuracy over rounds"
    assert not [each for each in parsed.iter("figcaption") if "over bytes" in words(each)]
    assert words(parsed.find(".//p[@class='lead']")).endswith("with no communication.")
    assert "local: nothing." in words(parsed)


def test_a_comparison_of_several_settings_has_a_page(out, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(out, other)
    config = (other / "config.toml").read_text().replace("dirichlet:alpha=0.5", "dirichlet:alpha=9")
    (other / "config.toml").write_text(config)
    compare(out, other, by=("partitioner",), out=tmp_path / "table", name=("fedavg=FedAvg <ours>",))
    parsed = tree((tmp_path / "table" / "report.html").read_text())
    assert sections(parsed) == [*SECTIONS[:-1], "Runs", "Environment"]
    all_settings = table_of(parsed, "All settings")
    assert list(all_settings) == ["ensemble", "FedAvg <ours>", "local*"]
    assert list(all_settings["ensemble"]) == ["dirichlet:alpha=0.5", "dirichlet:alpha=9"]
    side = table_of(parsed, "Methods side by side: dirichlet:alpha=9")
    assert side["FedAvg <ours>"]["test acc"] == all_settings["FedAvg <ours>"]["dirichlet:alpha=9"]
    links = [each.get("href") for each in parsed.iter("a") if not each.get("href").startswith("#")]
    assert [(tmp_path / "table" / link).resolve() for link in links] == [each / "report.html" for each in (out, other)]
    changed = table_of(parsed, "Options that differ from the defaults")
    assert changed["partitioner"]["value"] == "dirichlet:alpha=0.5; dirichlet:alpha=9"


def test_runs_of_earlier_versions_have_a_page_without_what_they_lack():
    files = [reading.read_run(path) for path in sorted((ROOT / "simulations" / "family" / "dirichlet-0.1").iterdir())]
    setting = Setting("", *reading.simulated(files), [record(one.path, one.result) for one in files])
    parsed = tree(page.comparison_page([setting], results.Choice(), ROOT))
    absent = {"Partition", "Failures", "Environment"}
    assert sections(parsed) == [*(each for each in SECTIONS if each not in absent), "Runs"]
    assert "central has the highest" not in words(parsed), "it is an upper bound"


def test_a_page_that_cannot_be_written_fails_no_run(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise KeyError("a mistake in the page")

    monkeypatch.setattr(results, "summary", fails)
    simulated(tmp_path / "run", algorithm="local", rounds=1)
    assert read(tmp_path / "run")[0]["status"] == "ok"
    assert "report.html is not written (KeyError" in capsys.readouterr().err


def test_every_method_says_what_leaves_a_client_in_the_words_of_its_page():
    assert uploads.UPLOADS.keys() == CATALOG["algorithm"].keys()
    lines = [line.split(" | ") for line in (ROOT / "docs/algorithms.md").read_text().splitlines()]
    uplinks = {line[0].strip("|` ").split("`")[0]: line[1] for line in lines if len(line) == 5 and "`" in line[0]}
    assert uplinks.keys() >= uploads.UPLOADS.keys()
    nouns = ("logits", "probabilities", "weights", "feature maps", "class means", "class counts", "mean output")
    nouns += ("mean prediction", "1-bit soft labels", "control variate", "nothing", "one bit")
    for name, text in uploads.UPLOADS.items():
        assert [noun for noun in nouns if noun in text] == [noun for noun in nouns if noun in uplinks[name]], name
    assert "user-defined" in uploads.upload("./mine.py:Mine:rate=1")
    assert uploads.upload("dsfl:temperature=0.1") == uploads.UPLOADS["dsfl"]


def test_an_element_escapes_texts_and_attributes():
    made = html.tag("p", "a<b", html.tag("b", "&"), None, class_='"x"', aria_label=None, x=1.50)
    assert made == '<p class="&quot;x&quot;" x="1.5">a&lt;b<b>&amp;</b></p>\n'


def places(svg, name):
    return [each for each in tree(svg).iter("path") if name in each.get("class", "").split()]


def test_curves_lie_where_their_values_are():
    curve = charts.Curve(0, [1, 2, 3], [10.0, 20.0, 30.0], [0.0, 5.0, 0.0])
    svg = charts.lines("about", [curve], (10.0, 30.0), "round")
    texts = {words(each): float(each.get("y")) - 4 for each in tree(svg).iter("text") if "%" in words(each)}
    (line,) = places(svg, "curve")
    points = [tuple(map(float, point.split())) for point in line.get("d")[1:].split("L")]
    assert [texts["10%"], texts["20%"], texts["30%"]] == pytest.approx([y for _, y in points])
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)
    assert len(places(svg, "band")) == 1


@pytest.mark.parametrize(
    ("x", "is_log"), [([1.0], False), ([1e-6], True), ([0.33], True), ([0.2, 300.0], True), (range(1, 501), False)]
)
def test_every_span_of_rounds_and_bytes_has_a_few_ticks(x, is_log):
    svg = charts.lines(
        "about", [charts.Curve(9, list(x), [50.0] * len(x), [0.0] * len(x))], (50.0, 50.0), "x", is_log=is_log
    )
    shown = [words(each) for each in tree(svg).iter("text") if each.get("text-anchor") == "middle"]
    assert 2 <= len(shown) <= 9
    assert len(set(shown)) == len(shown)
    assert "nan" not in svg


def test_a_picture_of_many_clients_and_classes_stays_small():
    counts = np.random.default_rng(0).integers(0, 9, (100, 200))
    assert len(charts.picture("about", counts)) < 600_000
    names = [str(number) for number in range(30)]
    assert (
        len(tree(charts.dots("about", [(name, i, [1.0, 99.0]) for i, name in enumerate(names)])).findall(".//g")) == 30
    )
