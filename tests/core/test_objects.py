"""Objects in place of specs: the spec of an object makes an equal object."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fedkd.algorithms.aggregators import trimmed_mean
from fedkd.algorithms.dsfl import DSFL
from fedkd.algorithms.fedavg import FedAvg, FedProx
from fedkd.core import objects, specs
from fedkd.core.config import Config
from fedkd.core.errors import UsageError
from fedkd.training.models import cnn, resnet8


@dataclass(frozen=True)
class Mine(FedAvg):
    name: str = ""
    rates: tuple[float, ...] = ()
    inner: str = "fedavg"


@pytest.mark.parametrize(
    ("component", "text"),
    [
        (FedAvg, "fedavg"),
        (FedAvg(), "fedavg"),
        (DSFL(temperature=0.2), "dsfl:temperature=0.2"),
        (FedProx(mu=0.01), "fedprox"),  # the default
        (cnn, "cnn"),
        (partial(cnn, width=8), "cnn:width=8"),
        (partial(trimmed_mean, trim=0.3), "trimmed-mean:trim=0.3"),
        (Mine, f"{__name__}:Mine"),
        (Mine(name='a "b", c=1'), f'{__name__}:Mine:name="a ""b"", c=1"'),
        (Mine(rates=(0.5, 2.0)), f"{__name__}:Mine:rates=0.5+2.0"),
    ],
)
def test_the_spec_of_an_object(component, text):
    assert objects.spec_of(component) == text


@pytest.mark.parametrize("method", [DSFL(temperature=0.2), Mine(name='a "b", c=1'), FedProx(mu=3.5)])
def test_the_spec_of_a_method_makes_an_equal_one(method):
    assert specs.call("algorithm", objects.spec_of(method)) == method


def test_lists_are_models_of_clients_and_methods():
    given = {"model": [partial(cnn, width=4), "resnet20", resnet8], "compare": [FedAvg, "local"], "clients": 3}
    wanted = {"model": "cnn:width=4,resnet20,resnet8", "compare": ["fedavg", "local"], "clients": 3}
    assert objects.as_options(given) == wanted
    assert objects.as_options({"out": Path("runs/a"), "seeds": [1, 2]}) == {"out": "runs/a", "seeds": [1, 2]}
    assert objects.as_options({"model": ["cnn", "resnet8"]}) == {"model": "cnn,resnet8"}


def test_a_module_of_one_file_is_named_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_components.py").write_text("def net(*, classes):\n    return classes\n")
    import own_components

    text = objects.spec_of(own_components.net)
    assert text == "./own_components.py:net"
    assert specs.bind("model", text, ("classes",)).func(classes=3) == 3
    monkeypatch.chdir(Path(__file__).parent)
    assert objects.spec_of(own_components.net) == f"{tmp_path}/own_components.py:net"
    del sys.modules["own_components"]


def test_what_the_program_itself_defines_is_named_so(monkeypatch):
    monkeypatch.setattr(
        sys.modules["__main__"], "Net", Net := type("Net", (), {"__module__": "__main__"}), raising=False
    )
    assert objects.spec_of(Net) == "__main__:Net"
    assert specs.bind("model", "__main__:Net").func is Net
    assert objects.only_here({"model": "cnn,__main__:Net:width=3", "clients": 3}) == "--model __main__:Net:width=3"
    assert objects.only_here({"model": "cnn", "dataset": "fedkd.data:Main"}) == ""


def local():
    def inside():
        pass

    return inside


@pytest.mark.parametrize(
    ("component", "text"),
    [
        (lambda: None, "has no name by which it could be found again"),
        (local(), "has no name by which it could be found again"),
        (partial(cnn, 3), "options are given by their names"),
        (partial(cnn, width=object()), "cannot be an option of a component"),
        (3, "is no component"),
    ],
)
def test_mistakes_are_one_sentence(component, text):
    with pytest.raises(UsageError, match=text):
        objects.spec_of(component)


def test_what_is_no_component_is_said():
    for value in (None, 3, [1, 2], object()):
        with pytest.raises(UsageError, match=r"--dataset .* text, or a function or a class that"):
            Config.parse(objects.as_options({"dataset": value}))
    with pytest.raises(UsageError, match=r"--data-dir 3 is not usable: it should be a text.$"):
        Config.parse({"data_dir": 3})
    with pytest.raises(UsageError, match="--augment 'maybe' is not usable: it should be true or false"):
        Config.parse({"augment": "maybe"})
