"""What the server refuses, at its limits and word for word."""

from __future__ import annotations

import math

import pytest
import torch

from fedkd.algorithms.base import Update
from fedkd.core.communication.validation import MAX_ABS_LOGIT, MAX_ABS_METRIC, SUM_TOLERANCE, validate_update
from fedkd.core.tensors import Int64, UInt8

PAIR = {"x": (2, 3)}


def fault(declared, examples=1, metrics=None, **tensors):
    return validate_update(Update(tensors, examples, metrics or {}), declared)


def test_names_must_be_the_declared_ones():
    assert fault(PAIR, x=torch.zeros(2, 3)) == ""
    expected = "sent no b, x and undeclared a, y"
    assert fault({"x": (1,), "b": (1,)}, y=torch.zeros(1), a=torch.zeros(1)) == expected
    assert fault(PAIR) == "sent no x"


@pytest.mark.parametrize(
    ("examples", "metrics", "refused"),
    [
        (1, {}, False),
        (0, {}, True),
        (-1, {}, True),
        (1, {"loss": MAX_ABS_METRIC, "other": -MAX_ABS_METRIC}, False),
        (1, {"loss": 1.0, "other": math.nextafter(MAX_ABS_METRIC, math.inf)}, True),
        (1, {"loss": -math.inf, "other": 1.0}, True),
        (1, {"loss": math.nan}, True),
        (0, {"loss": 1.0}, True),
    ],
)
def test_examples_are_positive_and_metrics_finite(examples, metrics, refused):
    reason = "sent no examples, or a metric that is not finite" if refused else ""
    assert fault({}, examples, metrics) == reason


def test_limits_that_are_documented():
    assert (MAX_ABS_LOGIT, MAX_ABS_METRIC, SUM_TOLERANCE) == (1e6, 1e30, 5e-3)


@pytest.mark.parametrize(
    ("declared", "shape", "fits"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), (2, 4), False),
        ((2, 3), (3, 3), False),
        ((2, 3), (2,), False),
        ((2,), (2, 3), False),
        ((-2, 3), (0, 3), True),
        ((-2, 3), (1, 3), True),
        ((-2, 3), (2, 3), True),
        ((-2, 3), (3, 3), False),
        ((-2, -3), (1, 4), False),
        ((-1,), (1,), True),
        ((0, 3), (0, 3), True),
        ((0, 3), (1, 3), False),
        ((), (), True),
    ],
)
def test_shapes_are_the_declared_ones_or_smaller_where_they_may_be(declared, shape, fits):
    expected = "" if fits else f"sent x of shape {shape} instead of {declared}"
    assert fault({"x": declared}, x=torch.zeros(shape)) == expected


@pytest.mark.parametrize(
    ("declared", "dtype", "name"),
    [
        ((2,), torch.float32, "torch.float32"),
        (Int64((2,)), torch.int64, "torch.int64"),
        (UInt8((2,)), torch.uint8, "torch.uint8"),
    ],
)
def test_types_are_the_declared_ones(declared, dtype, name):
    assert fault({"x": declared}, x=torch.zeros(2, dtype=dtype)) == ""
    for other in (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64, torch.uint8):
        if other != dtype:
            assert fault({"x": declared}, x=torch.zeros(2, dtype=other)) == f"sent x of type {other} instead of {name}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_enough(value):
    assert fault({"x": (3,)}, x=torch.tensor([0.0, value, 1.0])) == "sent x with values that are not finite"


def test_logits_have_a_limit_and_other_tensors_none():
    limit = torch.tensor([0.0, MAX_ABS_LOGIT, -MAX_ABS_LOGIT])
    assert fault({"logits": (3,)}, logits=limit) == ""
    for sign in (1, -1):
        beyond = torch.tensor([0.0, sign * (MAX_ABS_LOGIT + 1), 1.0])
        assert fault({"logits": (3,)}, logits=beyond) == "sent logits larger than 1,000,000"
        assert fault({"x": (3,)}, x=beyond) == ""


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        ([[0.5, 0.5], [1.0, 0.0]], False),
        ([[0.5, 0.504], [0.5, 0.496]], False),
        ([[0.5, 0.5], [0.5, 0.506]], True),
        ([[0.5, 0.494], [0.5, 0.5]], True),
        ([[0.5, 0.5], [1.5, -0.5]], True),
        ([[0.7, 0.7], [0.3, 0.3]], True),  # whose columns sum to one
        ([[1.0, 1.0], [0.0, 1.0]], True),
    ],
)
def test_probs_are_rows_of_distributions(rows, refused):
    expected = "sent probs that are not distributions" if refused else ""
    assert fault({"probs": (2, 2)}, probs=torch.tensor(rows)) == expected
    assert fault({"x": (2, 2)}, x=torch.tensor(rows)) == ""


def test_a_fault_of_the_second_tensor_is_seen():
    declared = {"x": (1,), "probs": (1, 2)}
    tensors = {"x": torch.zeros(1), "probs": torch.tensor([[0.2, 0.2]])}
    assert fault(declared, **tensors) == "sent probs that are not distributions"
