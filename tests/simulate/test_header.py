"""What is printed before a method starts."""

from __future__ import annotations

import pytest

from fedkd.simulate import header
from fedkd.simulate.experiment import prepare
from tests.conftest import tiny


@pytest.mark.parametrize(
    ("algorithm", "codec", "shown"),
    [
        ("ensemble", "float32", "uplink per client and round: logits [40, 10], 1.6 kB as float32"),
        ("ensemble", "uint8", "; uplink encoded by uint8 (soft labels only)"),
        ("fedavg", "float16", "; uplink encoded by float16"),
        ("fedavg", "bits:bits=1", "; uplink not encoded, since bits:bits=1 applies to soft labels only"),
        ("fedproto", "uint8", "; uplink not encoded, since uint8 applies to soft labels only"),
        ("local", "uint8", "no communication"),
    ],
)
def test_a_codec_is_named_where_it_has_an_effect(algorithm, codec, shown):
    line = header.uplink(prepare(tiny(algorithm=algorithm, uplink_codec=codec)))
    assert line.endswith(shown)
