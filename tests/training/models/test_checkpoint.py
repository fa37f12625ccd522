"""A student in a file, and weights from elsewhere: nothing but tensors is ever made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fedkd.core import tensors
from fedkd.core.errors import DataError
from fedkd.data.scaling import Scaling
from fedkd.training import models
from fedkd.training.models import checkpoint
from fedkd.training.models.checkpoint import Student
from tests.conftest import simulated


def student(model: str = "cnn:width=8") -> Student:
    module = models.build(model, 10, "group")
    scaling = Scaling((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    return Student(model, "group", 10, ("zero", "one"), 32, scaling, "digits", module.state_dict(), "pad")


def test_what_is_saved_is_loaded(tmp_path):
    student().save(tmp_path / "student.safetensors")
    held = checkpoint.load(tmp_path)
    assert held.about() == student().about()
    images = torch.randn(2, 3, 32, 32)
    module = models.build("cnn:width=8", 10, "group")
    module.load_state_dict(dict(held.weights))
    assert torch.allclose(held.module()(images), module(images), atol=1e-6)


def test_every_run_leaves_one(tmp_path):
    simulated(tmp_path / "run", resize="pad")
    held = checkpoint.load(tmp_path / "run")
    assert (held.model, held.classes, held.pixels, held.dataset) == ("cnn:width=8", 10, 32, "digits")
    assert held.resize == "pad"
    assert held.module()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_file_without_a_way_to_make_images_square_was_trained_on_stretched_ones(tmp_path):
    about = student().about()
    del about["resize"]
    tensors.save(student().weights, tmp_path / "a.safetensors", {checkpoint.KEY: json.dumps(about)})
    assert checkpoint.load(tmp_path / "a.safetensors").resize == "stretch"


def test_a_file_cannot_name_code(tmp_path):
    ours = tmp_path / "student.safetensors"
    save_file({}, ours, {"fedkd": json.dumps({**student().about(), "model": "./theirs.py:Net"})})
    with pytest.raises(DataError, match="user-defined model"):
        checkpoint.load(ours)
    assert checkpoint.load(ours, "cnn").model == "cnn"


class Harm:
    """What a pickle can do: run a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_pickle_is_refused_and_not_run(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Harm()}, protocol))
    with pytest.raises(DataError, match=r"damaged"):
        checkpoint.read_weights(tmp_path / name)
    torch.save({"weight": Harm()}, tmp_path / "b.pth")
    with pytest.raises(DataError, match=r"more than tensors"):
        checkpoint.read_weights(tmp_path / "b.pth")
    assert not (tmp_path / "harm").exists()


def test_a_state_dict_is_read(tmp_path):
    weights = models.build("resnet8", 10, "batch").state_dict()
    for nested in (weights, {"state_dict": {f"module.{k}": v for k, v in weights.items()}}, {"model": weights}):
        torch.save(nested, tmp_path / "a.pth")
        held = checkpoint.read_weights(tmp_path / "a.pth")
        checkpoint.fill(models.build("resnet8", 10, "batch"), held, "these weights")
        assert all(torch.equal(held[name], weights[name]) for name in weights)


@pytest.mark.parametrize("model", ["cnn:width=8", "resnet8:width=8", "vit-tiny", "row-gru", "torchvision:resnet18"])
def test_a_last_layer_of_other_classes_starts_as_without_a_file(model, tmp_path):
    start, _ = checkpoint.initial(model, 10, "group", 0)
    expected = start.state_dict()
    torch.save(models.build(model, 7, "group").state_dict(), tmp_path / "a.pth")
    held = checkpoint.read_weights(tmp_path / "a.pth")
    text = f"{model}{',' if ':' in model else ':'}pretrained={tmp_path}/a.pth"
    module, note = checkpoint.initial(text, 10, "group", 0)
    from_file = {n for n, tensor in module.state_dict().items() if tensor.shape == held[n].shape}
    assert len(expected) - len(from_file) in (1, 2), "a weight, and a bias"
    assert all(torch.equal(t, (held if n in from_file else expected)[n]) for n, t in module.state_dict().items())
    assert f"{tmp_path}/a.pth has 7 classes, not 10, so the last layer (" in note
    assert not checkpoint.initial(text, 7, "group", 0)[1]


def test_files_of_other_layers_are_refused(tmp_path):
    tensors.save(models.build("cnn:width=10", 10, "group").state_dict(), tmp_path / "Own.safetensors")
    text = f"cnn:width=8,pretrained={tmp_path}/Own.safetensors"
    with pytest.raises(DataError, match=r"The weights in .*/Own\.safetensors do not .* here it is cnn:width=8\."):
        checkpoint.initial(text, 10, "group", 0)


