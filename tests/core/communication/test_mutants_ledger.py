"""The byte ledger: sums and the formula of the break-even."""

from __future__ import annotations

import pytest

from fedkd.core.communication.ledger import SerializedBytes, Traffic, break_even, is_soft_label


def test_traffic_adds_up_column_by_column():
    assert Traffic(1, 20, 300.5) + Traffic(4000, 50000, 600000.0) == Traffic(4001, 50020, 600300.5)
    assert Traffic() == Traffic(0, 0, 0.0)


def test_serialized_bytes_add_up_column_by_column():
    total = SerializedBytes(1, 20, 300, 4000) + SerializedBytes(5, 60, 700, 8000)
    assert total == SerializedBytes(6, 80, 1000, 12000)
    assert SerializedBytes() == SerializedBytes(0, 0, 0, 0)


def test_the_break_even_is_where_both_take_as_many_bytes():
    samples = break_even(weights=1000, weight_bits=32.0, classes=10, label_bits=8.0)
    assert samples == 400.0
    assert samples * 10 * 8 == 1000 * 32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("probs", True),
        ("logits", True),
        ("client/3/probs", True),
        ("3/logits", True),
        ("probs/weight", False),
        ("logits/0/weight", False),
        ("myprobs", False),
        ("Logits", False),
        ("", False),
    ],
)
def test_soft_labels_are_known_by_the_end_of_their_name(name, expected):
    assert is_soft_label(name) is expected
