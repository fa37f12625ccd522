from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fedkd.core.report import students


def results_of(accuracy: float, **changes: object) -> dict:
    """Results in the form of `fedkd.training.quality.evaluate`."""
    return {
        "images": 1000,
        "accuracy": accuracy,
        "nll": 2 - accuracy,
        "ece": 0.05,
        "agreement": 0.8,
        "reliability": {"share": [0.001, 0.999], "confidence": [0.4, 0.8], "accuracy": [1.0, accuracy]},
        "corrupted_images": 200,
        "uncorrupted_accuracy": accuracy,
        "corruptions": {kind: {"1": accuracy - 0.1, "5": accuracy - 0.2} for kind in ("noise", "blur", "fog")},
        "corruption_accuracy": accuracy - 0.15,
        "shifted": "transformed",
        "shifted_images": 1000,
        "shifted_accuracy": accuracy - 0.05,
        "parameters": 66730,
        "multiply_adds": 7_972_864,
        "bytes": 267_000,
        "latency_ms": {
            "1": {"median": 0.5, "low": 0.4, "high": 0.625},
            "64": {"median": 12.0, "low": 11.0, "high": 14.0},
        },
        "device": "cpu",
        "threads": 1,
        **changes,
    }


def seeds() -> list[dict]:
    teacher = {"agreement": None, "bytes": None}
    return [{"student": results_of(0.5 + 0.1 * seed), "teacher": results_of(0.7, **teacher)} for seed in range(2)]


def shown(grid) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(grid.rich())
    return out.getvalue()


def row(grid, name: str) -> list[str]:
    return next(list(cells) for cells in grid.rows if cells[0] == name)


def test_seeds_are_combined_into_mean_and_standard_deviation():
    evaluations = seeds()
    before = copy.deepcopy(evaluations)
    joined = students.joined(evaluations)
    assert evaluations == before
    assert joined["student"]["accuracy"] == {"mean": pytest.approx(0.55), "std": pytest.approx(0.1 / 2**0.5)}
    assert joined["student"]["corruptions"]["blur"]["5"]["mean"] == pytest.approx(0.35)
    assert joined["student"]["reliability"]["accuracy"][1]["mean"] == pytest.approx(0.55)
    assert joined["student"]["shifted"] == "transformed"
    assert joined["teacher"]["agreement"] is None
    assert json.loads(json.dumps(joined)) == joined


def test_empty_bins_are_left_out_of_the_mean():
    evaluations = seeds()
    evaluations[0]["student"]["reliability"]["accuracy"][0] = None
    evaluations[1]["student"]["reliability"]["accuracy"][0] = 0.25
    assert students.joined(evaluations)["student"]["reliability"]["accuracy"][0] == {"mean": 0.25, "std": None}


def test_the_table_of_quality():
    grid = students.quality_table(students.joined(seeds()))
    assert row(grid, "student") == [
        "student", "55.0% ±7.1", "1.450 ±0.071", "5.0% ±0.0", "80.0% ±0.0", "40.0% ±7.1", "50.0% ±7.1"
    ]  # fmt: skip
    assert row(grid, "teacher")[4] == "–"
    assert "200 images each" in grid.caption
    assert "rotated and translated" in grid.caption
    single = students.quality_table(students.joined([{"student": results_of(0.5, shifted="given")}]))
    assert row(single, "student")[1:3] == ["50.0%", "1.500"]
    assert "of another data set" in single.caption


def test_the_table_of_cost():
    grid = students.cost_table(students.joined(seeds()))
    assert row(grid, "student")[1:] == ["66,730", "8.0 M", "267 kB", "0.500 (0.400–0.625)", "12.0 (11.0–14.0)"]
    assert row(grid, "teacher")[3] == "–"
    assert "on 1 thread." in grid.caption
    assert "multiply-adds" in shown(grid)
    assert "| student | 66,730 |" in grid.markdown()
    on_gpu = students.cost_table(students.joined([{"student": results_of(0.5, device="cuda")}]))
    assert on_gpu.caption.endswith("from pixels to logits, cuda.")


def test_the_figure_is_reproducible_and_names_all_candidates(tmp_path: Path, images_of_figures):
    joined = students.joined(seeds())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        students.draw(joined, "a title", tmp_path / name)
    for name in ("quality.png", "quality.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / "quality.svg").read_text()
    for word in ("student", "teacher", "noise", "blur", "fog", "a title"):
        assert f">{word}</text>" in text, word


def test_the_panels_of_the_corruptions_share_one_axis_for_all_values(monkeypatch, tmp_path):
    drawn = []
    evaluations = seeds()
    for each in evaluations:
        each["student"]["corruptions"]["fog"]["5"] = 0.1  # far below all other values
    monkeypatch.setattr(students, "save", lambda figure, out, name: drawn.append(figure))
    students.draw(students.joined(evaluations), "", tmp_path)
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    limits = {panels[kind].get_ylim() for kind in ("noise", "blur", "fog")}
    assert len(limits) == 1
    assert limits.pop()[0] < 10
    student = next(line for line in panels["fog"].lines if line.get_label() == "student")
    assert list(student.get_xdata()) == [0, 1, 5]
    assert list(student.get_ydata()) == pytest.approx([55, 45, 10])
    diagram = next(line for line in panels["reliability, clean images"].lines if line.get_label() == "student")
    assert list(diagram.get_xdata()) == pytest.approx([80]), "the bin of one image is left out"


def test_a_figure_with_few_images_and_no_corruptions(tmp_path, images_of_figures):
    reliability = {"share": [1.0], "confidence": [0.5], "accuracy": [0.5]}
    few = results_of(0.5, images=5, corruptions={}, reliability=reliability)
    students.draw(students.joined([{"student": few}]), "", tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 1000
