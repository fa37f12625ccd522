from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.core.config import Config
from fedkd.core.errors import PluginError, UsageError
from fedkd.core.quotes import quoted, split
from fedkd.core.run_directory import default_out
from fedkd.data import proxies
from fedkd.training import models

OWN = """
import dataclasses

def function(labels, clients, rng, *, step: int = 2, name="x"):
    return (labels, step, name)

class Kind:
    def __init__(self, num_partitions, step: float = 1.0):
        self.num_partitions, self.step = num_partitions, step

class Failing:
    def __init__(self, how: str = "exit"):
        raise SystemExit(3) if how == "exit" else ZeroDivisionError("mine")

def annotated(*, x: "Nowhere" = 3):
    return 1

value = 3
"""


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_parts_of_a_spec():
    spec = specs.parse("torchvision:resnet50,pretrained=a/b.pth")
    assert (spec.name, spec.argument, dict(spec.options)) == ("torchvision", "resnet50", {"pretrained": "a/b.pth"})
    assert dict(specs.parse("x:a-b=1").options) == {"a_b": "1"}
    assert specs.parse("hf:uoft-cs/cifar10").argument == "uoft-cs/cifar10"
    assert specs.parse("./mine.py:Name:step=2") == specs.Spec(
        "./mine.py:Name:step=2", "./mine.py:Name", None, {"step": "2"}
    )
    assert specs.parse("package.module:Name,step=2").name == "package.module:Name"


@pytest.mark.parametrize("text", ["x:a=1,b", "x:a=1,a=2", "x:=1", "./mine.py", "./mine.py:", "a.b:1x"])
def test_what_cannot_be_read_is_said(text):
    with pytest.raises(UsageError):
        specs.parse(text)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CATALOG.items() for name in names])
def test_every_name_of_the_catalog_can_be_imported(kind, name):
    text = {"hf": "hf:x", "folder": "folder:x", "torchvision": "torchvision:resnet18", "size": "size:sizes=1"}.get(
        name, name
    )
    assert callable(specs.bind(kind, text))


def test_options_are_converted_by_their_annotations(own):
    assert specs.bind("partitioner", f"{own}:function:step=3,name=[1]")(0, 0, 0) == (0, 3, [1])
    bound = specs.bind("partitioner", f"{own}:Kind:step=3", ("num_partitions",))
    assert bound(num_partitions=2).step == 3.0
    assert specs.call("algorithm", "ensemble:downlink=nothing").downlink == "nothing"


def test_a_file_is_imported_once(own):
    assert specs.bind("partitioner", f"{own}:Kind").func is specs.bind("partitioner", f"{own}:Kind").func


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("algorithm", "fedav", "Did you mean 'fedavg'"),
        ("algorithm", "dsfl:temprature=1", "Did you mean 'temperature'"),
        ("algorithm", "dsfl:temperature=hot", "valid number"),
        ("algorithm", "dsfl:temperature=0", "greater than 0"),
        ("algorithm", "dsfl:x", "takes key=value options"),
        ("dataset", "folder", "folder:PATH"),
        ("model", "resnet8:norm=layer", "'group' or 'batch'"),
        ("partitioner", "pathological:classes=0", "greater than 0"),
        ("partitioner", "dirichlet:alpha=nan", "it should be a number"),
        ("model", "cnn:width=99999999999999999999", "more than 4294967295"),
    ],
)
def test_a_mistake_is_one_sentence_that_helps(kind, text, expected):
    with pytest.raises(UsageError, match=expected):
        specs.bind(kind, text)


@pytest.mark.parametrize("name", ["missing", "value"])
def test_a_name_that_a_file_does_not_have(own, name):
    with pytest.raises(PluginError, match="Known: Failing, Kind, annotated, function"):
        specs.bind("partitioner", f"{own}:{name}")


def test_a_module_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    for text in (f"{tmp_path}/broken.py:X", f"{tmp_path}/absent.py:X", "no.such.module:X"):
        with pytest.raises(PluginError, match="Cannot import"):
            specs.bind("loss", text)


