from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from fedkd.core import seeds
from fedkd.data import corruptions
from fedkd.data.readers import Images
from fedkd.data.scaling import Scaling
from fedkd.training import models, quality
from fedkd.training.quality import (
    TEACHER,
    Candidate,
    agreement,
    ece,
    evaluate,
    multiply_adds,
    parameters,
    reliability,
)

SCALING = Scaling((120.0, 125.0, 130.0), (60.0, 61.0, 62.0))


def confident(classes: torch.Tensor, probability: float, among: int = 2) -> torch.Tensor:
    """Logits [N, C] that give ``probability`` to these classes and share the rest equally."""
    probs = torch.full((len(classes), among), (1 - probability) / (among - 1), dtype=torch.float64)
    return probs.scatter_(1, classes[:, None], probability).log()


def test_agreement_is_that_of_classes_not_of_logits():
    logits = torch.tensor([[1.0, 0.0], [0.0, 9.0], [3.0, 2.0], [0.0, 0.1]])
    other = torch.tensor([[5.0, 4.0], [0.0, 0.1], [2.0, 3.0], [1.0, 9.0]])
    assert agreement(logits, other) == 0.75
    assert agreement(logits, -logits) == 0


def test_ece_by_hand():
    zeros = torch.zeros(10, dtype=torch.int64)
    assert ece(confident(zeros, 1 - 1e-12), zeros + 1) == pytest.approx(1), "always certain and wrong"
    assert ece(confident(zeros, 1 - 1e-12), zeros) == pytest.approx(0, abs=1e-9)
    half = torch.tensor([0, 1] * 5)
    assert ece(confident(zeros, 0.7), half) == pytest.approx(0.2)
    # Two bins whose errors do not cancel: confidence 0.9 and always correct, 0.7 and correct half of the time.
    both = torch.cat([confident(zeros, 0.9), confident(zeros, 0.7)])
    assert ece(both, torch.cat([zeros, half])) == pytest.approx((0.1 + 0.2) / 2)
    assert ece(both, torch.cat([zeros, half]), bins=1) == pytest.approx(0.8 - 0.75)


def test_labels_drawn_from_the_probabilities_are_calibrated(generator):
    logits = 2 * torch.randn(200_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    assert ece(logits, labels) < 0.005
    assert ece(3 * logits, labels) > 0.1, "overconfident"


def slow_ece(logits, labels, bins):
    total = 0.0
    for number in range(bins):
        members = []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            exponents = [math.exp(value) for value in row]
            confidence = max(exponents) / sum(exponents)
            if number / bins < confidence <= (number + 1) / bins:
                members.append((confidence, row.index(max(row)) == label))
        if members:
            confidences, right = zip(*members, strict=True)
            total += abs(sum(right) - sum(confidences)) / len(labels)
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_ece_against_a_slow_loop(bins, generator):
    logits = 3 * torch.randn(300, 4, generator=generator)
    labels = torch.randint(4, (300,), generator=generator)
    assert ece(logits, labels, bins) == pytest.approx(slow_ece(logits, labels, bins), abs=1e-12)
    diagram = reliability(logits, labels, bins)
    assert sum(diagram.share) == pytest.approx(1)
    mean = sum(s * a for s, a in zip(diagram.share, diagram.accuracy, strict=True) if a is not None)
    assert mean == pytest.approx((logits.argmax(-1) == labels).double().mean().item())


def test_a_bin_includes_its_upper_edge():
    diagram = reliability(torch.zeros(3, 2), torch.tensor([0, 0, 1]), 4)  # 0.5 of 1, which is the end of the second bin
    assert diagram.share == [0, 1, 0, 0]
    assert diagram.confidence == [None, 0.5, None, None]
    assert diagram.accuracy[1] == pytest.approx(2 / 3)


def cnn_by_hand() -> int:
    return 32**2 * 9 * 3 * 32 + 16**2 * 9 * 32 * 64 + 8**2 * 9 * 64 * 64 + 64 * 16 * 10


def resnet20_by_hand() -> int:
    """40.8 million, as the literature has it where shortcuts are convolutions."""
    layer = 32**2 * 9 * 16 * 16  # the same in each stage: half the side, twice the width
    narrowing = [side**2 * (9 + 1) * width // 2 * width for side, width in ((16, 32), (8, 64))]  # with its shortcut
    return 32**2 * 9 * 3 * 16 + (6 + 5 + 5) * layer + sum(narrowing) + 64 * 10


def vit_by_hand() -> int:
    tokens, width = 64, 96
    linear = tokens * width * (3 * width + width + 4 * width + 4 * width)
    attention = 2 * tokens * tokens * width  # scores, then the mean of the values
    return tokens * 48 * width + 4 * (linear + attention) + width * 10


def gru_by_hand() -> int:
    return 2 * 32 * 3 * 128 * (96 + 128) + 256 * 10  # directions, rows, gates, width, inputs; the head


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("cnn", cnn_by_hand()),
        ("resnet20", resnet20_by_hand()),
        ("vit-tiny", vit_by_hand()),
        ("row-gru", gru_by_hand()),
    ],
)
def test_multiply_adds_by_hand(model, expected):
    for norm in ("group", "batch"):
        assert multiply_adds(models.build(model, 10, norm), 32) == expected


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.LSTM(96, 16, batch_first=True)

    def forward(self, x):
        return self.read(x.permute(0, 2, 3, 1).flatten(2))[0][:, -1]


