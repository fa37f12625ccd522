from __future__ import annotations

import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from fedkd.core.errors import UsageError
from fedkd.core.notes import plain
from fedkd.core.report import figure, table, text
from fedkd.core.report.grid import Grid
from fedkd.core.report.rows import common_accuracy, sent, until
from fedkd.core.report.screen import Screen


def curve(accuracies, up=100, down=50, model="student", name="a", seed=0):
    return [
        {
            "algorithm": name, "seed": seed, "round": number, "test_accuracy": accuracy,
            "test_loss": None if model == "clients" else 1.0, "teacher_accuracy": accuracy, "client_accuracy": 0.1,
            "uplink_serialized_bytes": up, "downlink_serialized_bytes": down,
            "training_seconds": 1.0, "evaluation_seconds": 0.5, "failures": [],
        }
        for number, accuracy in enumerate(accuracies, 1)
    ]  # fmt: skip


def summary(rows):
    last = rows[-1]
    return {
        **{key: last[key] for key in ("algorithm", "seed", "test_accuracy", "teacher_accuracy", "client_accuracy")},
        "test_accuracy_last5": 0.5,
        "evaluated_model": "clients" if last["test_loss"] is None else "student",
        "uplink_serialized_bytes": sum(r["uplink_serialized_bytes"] for r in rows),
        "downlink_serialized_bytes": sum(r["downlink_serialized_bytes"] for r in rows),
        "training_seconds": 3.0,
        "evaluation_seconds": 1.5,
    }


def bytes_to(accuracy, rows):
    """Bytes in both directions until an accuracy is reached."""
    reached = until(accuracy, rows)
    return None if reached is None else sent(reached)


def test_bytes_to_a_common_accuracy():
    slow, fast, silent = curve([0.1, 0.2, 0.3]), curve([0.2, 0.6, 0.5], up=1000), curve([0.05], up=0, down=0)
    common = common_accuracy([slow, fast, silent])
    assert common == 0.3, "the best of the slowest; a method without communication does not count"
    assert bytes_to(common, slow) == 450
    assert bytes_to(common, fast) == 2100
    assert bytes_to(0.9, fast) is None
    assert common_accuracy([silent]) is None


def test_a_method_that_is_not_evaluated_in_every_round_has_no_bytes_to_an_accuracy():
    """It may have reached the accuracy in a round without an evaluation."""
    rows, other = curve([None, 0.4], model="clients"), curve([0.5, 0.6], name="b")
    assert common_accuracy([rows, other]) == 0.6
    assert bytes_to(0.4, rows) is None
    curves = {("a", 0): rows, ("b", 0): other}
    assert "not evaluated in every round" in table.side_by_side([summary(rows), summary(other)], curves).caption
    assert table.costs(curves).rows == [["a", "0 of 1", "–", "–", "–"], ["b", "1 of 1", "2", "300 B", "2.0 s"]]
    assert table.costs(curves, 0.5).rows[1] == ["b", "1 of 1", "1", "150 B", "1.0 s"]
    assert "Until the test accuracy first is 50.0%, the target" in table.costs(curves, 0.5).caption


def test_costs_are_means_over_seeds_that_all_reached_it():
    curves = {("a", 0): curve([0.2, 0.4]), ("a", 1): curve([0.4, 0.5], seed=1)}
    assert table.costs(curves, 0.4).rows == [["a", "2 of 2", "1.5", "225 B", "1.5 s"]]
    assert table.costs(curves, 0.5).rows == [["a", "1 of 2", "–", "–", "–"]]
    assert table.costs({("silent", 0): curve([0.5], up=0)}) is None


def test_a_pivot_has_a_column_for_each_setting():
    found = [summary(curve([0.4 + 0.1 * s], seed=s)) for s in (0, 1)]
    other = [summary(curve([0.6], name="b", model="clients")) | {"unfinished": True}]
    settings = {"alpha=0.1": found, "alpha=1": [*found[:1], *other]}
    grid = table.pivot(settings, "test_accuracy", {"b": "B (ours)"})
    assert list(grid.titles) == ["method", "alpha=0.1", "alpha=1"]
    assert grid.rows == [["a", "45.0% ±7.1", "40.0%"], ["B (ours)*", "–", "60.0%†"]]
    assert "0 to 2 seeds" in grid.caption
    assert "†: not finished" in grid.caption
    cells = [
        table.pivot({"x": found}, key).rows[0][1] for key in ("uplink_serialized_bytes", "training_seconds", "seed")
    ]
    assert cells == ["100 B", "3.0 s", "0.5 ±0.71"]


