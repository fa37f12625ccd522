from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkd.core import tensors


def test_put_and_take_are_inverse():
    inner = {"a/b": torch.ones(2), "c": torch.zeros(1)}
    held = {"round": torch.tensor(1), **tensors.put("student", inner), **tensors.put("students", inner)}
    assert tensors.equal(tensors.take("student", held), inner)


def test_weighted_mean_is_numpys_average_in_the_type_of_its_input(generator: torch.Generator):
    many = [{"w": torch.randn(3, 4, generator=generator), "n": torch.tensor(k + 1)} for k in range(5)]
    weights = [1, 2, 3, 4, 10]
    mean = tensors.weighted_mean(many, weights)
    expected = np.average([m["w"].numpy().astype(np.float64) for m in many], axis=0, weights=weights)
    np.testing.assert_allclose(mean["w"].numpy(), expected, rtol=1e-6)
    assert mean["w"].dtype == torch.float32
    assert mean["n"].dtype == torch.int64


def test_weighted_mean_of_one_is_that_one(generator: torch.Generator):
    one = {"w": torch.randn(100, generator=generator)}
    assert tensors.equal(tensors.weighted_mean([one], [7]), one)
    assert tensors.weighted_mean([one, one, one], [1, 1, 1])["w"].allclose(one["w"], rtol=1e-7)


def test_equality_sees_names_types_shapes_and_bits():
    base = {"a": torch.zeros(4)}
    for other in (
        {"b": torch.zeros(4)},
        {"a": torch.zeros(4).double()},
        {"a": torch.zeros(2, 2)},
        {"a": -torch.zeros(4)},
    ):
        assert not tensors.equal(base, other)
    assert tensors.equal(base, {"a": torch.zeros(4)})


def test_files_come_back_to_the_bit(tmp_path, generator: torch.Generator):
    held = {"w": torch.randn(3, 3, generator=generator).t(), "n": torch.tensor(3)}
    tensors.save(held, tmp_path / "x.safetensors")
    assert tensors.equal(tensors.load(tmp_path / "x.safetensors"), held)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"not a safetensors file")
    with pytest.raises(Exception, match=r"(?i)header|invalid|safetensor"):
        tensors.load(tmp_path / "x")


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path):
    """So that a full disk is answered as everywhere else; what was there stays, and nothing is left beside it."""
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="No such file"):
        tensors.save({"x": torch.zeros(1)}, tmp_path / "missing" / "x.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
