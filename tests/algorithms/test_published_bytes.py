"""Bytes that papers state, exactly: those of float32 values that clients send in a round, without headers."""

from __future__ import annotations

from math import prod

import pytest

from fedkd.simulate.experiment import prepare
from fedkd.training import models
from tests.conftest import simulated, tiny


def uplink(algorithm: str, clients: int, rows: int, model: str = "cnn:width=8", pixels: int = 8) -> int:
    """The bytes that all clients send in a round, with ten classes and so many proxy samples."""
    data = {"dataset": f"noise:size={rows + 10 * clients},pixels={pixels}", "proxy": f"holdout:size={rows}"}
    experiment = prepare(tiny(algorithm=algorithm, model=model, clients=clients, partitioner="iid", **data))
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


@pytest.mark.parametrize(
    ("model", "rounds", "megabytes"), [("vgg16", 11, "671.16"), ("torchvision:resnet18", 34, "1520.70")]
)
def test_weights_of_a_client(model, rounds, megabytes):
    """Sattler et al., 2022 (CFD): FedAvg of VGG-16 (671.16 MB in 11 rounds) and of ResNet-18 (1520.70 MB).

    Parameters only, without the statistics of batch normalization, which fedkd's `fedavg` sends, too.
    """
    module = models.build(model, 10, "group")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert f"{rounds * 4 * parameters / 1e6:.2f}" == megabytes
    if model == "vgg16":
        assert uplink("fedavg", 1, 20, model, pixels=32) == 4 * parameters


@pytest.mark.parametrize(
    ("algorithm", "rounds", "published"),
    [
        ("fedmd", 32, "976.56"),
        ("fedmd", 180, "5493.16"),
        ("cronus", 20, "610.35"),
        ("cronus", 81, "2471.92"),
        ("dsfl", 121, "3692.63"),
    ],
)
def test_megabytes_to_an_accuracy_are_whole_rounds(algorithm, rounds, published, tmp_path):
    """Cheng et al., 2021 (FedGEMS), table 4: MB (of 2^20 bytes) of 16 clients and 25,000 public samples.

    Soft labels in both directions, as many bytes down as up: those of a run with 40 samples and 3 clients, as the
    second of two rounds sends them (in the first one, there are no labels to send down).
    """
    _, row = simulated(tmp_path / "run", algorithm=algorithm, proxy="holdout:size=40", clients=3)
    up, down = row["uplink_float32_bytes"], row["downlink_float32_bytes"]
    assert up == 3 * 40 * 10 * 4
    assert 0 < down - up <= 3 * 16, "besides the soft labels, the number of their round"
    assert f"{rounds * 2 * up * 16 / 3 * 25_000 / 40 / 2**20:.2f}" == published


def test_feature_maps_of_private_samples():
    """Cheng et al., 2021 (FedGEMS), table 4: FedGKT takes 31250 MB to 40%: 20 rounds of 25,000 private samples.

    Those are the bytes of feature maps of 64 kB; with "0.039 kB" of logits for each sample (appendix B.2) there would
    be more. Ours has these sizes, and a label of eight bytes.
    """
    options = {"model": "bottleneck-resnet", "dataset": "noise:size=60,pixels=32", "proxy": "holdout:size=10"}
    experiment = prepare(tiny(algorithm="fedgkt:private-features=true,samples=1", **options))
    shapes = experiment.algorithm.upload_spec(experiment.setup, 0, 1)
    sizes = {name: abs(prod(shape)) * 4 for name, shape in shapes.items() if name != "labels"}
    assert sizes == {"maps": 64 * 1024, "outputs": 40}
    assert 20 * 25_000 * sizes["maps"] == 31250 * 2**20
    assert f"{sizes['outputs'] / 1024:.3f}" == "0.039"
