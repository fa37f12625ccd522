"""Bytes that papers state, exactly: those of float32 values that clients send in a round, without headers."""

from __future__ import annotations

from math import prod

import pytest

from fedkd.simulate.experiment import prepare
from tests.conftest import tiny


def uplink(algorithm: str, clients: int, rows: int) -> int:
    """The bytes that all clients send in a round, with ten classes and so many proxy samples."""
    data = {"dataset": f"noise:size={rows + 10 * clients},pixels=8", "proxy": f"holdout:size={rows}"}
    experiment = prepare(tiny(algorithm=algorithm, clients=clients, partitioner="iid", **data))
    assert experiment.setup.classes == 10
    specs = [experiment.algorithm.upload_spec(experiment.setup, client, 1) for client in range(clients)]
    return sum(4 * prod(shape) for spec in specs for shape in spec.values())


@pytest.mark.parametrize(
    ("rows", "kilobytes"), [(5_000, 3125), (10_000, 6250), (15_000, 9375), (20_000, 12_500), (25_000, 15_625)]
)
@pytest.mark.parametrize("algorithm", ["fedmd", "dsfl", "cronus"])
def test_logits_of_sixteen_clients(algorithm, rows, kilobytes):
    """Cheng et al., 2021 (FedGEMS), table 6: public samples, and kB (of 1,024 bytes) of logits in a round."""
    assert uplink(algorithm, 16, rows) == 1024 * kilobytes


@pytest.mark.parametrize("algorithm", ["ensemble", "cfd:uplink_bits=32"])
def test_logits_of_a_client_on_stl10(algorithm):
    """Sattler et al., 2022 (CFD): federated distillation on 80,000 samples takes 32.00 MB in 10 rounds."""
    assert 10 * uplink(algorithm, 1, 80_000) == 32_000_000
