"""Each method gives the same results if its clients compute together, up to rounding."""

from __future__ import annotations

import pytest
import torch

from fedkd.core.catalog import CATALOG
from fedkd.simulate.experiment import prepare
from fedkd.training import together, turns
from tests.algorithms.test_methods import one_round
from tests.conftest import MENTORS, QUICK, tiny

# With adapters, which are trained too: of losses that are means over samples, and of others.
TERMS = [f"mentor:model=cnn:width=4,term={term}" for term in ("features", "contrastive")]
NAMES = sorted({QUICK.get(name, name) for name in CATALOG["algorithm"]} - {MENTORS["mentor"]}) + TERMS
# Small rates: rounding decides whether a ReLU passes a value on, and the sign of a step of Adam.
SMALL = {"validation": 1300, "learning_rate": 1e-3, "distill_learning_rate": 1e-5, "partitioner": "dirichlet:alpha=1"}
LIMIT = 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_clients_that_compute_together_get_what_they_get_on_their_own(name, monkeypatch):
    monkeypatch.setattr("fedkd.simulate.experiment.FEWEST_STEPS", 0)
    experiment = prepare(tiny(algorithm=name, **SMALL))
    algorithm, setup = experiment.algorithm, experiment.setup
    run, alone, in_round, executed = turns.run, together._alone, [], []

    def noted(*arguments):
        in_round.append(1)
        try:
            return run(*arguments)
        finally:
            in_round.clear()

    monkeypatch.setattr(turns, "run", noted)
    monkeypatch.setattr(together, "_alone", lambda request: (executed.extend(in_round), alone(request))[1])
    monkeypatch.setattr(together, "pays", lambda _: False)
    first = one_round(experiment, algorithm, 1, algorithm.initial_state(setup), {})
    for number, state, memories in ((1, algorithm.initial_state(setup), {}), (2, first[2], first[1])):
        results = []
        for is_together in (False, True):
            monkeypatch.setattr(together, "pays", lambda _, answer=is_together: answer)
            updates, new, _ = one_round(experiment, algorithm, number, state, memories)
            results.append({(k, n): t for k, u in updates.items() for n, t in (*u.tensors.items(), *new[k].items())})
        assert results[0].keys() == results[1].keys()
        for key, tensor in results[0].items():
            assert results[1][key].shape == tensor.shape, key
            assert torch.allclose(results[1][key].double(), tensor.double(), atol=LIMIT, rtol=0), key
    assert not executed  # all that clients compute is in stacks