def test_multiply_adds_include_fused_kernels_and_grow_with_the_image():
    assert multiply_adds(Reading(), 32) == 32 * 4 * 16 * (96 + 16)
    small, large = (multiply_adds(nn.Conv2d(3, 5, 3, padding=1), pixels) for pixels in (8, 16))
    assert (small, large) == (8 * 8 * 9 * 15, 16 * 16 * 9 * 15)


def test_counting_leaves_the_module_and_the_backends_alone():
    module, flag = models.build("cnn:width=8", 10, "batch").train(), torch.backends.mkldnn.enabled
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    multiply_adds(module, 32)
    assert module.training
    assert torch.backends.mkldnn.enabled == flag
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_parameters_are_those_of_the_models_docstrings():
    assert parameters(models.build("cnn", 10, "batch")) == 66_730
    assert parameters(models.build("row-gru", 10, "group")) == 176_138


def test_latency_counts_calls_and_orders_quartiles():
    calls = []
    times = quality.latency(lambda: calls.append(1), 20)
    assert len(calls) > 20, "with warm-up calls"
    assert 0 < times["low"] <= times["median"] <= times["high"]


@pytest.fixture(scope="module")
def test_images() -> Images:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(60, 3, 4, 4, generator=generator) * 255
    pixels = nn.functional.interpolate(coarse, 32, mode="bilinear").permute(0, 2, 3, 1).to(torch.uint8)
    return Images(pixels.contiguous(), torch.randint(10, (60,), generator=generator), 10)


def candidates(tmp_path, *names: str) -> dict[str, Candidate]:
    path = tmp_path / "student.safetensors"
    path.write_bytes(bytes(1234))
    created = {}
    for index, name in enumerate(names):
        with seeds.seeded(index):
            created[name] = Candidate(models.build("cnn:width=8", 10, "group"), SCALING, None if index else path)
    return created


def untimed(results):
    return {name: {k: v for k, v in result.items() if k != "latency_ms"} for name, result in results.items()}


def test_the_evaluation_has_all_measurements(tmp_path, test_images):
    results = evaluate(candidates(tmp_path, "student", TEACHER), test_images, seed=0, count=40, repeats=2)
    assert json.loads(json.dumps(results)) == results, "keys are strings"
    student, teacher = results["student"], results[TEACHER]
    assert student.keys() == teacher.keys()
    assert list(student["corruptions"]) == ["noise", "blur", "contrast", "pixelate"]
    assert all(list(row) == ["1", "2", "3", "4", "5"] for row in student["corruptions"].values())
    values = [value for row in student["corruptions"].values() for value in row.values()]
    assert student["corruption_accuracy"] == pytest.approx(sum(values) / 20)
    shares = [student[key] for key in ("accuracy", "ece", "agreement", "shifted_accuracy", "uncorrupted_accuracy")]
    assert all(0 <= share <= 1 for share in shares + values)
    assert teacher["agreement"] is None
    assert (student["images"], student["corrupted_images"], student["shifted_images"]) == (60, 40, 60)
    assert (student["bytes"], teacher["bytes"]) == (1234, None)
    assert student["parameters"] == parameters(candidates(tmp_path, "student")["student"].module)
    assert student["latency_ms"].keys() == {"1", "64"}
    assert student["latency_ms"]["64"].keys() == {"median", "low", "high"}


