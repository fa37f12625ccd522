"""In float32, a stack is as close to the plain loop in float64 as the plain loop in float32 is.

The two are not compared with each other: a rounding may decide whether a ReLU passes a value on, and BatchNorm divides
by what may be nearly zero, so that the plain loop in float32 itself is far from float64 with some deep networks.
`test_stack` compares a stack with the plain loop in float64, to 1e-10.

The figures of decision 18: python -m pytest -n 0 -s -m "slow or not slow" tests/training/test_stack_rounding.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkd.training import models
from tests.conftest import slow
from tests.training.test_stack import SIZES, difference, jobs, own_networks, plain, stacked

LIMIT = 1e-5  # or ten times as far as the plain loop
SMALL = ["cnn:width=8", "cnn:width=8,norm=batch", "resnet8:width=8", "resnet8:width=8,norm=batch", "resnet20:width=8"]
SMALL += ["resnet20:width=8,norm=batch", "vit-tiny:width=32,depth=2"]
DEEP = ["resnet32:width=8", "resnet56:width=8", "resnet56:width=8,norm=batch"]
TORCHVISION = ["resnet", "mobilenet_v2", "mobilenet_v3_small"]


def narrow(name: str) -> nn.Module:
    """A small network of torchvision."""
    library = pytest.importorskip("torchvision").models
    if name == "resnet":
        return library.ResNet(library.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return library.get_model(name, width_mult=0.25, num_classes=10)


@pytest.mark.parametrize("spec", [*SMALL, *map(slow, [*DEEP, *TORCHVISION])])
def test_after_two_epochs_of_clients_of_all_sizes(spec, monkeypatch):
    if spec in TORCHVISION:
        monkeypatch.setattr(models, "build", lambda *_: narrow(spec))
    work = jobs(SIZES, pixels=16 if spec == "resnet" else 8)
    exact, single = own_networks(spec, torch.float64), own_networks(spec)
    network = stacked(single, work, rate=1e-3).network
    for own, dtype in ((exact, torch.float64), (single, torch.float32)):
        for each, job in zip(own, work, strict=True):
            plain(each, job, dtype=dtype, rate=1e-3)
    pairs = zip(single, exact, strict=True)
    rounding = max(
        (one.state_dict()[name] - tensor).abs().max().item()
        for one, other in pairs
        for name, tensor in other.state_dict().items()
    )
    of_stack = difference(network, exact)
    print(f"{spec}: {of_stack:.1e} from float64, the plain loop {rounding:.1e}")
    assert of_stack <= max(LIMIT, 10 * rounding)
    if "norm=batch" not in spec and spec not in TORCHVISION:
        assert of_stack <= LIMIT