def test_the_interval_is_the_percentile_bootstrap():
    from scipy.stats import bootstrap

    differences = [0.01, -0.02, 0.03, 0.015, 0.07]
    low, high = (float(word.strip("[],")) for word in table._interval(differences).split())
    expected = bootstrap(
        (differences,), lambda each, axis: each.mean(axis), method="percentile", n_resamples=100_000, rng=1
    ).confidence_interval
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.11)
    assert table._interval(differences[:2]) == ""


def test_a_table_in_latex_has_no_sign_that_it_would_read_as_a_command():
    grid = Grid(
        ["method", "Δ fedavg"],
        [["dsfl:a_b=50%&$#{}~^\\", "+1.0 ±0.5"], ["[7] a-1", "-1.0 [-2.0, 0.5]"]],
        "one\ntwo_three",
    )
    lines = grid.latex().splitlines()
    body = r"dsfl:a\_b=50\%\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} & +1.0 $\pm$0.5 \\"
    assert lines[2:7] == [r"\begin{tabular}{lr}", r"\toprule", r"method & $\Delta$ fedavg \\", r"\midrule", body]
    assert r"{[}7] a-1 & $-$1.0 {[}$-$2.0, 0.5] \\" in lines, "an option of the line break before it; a minus"
    assert r"\caption{one two\_three}" in lines


def test_a_table_in_markdown_has_as_many_cells_as_titles():
    assert Grid(["a", "b"], [["x|y", "1"]], "").markdown().splitlines()[2] == r"| x\|y | 1 |"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(tmp_path):
    rows = curve([0.5], name="dsfl:temperature=0.1")
    more = {"float32_bytes": 1, "entropy_bound_bytes": 1, "encoded_bytes": 1}
    seeds = {("fedavg", seed): curve([0.5 + 0.1 * seed], name="fedavg", seed=seed) for seed in range(3)}
    seeds |= {("dsfl", seed): curve([0.6], name="dsfl", seed=seed) for seed in range(3)}
    grids = [
        table.side_by_side([summary(rows)], {(rows[0]["algorithm"], 0): rows}),
        table.ledger([summary(rows) | more]),
        table.side_by_side([summary(each) for each in seeds.values()], seeds),  # wider than a page
    ]
    body = "\n".join(grid.latex() for grid in grids)
    preamble = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
    (tmp_path / "t.tex").write_text(f"{preamble}{body}\\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout


def test_columns_that_do_not_fit_on_a_line_of_latex_go_below():
    titles = ["method", *(f"column {number}" for number in range(10))]
    grid = Grid(titles, [["fedavg", *(f"{number}.00 ±0.00" for number in range(10))]], "caption")
    text = grid.latex()
    heads = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.startswith("method")]
    assert len(heads) == 3
    assert [title for head in heads for title in head[1:]] == titles[1:]
    assert text.count(r"\caption") == text.count(r"\begin{table}") == 1


def test_the_table_has_means_and_standard_deviations_over_seeds():
    curves = {("a", s): curve([0.2, 0.4 + 0.1 * s], seed=s) for s in (0, 1)}
    curves |= {("b", s): curve([0.3, 0.3], name="b", seed=s, model="clients") for s in (0, 1)}
    out = io.StringIO()
    Console(file=out, width=160).print(table.side_by_side([summary(rows) for rows in curves.values()], curves).rich())
    shown = out.getvalue()
    assert "45.0% ±7.1" in shown
    assert "b*" in shown


def test_differences_to_fedavg_are_paired_by_seed():
    curves = {("fedavg", s): curve([0.4 + 0.2 * s], name="fedavg", seed=s) for s in (0, 1)}
    curves |= {("a", s): curve([0.5 + 0.2 * s + 0.01 * s], seed=s) for s in (0, 1)}
    grid = table.side_by_side([summary(rows) for rows in curves.values()], curves)
    place = grid.titles.index("Δ fedavg")
    assert [row[place] for row in grid.rows] == ["–", "+10.5 ±0.7"]
    lines = grid.markdown().splitlines()
    assert lines[0].startswith("| method | test acc | Δ fedavg |")
    assert lines[3].startswith("| a | 60.5% ±14.8 | +10.5 ±0.7 |")


def test_a_missing_seed_is_shown():
    curves = {("fedavg", s): curve([0.4], name="fedavg", seed=s) for s in (0, 1)}
    curves |= {("a", s): curve([0.5], seed=s) for s in (0, 1, 2)}
    curves |= {("b", s): curve([None if s else 0.6], name="b", seed=s, model="clients") for s in (0, 1)}
    grid = table.side_by_side([summary(rows) for rows in curves.values()], curves)
    assert [row[0] for row in grid.rows] == ["fedavg (2 seeds)", "a (3 seeds)", "b* (2 seeds)"]
    assert [row[grid.titles.index("Δ fedavg")] for row in grid.rows] == [
        "–",
        "+10.0 ±0.0 (2 seeds)",
        "+20.0 (1 seed)",
    ]