def test_the_evaluation_agrees_with_its_parts(tmp_path, test_images):
    created = candidates(tmp_path, "student", TEACHER)
    results = evaluate(created, test_images, seed=3, kinds=["noise"], strengths=[5], count=40, repeats=1)
    seen = SCALING(test_images.pixels)
    with torch.no_grad():
        mine, theirs = (created[name].module(seen) for name in ("student", TEACHER))
        noisy = created["student"].module(SCALING(corruptions.corrupt(test_images.pixels[:40], "noise", 5, 3)))
    right = (mine.argmax(-1) == test_images.labels).double()
    assert results["student"]["accuracy"] == pytest.approx(right.mean().item())
    assert results["student"]["uncorrupted_accuracy"] == pytest.approx(right[:40].mean().item())
    assert results["student"]["agreement"] == agreement(mine, theirs)
    assert results["student"]["ece"] == pytest.approx(ece(mine, test_images.labels), abs=1e-5)
    accuracy = (noisy.argmax(-1) == test_images.labels[:40]).double().mean().item()
    assert results["student"]["corruptions"] == {"noise": {"5": pytest.approx(accuracy)}}


class Sum(nn.Module):
    """The class is the last digit of the sum of all pixels, so that any change of the image changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return nn.functional.one_hot(x.double().sum((1, 2, 3)).long() % 10, 10).float()


def test_the_evaluation_uses_the_corruptions_of_the_seed(test_images):
    bare, pixels = Scaling((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), test_images.pixels
    options = {"kinds": ["noise"], "strengths": [4, 5], "repeats": 1}
    noisy = Sum()(bare(corruptions.corrupt(pixels, "noise", 5, 3))).argmax(-1)
    results = evaluate({"a": Candidate(Sum(), bare)}, Images(pixels, noisy, 10), seed=3, **options)["a"]
    assert results["corruptions"]["noise"]["5"] == 1
    assert max(results["corruptions"]["noise"]["4"], results["accuracy"], results["shifted_accuracy"]) < 0.5
    moved = Sum()(bare(corruptions.transformed(pixels, 3))).argmax(-1)
    results = evaluate({"a": Candidate(Sum(), bare)}, Images(pixels, moved, 10), seed=3, **options)["a"]
    assert results["shifted_accuracy"] == 1
    assert results["accuracy"] < 0.5


def test_the_evaluation_is_reproducible_except_for_the_latency(tmp_path, test_images):
    created = candidates(tmp_path, "student", TEACHER)
    options = {"count": 40, "strengths": [1, 5], "repeats": 1}
    first = untimed(evaluate(created, test_images, seed=0, **options))
    assert untimed(evaluate(created, test_images, seed=0, **options)) == first
    shuffled = untimed(evaluate(dict(reversed(created.items())), test_images, seed=0, **options))
    assert shuffled == first, "the order of candidates does not matter"


def test_the_evaluation_accepts_a_shifted_set_and_needs_no_teacher(tmp_path, test_images):
    created = candidates(tmp_path, "baseline")
    seen = created["baseline"].module(SCALING(test_images.pixels)).argmax(-1)
    wrong = Images(test_images.pixels[:30], (seen[:30] + 1) % 10, 10)
    results = evaluate(created, test_images, wrong, seed=0, strengths=[], repeats=1)["baseline"]
    assert (results["shifted"], results["shifted_images"], results["shifted_accuracy"]) == ("given", 30, 0)
    assert results["agreement"] is None
    assert results["corruption_accuracy"] is None
    right = Images(test_images.pixels, seen, 10)
    here = evaluate(created, right, seed=0, strengths=[], repeats=1)["baseline"]
    assert (here["shifted"], here["accuracy"]) == ("transformed", 1)
    assert here["shifted_accuracy"] < 1
