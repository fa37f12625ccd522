"""Which options a method uses: what `Algorithm.ignores` and the table in docs/algorithms.md say is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkd.core import tensors
from fedkd.simulate.experiment import prepare
from tests.algorithms.test_methods import one_round
from tests.conftest import DATA_FREE, QUICK, SELECTING, TINY, tiny

#: A value of each option that differs from the one in `tiny`.
CHANGED = {
    "aggregator": "mean-logits",
    "weighting": "size",
    "temperature": 3.0,
    "loss": "mse",
    "proxy-samples": 20,
    "student": "cnn:width=4",
    "distill-epochs": 3,
    "distill-learning-rate": 0.01,
    "distill-batch-size": 16,
    "label-smoothing": 0.3,
}
COLUMNS = list(CHANGED)[:7]  # those that have a column in the table
#: Options that have an effect where --distill-epochs has one.
STEPS = {"distill-steps": 1, "distill-schedule": "cosine"}


def table() -> dict[str, dict[str, bool]]:
    """For each method, whether it uses each of the options above."""
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    start = next(place for place, cells in enumerate(lines) if "`--aggregator`" in cells[1])
    titles = [cell.strip().strip("`-") for cell in lines[start]]
    return {
        cells[0].strip().strip("`"): {option: "✓" in cells[titles.index(option)] for option in COLUMNS}
        for cells in lines[start + 2 :]
        if len(cells) == len(titles)
    }


def trained(method: str, **changes: object) -> str:
    """A hash of all that two rounds of a method give: updates, memories and the server's state."""
    quick = {**QUICK, **SELECTING}.get(method, method)
    config = {"algorithm": quick, "dataset": "noise:size=200,pixels=8", "partitioner": "linear"}
    experiment = prepare(tiny(**(config | changes)))
    algorithm, state, memories = experiment.algorithm, experiment.algorithm.initial_state(experiment.setup), {}
    results = []
    for number in (1, 2):
        updates, memories, state = one_round(experiment, algorithm, number, state, memories)
        results += [
            tensors.digest(each) for each in (*(u.tensors for u in updates.values()), *memories.values(), state)
        ]
    return "".join(results)


@pytest.mark.parametrize("method", table())
def test_a_method_uses_the_options_of_the_table(method, monkeypatch):
    changed = dict(CHANGED)
    if method == "fedgkt":  # its student begins as the clients' models do
        monkeypatch.setitem(TINY, "model", "resnet8:width=8")
        changed["student"] = "resnet20:width=8"
    experiment = prepare(tiny(algorithm=QUICK.get(method, method)))
    algorithm, setup = experiment.algorithm, experiment.setup
    used = {option: option.replace("-", "_") not in algorithm.ignores for option in CHANGED | STEPS}
    has_student = method in DATA_FREE or bool(algorithm.global_model(setup, algorithm.initial_state(setup)))
    assert used["distill-steps"] == used["distill-schedule"] == ("distill_patience" not in algorithm.ignores)
    assert has_student == ("patience" not in algorithm.ignores)
    if algorithm.needs_one_model:
        del used["student"]  # it can only be the clients' model
    assert {option: used[option] for option in used if option in COLUMNS}.items() <= table()[method].items()
    plain = trained(method)
    unused = {option: value for option, value in (changed | STEPS).items() if not used.get(option, True)}
    assert trained(method, **unused) == plain
    for option, value in changed.items():
        if used.get(option):
            assert trained(method, **{option: value}) != plain, option
