from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.core import seeds


def test_the_same_name_gives_the_same_seed_on_every_machine():
    assert seeds.derive(0, "client", 1, 2) == 8012930457847641335


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 50))
def test_neighbors_share_nothing(seed: int, round_: int, client: int):
    here = seeds.derive(seed, round_, client)
    others = [seeds.derive(seed + 1, round_, client), seeds.derive(seed, round_ + 1, client)]
    others += [seeds.derive(seed, round_, client + 1), seeds.derive(seed, client, round_)] if round_ != client else []
    assert here not in others
    assert 0 <= here < 2**63


def test_a_number_and_its_text_are_different_names():
    assert seeds.derive(0, 1) != seeds.derive(0, "1")


def test_seeded_restores_the_stream_it_found():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeds.seeded(1):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with seeds.seeded(1):
        assert torch.equal(torch.rand(2), first)