def test_no_number_is_cut_on_a_narrow_terminal():
    name = "dsfl:aggregation=sa,downlink=nothing"
    rows = curve([0.5], up=10**9, name=name)
    out = io.StringIO()
    Screen(Console(file=out, width=40)).show(table.side_by_side([summary(rows)], {(name, 0): rows}))
    assert any(name in line and "50.0%" in line and "1 GB" in line for line in out.getvalue().splitlines())


def test_runs_of_different_lengths_and_their_validation():
    curves = {("a", 0): curve([0.2, 0.4, 0.6]), ("a", 1): curve([0.3, 0.5], seed=1), ("b", 0): curve([0.1], name="b")}
    found = [summary(rows) for rows in curves.values()]
    for run, best in zip(found, (0.2, 0.3, None), strict=True):
        run |= {"best_round": best and 1, "best_validation_accuracy": best and best + 0.1, "best_test_accuracy": best}
    grid = table.side_by_side(found, curves)
    places = [grid.titles.index(title) for title in ("validation", "test at best", "rounds")]
    assert [[row[place] for place in places] for row in grid.rows] == [
        ["35.0% ±7.1", "25.0% ±7.1", "2.5"],
        ["–", "–", "1"],
    ]
    places, means, stds = figure.means([curves["a", 0], curves["a", 1]], "rounds", "test_accuracy")
    assert (places, means) == ([1, 2], [25.0, 45.0])
    assert stds == pytest.approx([7.0711, 7.0711], abs=1e-4)
    assert figure.means([curves["a", 0]], "bytes", "test_accuracy")[0] == pytest.approx([150e-6, 300e-6, 450e-6])
    assert figure.means([curves["a", 0]], "seconds", "training_seconds") == ([1.0, 2.0, 3.0], [1.0] * 3, [0.0] * 3)


def test_figures_are_bitwise_reproducible(tmp_path, images_of_figures):
    curves = {("a", 0): curve([0.2, 0.4]), ("a", 1): curve([0.3, 0.5], seed=1), ("b", 0): curve([None, 0.3], name="b")}
    files = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        figure.draw(curves, "title", tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(files[0]) == {"curve.png", "curve.svg", "curve.pdf"}
    assert files[0] == files[1]
    assert files[0]["curve.png"].startswith(b"\x89PNG")
    assert b">test accuracy (%)</text>" in files[0]["curve.svg"], "text is text"


def test_a_figure_of_a_paper(tmp_path, images_of_figures):
    """Its width is that of columns, and a style of the user's own comes on top."""
    (tmp_path / "own.mplstyle").write_text("font.size: 6\n")
    look = figure.Look(("seconds",), "training_seconds", 1, str(tmp_path / "own.mplstyle"))
    figure.draw({("a", 0): curve([0.2, 0.4])}, "title", tmp_path, "narrow", {"a": "A (ours)"}, look)
    text_ = (tmp_path / "narrow.svg").read_text()
    assert 'width="237.6pt"' in text_, "3.3 inches of 72 points"
    assert ">A (ours)</text>" in text_
    assert ">training seconds</text>" in text_
    assert ">title</text>" not in text_
    with pytest.raises(UsageError, match="--style nowhere is neither a file of rcParams nor a style"):
        figure.check(figure.Look(style="nowhere"))
    with pytest.raises(UsageError, match="--panel needs a value"):
        figure.check(figure.Look(()))


def test_a_figure_of_several_seeds_that_send_nothing(tmp_path, images_of_figures):
    curves = {("local", seed): curve([0.2 + seed / 10], 0, 0, name="local", seed=seed) for seed in (0, 1)}
    figure.draw(curves, "title", tmp_path)
    texts = re.findall(r">([^<>]*)</t", (tmp_path / "curve.svg").read_text())
    assert texts[: texts.index("round")] == ["1"], "a tick for the only round"


@pytest.mark.parametrize("rows", [curve([None, None]), curve([0.1, 0.2], up=0, down=0), curve([0.1], model="clients")])
def test_a_figure_of_runs_without_accuracies_bytes_or_a_student(rows, tmp_path, images_of_figures):
    figure.draw({("a", 0): rows}, "title", tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (40_134, "40.1 kB"),
        (999_600, "1 MB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes_have_units(count, shown):
    assert text.size(count) == shown


def test_percentages_times_and_plurals():
    assert text.percent(0.5149) == "51.5%"
    assert text.percent(None) == "–"
    assert text.seconds(99.9) == "99.9 s"
    assert text.seconds(150) == "2.5 min"
    assert plain(1, "client") == "1 client"
    assert plain(20_000, "image") == "20,000 images"
