"""The table of methods and options in docs/algorithms.md: ✓ changes a method's training, a blank does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedkd.core import notes, tensors
from fedkd.simulate import checks
from fedkd.simulate.experiment import prepare
from tests.algorithms.test_methods import one_round
from tests.conftest import DATA_FREE, MENTORS, tiny

#: A value of each option that differs from the one in `tiny`.
CHANGED = {
    "aggregator": "mean-logits",
    "weighting": "size",
    "temperature": 3.0,
    "loss": "mse",
    "proxy-samples": 20,
    "student": "cnn:width=4",
    "distill-epochs": 3,
}


def table() -> dict[str, dict[str, bool]]:
    """For each method, whether it uses each of the options above."""
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    start = next(place for place, cells in enumerate(lines) if "`--aggregator`" in cells[1])
    titles = [cell.strip().strip("`-") for cell in lines[start]]
    return {
        cells[0].strip().strip("`"): {option: "✓" in cells[titles.index(option)] for option in CHANGED}
        for cells in lines[start + 2 :]
        if len(cells) == len(titles)
    }


def trained(method: str, **changes: object) -> str:
    """A hash of all that two rounds of a method give: updates, memories and the server's state."""
    quick = {**MENTORS, **DATA_FREE}.get(method, method)
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
def test_a_method_uses_the_options_of_the_table(method):
    uses, one_model = table()[method], prepare(tiny(algorithm=method)).algorithm.needs_one_model
    options = {option: value for option, value in CHANGED.items() if not (one_model and option == "student")}
    plain = trained(method)
    assert trained(method, **{option: value for option, value in options.items() if not uses[option]}) == plain
    for option, value in options.items():
        if uses[option]:
            assert trained(method, **{option: value}) != plain, option


@pytest.mark.parametrize("method", table())
def test_label_smoothing_changes_every_method_without_a_loss_of_its_own(method, capsys):
    """Else a notice says that it does not."""
    quick = {**MENTORS, **DATA_FREE}.get(method, method)
    config = tiny(algorithm=quick, dataset="noise:size=200,pixels=8", label_smoothing=0.3)
    updates = []
    for one in (config, dataclasses.replace(config, label_smoothing=0.0)):
        experiment = prepare(one)
        algorithm, setup = experiment.algorithm, experiment.setup
        message = algorithm.broadcast(setup, algorithm.initial_state(setup), 0)
        update, memory = algorithm.local_update(setup, experiment.client(0, 1, {}), message)
        updates.append(update.tensors | memory)
    notes.say.cache_clear()  # a notice is printed once in a process
    capsys.readouterr()
    checks.check(config)
    is_said = "--label-smoothing has no effect" in capsys.readouterr().err
    assert tensors.equal(*updates) == algorithm.has_own_loss == is_said