def test_a_module_that_exits_and_components_that_fail_are_user_defined_mistakes(own, tmp_path):
    """Whatever they raise: the command would end with their exit code, or with a traceback."""
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)")
    with pytest.raises(PluginError, match=r"Cannot import loss .*SystemExit: 3"):
        specs.bind("loss", f"{tmp_path}/leaving.py:X")
    for text, expected in (("Failing", "SystemExit: 3"), ("Failing:how=divide", "ZeroDivisionError: mine")):
        with pytest.raises(PluginError, match=expected):
            specs.call("algorithm", f"{own}:{text}")
    with pytest.raises(PluginError, match="annotation of x in annotated is wrong: name 'Nowhere' is not defined"):
        specs.bind("loss", f"{own}:annotated:x=1")


@pytest.mark.parametrize(
    ("text", "name", "argument", "options"),
    [
        ('folder:"/x/split=train/y"', "folder", "/x/split=train/y", {}),
        ('hf:"a,b",image=img', "hf", "a,b", {"image": "img"}),
        ('folder:"C:/x",pixels=64', "folder", "C:/x", {"pixels": "64"}),
        (
            'torchvision:resnet18,pretrained="/my models/a,b=1.pt"',
            "torchvision",
            "resnet18",
            {"pretrained": "/my models/a,b=1.pt"},
        ),
        ('"./my=models/net,1.py":Net:step="2"', "./my=models/net,1.py:Net", None, {"step": "2"}),
        ('x:a="say ""no""",b=""', "x", None, {"a": 'say "no"', "b": ""}),
    ],
)
def test_what_stands_in_quotes_is_not_split(text, name, argument, options):
    assert specs.parse(text) == specs.Spec(text, name, argument, options)


def test_a_proxy_set_in_quotes_keeps_them():
    source, size = proxies.parse('folder:"/x/split=train/a,b",size=30,pixels=16')
    assert source is not None
    assert (source.argument, source.pixels, size) == ("/x/split=train/a,b", 16, 30)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.one_of(st.none(), words), st.dictionaries(st.sampled_from(["a", "pixels", "k_1"]), words))
def test_quoted_parts_are_read_as_they_were(argument, options):
    items = [*([quoted(argument)] if argument is not None else []), *(f"{k}={quoted(v)}" for k, v in options.items())]
    text = ":".join(["name", ",".join(items)])
    assert specs.parse(text) == specs.Spec(text, "name", argument, options)
    assert models.split(f"{text},cnn") == [text, "cnn"]
    assert specs.without(text, "k_1")[1] == options.get("k_1")
    rest = specs.parse(specs.without(text, "k_1")[0])
    assert (rest.argument, rest.options) == (argument, {k: v for k, v in options.items() if k != "k_1"})


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"')))
def test_a_text_without_quotes_is_split_as_by_python(text):
    assert split(text) == text.split()
    assert split(text, ",") == text.split(",")
    assert split(text, ":", 1) == text.split(":", 1)


@pytest.mark.parametrize("text", ['folder:"/x', 'folder:/x"y', 'x:a="b,c'])
def test_a_quote_that_is_not_closed_is_said(text):
    with pytest.raises(UsageError, match="has a double quote that is not closed"):
        specs.parse(text)


@pytest.mark.parametrize("text", ["folder:/x/split=train/y", "folder:/a,b", "folder:split=train/y", "folder:/x,v=1/y"])
def test_a_path_that_needs_quotes_is_said(text):
    with pytest.raises(UsageError, match="stands in double quotes"):
        specs.bind("dataset", text)


def test_a_file_in_a_folder_with_a_space_or_a_comma(tmp_path):
    (tmp_path / "my, own=models").mkdir()
    (tmp_path / "my, own=models" / "mine.py").write_text(OWN)
    text = f'"{tmp_path}/my, own=models/mine.py":function'
    assert specs.bind("partitioner", f"{text}:step=3")(0, 0, 0) == (0, 3, "x")
    assert specs.is_user_defined(text)
    assert specs.is_user_defined(f"ensemble:x={quoted(text)}")
    assert not specs.is_user_defined('cnn:pretrained="/d:x/a,b.pt"')
    assert specs.call("algorithm", f"mentor:term=logits,kind={quoted(text)}").loss_term.kind == text
    config = Config.parse({"compare": [text, "fedavg"]})
    assert [run.algorithm for run in config.runs("digits")] == ["ensemble", text, "fedavg"]
    assert default_out(config, text).name.startswith("mine-")


def test_several_methods_with_commas():
    with pytest.raises(UsageError, match="Several are separated by spaces, not by commas"):
        specs.bind("algorithm", "fedavg,local")
