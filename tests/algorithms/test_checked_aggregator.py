"""What a user-defined aggregator returns is checked; built-in ones are not, and legitimate ones pass."""

from __future__ import annotations

import pytest
import torch

from fedkd.algorithms import aggregators
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import PluginError
from fedkd.core.soft_labels import mean_probs
from fedkd.simulate import simulate
from tests.conftest import tiny

OWN = """
import torch

def probs(logits, weights): return logits.mean(0).softmax(-1)
def half(logits, weights): return logits.mean(0).softmax(-1).to(torch.float16).float()
def short(logits, weights): return logits.mean(0).softmax(-1)[:1]
def text(logits, weights): return "probs"
def unnormalized(logits, weights): return logits.softmax(-1).sum(0)
def one_row(logits, weights):
    out = logits.mean(0).softmax(-1)
    out[3] *= 1.01
    return out
def logits(logits, weights): return logits.mean(0)
def negative(logits, weights):
    out = logits.mean(0).softmax(-1)
    out[0, 0], out[0, 1] = -0.1, out[0, 1] + out[0, 0] + 0.1
    return out
def nan(logits, weights): return logits.mean(0).softmax(-1) * float("nan")
"""
LOGITS = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("short", "returned [1, 5]"), ("text", "returned str"), ("unnormalized", "sums to 3")),
        *(("one_row", "sums to 1.01"), ("logits", "returned -"), ("negative", "returned -0.1"), ("nan", "not finite")),
    ],
)
def test_what_is_no_distribution_is_refused(own, name, reason):
    text = f"{own}:{name}"
    with pytest.raises(PluginError) as error:
        aggregators.named(text)(LOGITS, torch.ones(3, 1))
    assert str(error.value).startswith(f"--aggregator {text} returned")
    assert reason in str(error.value)


@pytest.mark.parametrize("name", ["probs", "half"])
def test_a_distribution_passes_unchanged(own, name):
    expected = LOGITS.mean(0).softmax(-1)
    returned = aggregators.named(f"{own}:{name}")(LOGITS, torch.ones(3, 1))
    torch.testing.assert_close(returned, expected, atol=5e-4 * (name == "half"), rtol=0)


@pytest.mark.parametrize("name", CATALOG["aggregator"])
def test_built_in_ones_pass_the_check_and_are_not_wrapped(name):
    bound = aggregators.named(name)
    assert bound.func is not aggregators._checked
    aggregators._checked(name, bound, 30 * LOGITS, torch.ones(3, 1))


def test_a_run_ends_with_the_name_of_the_aggregator(own, tmp_path):
    with pytest.raises(PluginError, match=r"mine\.py:unnormalized returned a row that sums to 3"):
        simulate(tiny(aggregator=f"{own}:unnormalized", out=str(tmp_path / "run")))
    assert aggregators.named("mean-probs").func is mean_probs
