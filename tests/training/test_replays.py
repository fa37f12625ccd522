"""The recorder of training steps for a CPU, with which other tests show what would be wrong in a CUDA graph."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.training.replays import Replay

NUMBERS, BATCHES = itertools.count(), [torch.ones(2), torch.ones(2)]
PLACE, TOTAL = torch.zeros(1, dtype=torch.int64), torch.zeros(2)


def _on_the_device() -> None:
    TOTAL.add_(torch.stack(BATCHES).index_select(0, PLACE)[0] * 2)
    PLACE.add_(1)


@pytest.mark.parametrize(
    "step",
    [
        lambda: TOTAL.mul_(0.1 * next(NUMBERS)),
        lambda: TOTAL.add_(BATCHES[next(NUMBERS) % 2]),
        lambda: TOTAL.add_(torch.ones(2) if next(NUMBERS) % 2 else TOTAL),
        lambda: TOTAL.add_(torch.tensor([1.0, 2.0])),
        lambda: TOTAL.add_(torch.rand(2)),
        lambda: TOTAL.sum().item(),
        lambda: TOTAL[TOTAL > 0].sum(),
    ],
    ids=["a number", "a batch", "a branch", "a constant of the host", "a draw", "a copy to the host", "a mask"],
)
def test_what_a_graph_would_not_repeat_is_refused(step):
    def replayed():
        replay = Replay(step)
        for _ in range(2):
            replay()

    with pytest.raises(AssertionError):
        replayed()


def test_what_is_on_the_device_may_change():
    TOTAL.zero_()
    replay = Replay(_on_the_device)
    for _ in range(2):
        replay()
    assert TOTAL.tolist() == [4, 4]