def test_auxiliary_classifiers_in_torchvisions_files_are_left_out(tmp_path):
    from torchvision.models import googlenet

    weights = googlenet(weights=None, init_weights=False, num_classes=7, aux_logits=True).state_dict()
    torch.save(weights, tmp_path / "a.pth")
    module, _ = checkpoint.initial(f"torchvision:googlenet,pretrained={tmp_path}/a.pth", 10, "group", 0)
    assert torch.equal(module.state_dict()["conv1.conv.weight"], weights["conv1.conv.weight"])


def test_a_user_defined_model_keeps_its_own_option_pretrained(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(*, classes, pretrained: bool = False):\n    return nn.Linear(3, classes, bias=pretrained)\n"
        "def other(*, classes, x: 'Nowhere' = 3):\n    return nn.Linear(3, classes)\n"
    )
    text = f"{tmp_path}/mine.py:net:pretrained=true"
    assert models.pretrained(text) == (text, None)
    assert models.build(text, 10, "group").bias is not None
    spec, file = models.pretrained(f"{tmp_path}/mine.py:other:pretrained=a.pt")
    assert (spec, str(file)) == (f"{tmp_path}/mine.py:other", "a.pt")


def test_weights_that_do_not_fit():
    module, other = (models.build(name, 10, "group") for name in ("cnn", "cnn:width=8"))
    with pytest.raises(DataError, match=r"0\.0\.weight is \[8, 3, 3, 3\], not \[32, 3, 3, 3\]"):
        checkpoint.fill(module, other.state_dict(), "the weights of a.pth")
    with pytest.raises(DataError, match="they lack"):
        checkpoint.fill(module, {}, "the weights of a.pth")
    with pytest.raises(DataError, match="they hold an unknown x"):
        checkpoint.fill(module, {**module.state_dict(), "x": torch.zeros(1)}, "the weights of a.pth")


@pytest.mark.parametrize(("content", "expected"), [(b"", "damaged"), (b"{}" * 50, "damaged"), (None, "no file")])
@pytest.mark.parametrize("name", ["student.safetensors", "student.pth"])
def test_no_student_there(content, expected, name, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        checkpoint.read_weights(tmp_path / name)


def test_weights_that_do_not_say_whose_they_are(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "student.safetensors")
    with pytest.raises(DataError, match="without a description of their model"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ('{"model": "cnn", "norm": "batch", "classes": Infinity}', "without a description of their model"),
        ("[" * 100_000, "without a description of their model"),
        (json.dumps(student().about() | {"resize": "squash"}), "without a description of their model"),
        (json.dumps(student().about() | {"resize": ["crop"]}), "without a description of their model"),
    ],
)
def test_the_metadata_of_a_file_may_be_invalid(about, expected, tmp_path):
    tensors.save({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {checkpoint.KEY: about})
    with pytest.raises(DataError, match=expected):
        checkpoint.load(tmp_path / "a.safetensors")


def test_a_network_that_cannot_be_built(tmp_path):
    held = dataclasses.replace(student(), model="vit-tiny:width=33")
    held.save(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="The model in the file cannot be built, vit-tiny:width=33"):
        checkpoint.load(tmp_path / "a.safetensors").module()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "cnn:width=50000"},
        {"model": "vit-tiny:depth=1000000000"},
        {"model": "torchvision:vit_h_14"},
        {"model": "torchvision:regnet_y_400mf", "classes": 10**9},
        {"classes": 10**9},
    ],
)
def test_a_model_larger_than_its_weights_is_refused_before_it_has_memory(changes, tmp_path, monkeypatch):
    dataclasses.replace(student(), **changes).save(tmp_path / "a.safetensors")
    allocated = []
    parameter = torch.nn.Parameter.__new__

    def counted(kind, data=None, requires_grad=True):
        if data is not None and data.device.type != "meta":
            allocated.append(data.numel())
        return parameter(kind, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", counted)
    with pytest.raises(DataError, match=r"do not fit it: .* more than these \d,\d{3} parameters"):
        checkpoint.load(tmp_path / "a.safetensors").module()
    assert allocated == []


@pytest.mark.parametrize("model", ["cnn", "resnet8", "vit-tiny", "row-gru", "torchvision:regnet_y_400mf"])
def test_the_check_of_the_size_changes_no_random_number(model):
    torch.manual_seed(0)
    models.build(model, 10, "group")
    expected = torch.rand(1)
    held = student(model)
    torch.manual_seed(0)
    held.module()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_student_has_the_permissions_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        student().save(tmp_path / "student.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "student.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_weights_that_are_no_numbers():
    module = models.build("cnn:width=4", 10, "batch")
    broken = {name: tensor * float("nan") for name, tensor in module.state_dict().items()}
    with pytest.raises(DataError, match="not finite"):
        checkpoint.fill(module, broken, "the weights of a.pth")
