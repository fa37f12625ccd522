from __future__ import annotations

from contextlib import nullcontext

import torch

from fedkd.core import seeds
from fedkd.core.seeds import seeded
from fedkd.training import turns


def counting(requests: int, log: list):
    """A task that asks so many times."""

    def task():
        assert turns.is_task()
        seen = []
        for number in range(requests):
            log.append((requests, number))
            seen.append(turns.ask((requests, number)))
        return seen

    return task


def test_what_all_tasks_ask_for_is_executed_at_once_in_their_order():
    executed, log = [], []

    def execute(requests):
        executed.append(list(requests))
        return [10 * a + b for a, b in requests]

    results = turns.run([counting(n, log) for n in (2, 0, 3, 1)], execute)
    assert results == [[20, 21], [], [30, 31, 32], [10]]
    assert executed == [[(2, 0), (3, 0), (1, 0)], [(2, 1), (3, 1)], [(3, 2)]]
    assert log == [request for batch in executed for request in batch]
    assert not turns.is_task()


def test_an_exception_is_that_of_one_task():
    def catching():
        try:
            turns.ask("bad")
        except ValueError:
            return turns.ask("good")

    def failing():
        raise KeyError("own")

    def execute(requests):
        return [ValueError(request) if request == "bad" else request for request in requests]

    results = turns.run([catching, lambda: turns.ask("bad"), lambda: turns.ask("good"), failing], execute)
    assert results[0] == results[2] == "good"
    assert isinstance(results[1], ValueError)
    assert isinstance(results[3], KeyError)


def test_each_task_has_torchs_random_numbers_to_itself():
    """Also if it asks in the middle of a block with a seed."""

    def drawing(seed):
        def task():
            with seeded(seed):
                first = torch.rand(3)
                turns.ask(seed)
                return first.tolist(), torch.rand(3).tolist()

        return task

    def execute(requests):
        torch.rand(100)
        return requests

    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    alone = [turns.run([drawing(seed)], execute)[0] for seed in range(3)]
    assert turns.run([drawing(seed) for seed in range(3)], lambda requests: requests) == alone
    torch.manual_seed(5)
    turns.run([drawing(seed) for seed in range(3)], lambda requests: requests)
    assert torch.equal(torch.rand(1), before)


def test_devices_are_named_where_random_numbers_are_restored(monkeypatch):
    """PyTorch warns on a machine with several GPUs if they are not."""
    named = []
    monkeypatch.setattr(seeds, "_gpus", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (named.append(list(devices)), nullcontext())[1])
    with seeds.seeded(3):
        pass
    turns.run([lambda: turns.ask(0)], lambda requests: requests)
    assert len(named) > 2
    assert all(devices == [0, 1] for devices in named)
