"""``python -m fedkd.export``: files for other runtimes with the same outputs as the student."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedkd import export as command
from fedkd.core import cli, specs, tensors
from fedkd.core.errors import DataError, RunError, UsageError
from fedkd.data import readers
from fedkd.data.scaling import Scaling
from fedkd.export import check, formats
from fedkd.training import models
from fedkd.training.models import checkpoint
from fedkd.training.models.checkpoint import Student
from tests.conftest import simulated, slow

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

MODELS = ["cnn:width=8", "resnet8:width=8", "vit-tiny:depth=2", "row-gru"]
OTHERS = ["bottleneck-resnet:width=8", "lenet:projection=16", "mcmahan-cnn:gray=true"]
OTHERS += ["wrn-16-2:width=4", "vgg8:width=8", "vgg9:width=4", "vgg16:width=4", "mobilenetv2:width=0.25"]
IMAGES = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def student(model: str = "cnn:width=4", norm: models.Norm = "group", dataset: str = "digits") -> Student:
    torch.manual_seed(0)
    weights = models.build(model, 10, norm).state_dict()
    scaling = Scaling((78.0, 79.0, 80.0), (89.0, 88.0, 87.0))
    return Student(model, norm, 10, (), 32, scaling, dataset, weights, "pad")


@pytest.fixture
def saved(tmp_path):
    """A directory with an untrained student."""
    (tmp_path / "run").mkdir()
    student().save(tmp_path / "run" / "student.safetensors")
    return tmp_path / "run"


@pytest.fixture
def one_repeat(monkeypatch):
    """Latency is measured once."""
    monkeypatch.setattr(check, "REPEATS", 1)


def listed(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["onnx", "pt2", "pte"])
@pytest.mark.parametrize("model", [*MODELS, *map(slow, OTHERS)])
def test_a_file_has_the_same_outputs_as_the_student(model, name, tmp_path):
    if name == "pte":
        pytest.importorskip("executorch")
    original, path = student(model), tmp_path / "a"
    formats.FORMATS[name].write(original, path, None)
    run = formats.FORMATS[name].open(path)
    with torch.inference_mode():
        expected = original.module()(original.scaling(IMAGES))
    for count in (1, 5):
        logits = run(IMAGES[:count])
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, expected[:count], atol=1e-4)
        assert torch.equal(logits.argmax(-1), expected[:count].argmax(-1))


def test_a_file_has_the_metadata_of_the_student_and_no_local_paths(tmp_path):
    import onnx

    original = student("resnet8:width=8", "batch")
    for name, ending in (("onnx", "a.onnx"), ("int8", "b.onnx"), ("pt2", "a.pt2")):
        formats.FORMATS[name].write(original, tmp_path / ending, IMAGES)
    for ending in ("a.onnx", "b.onnx"):
        props = {prop.key: prop.value for prop in onnx.load(tmp_path / ending).metadata_props}
        assert json.loads(props["fedkd"]) == original.about()
    extra = {"fedkd": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra["fedkd"]) == original.about()
    for path in tmp_path.iterdir():
        assert b"with_scaling.py" not in path.read_bytes(), path.name


def test_the_server_loads_exported_files(tmp_path):
    from fedkd.serve import network

    original = student()
    for name in ("onnx", "int8"):
        formats.FORMATS[name].write(original, tmp_path / name, IMAGES)
        loaded = network.load(tmp_path / name)
        assert loaded.pixels == 32
        expected = {
            key: value for key, value in original.about().items() if key != "held_out"
        }  # not needed by the server
        assert {key: loaded.about[key] for key in expected} == expected
        assert loaded.logits(IMAGES.numpy()).shape == (5, 10)


def test_int8_has_weights_of_eight_bits_with_one_scale_per_channel(tmp_path):
    import onnx

    original = student("cnn:width=32")
    for name in ("onnx", "int8"):
        formats.FORMATS[name].write(original, tmp_path / name, IMAGES)
    assert (tmp_path / "int8").stat().st_size < 0.6 * (tmp_path / "onnx").stat().st_size
    graph = onnx.load(tmp_path / "int8").graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    kernels = [tensor for tensor in graph.initializer if len(tensor.dims) == 4]
    assert kernels
    assert all(tensor.data_type == onnx.TensorProto.INT8 for tensor in kernels)
    scales = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    by_channel = [node.input[1] for node in graph.node if node.input and node.input[0] == kernels[0].name]
    assert [scales[name] for name in by_channel] == [[kernels[0].dims[0]]]


def test_a_run_is_exported(tmp_path, one_repeat, capsys):
    simulated(tmp_path / "run", rounds=1)
    before = listed(tmp_path / "run")
    capsys.readouterr()
    command.export(tmp_path / "run", to=("onnx", "pt2", "onnx"), images=50, json=True)
    assert json.loads(capsys.readouterr().out)["original"]["file"] == "student.safetensors"
    command.export(tmp_path / "run", to=("int8",), images=50)
    report = json.loads((tmp_path / "run" / "export.json").read_text())
    assert listed(tmp_path / "run") == sorted(
        [*before, "student.onnx", "student.pt2", "student-int8.onnx", "export.json", "MODEL_CARD.md"]
    )
    assert set(report["files"]) == {"onnx", "pt2", "int8"}  # an earlier export is kept
    for name in ("onnx", "pt2"):
        comparison = report["files"][name]["check"]
        assert comparison["images"] == 50
        assert comparison["equal_classes"] == 1
        assert comparison["logit_difference"] < 1e-4
        assert comparison["accuracy"] == comparison["accuracy_original"]
        assert set(report["files"][name]["milliseconds"]) == {"1", "64"}
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert report["files"]["int8"]["sha256"] in card
    assert "Method: `ensemble`" in card
    assert report["student"]["resize"] == "crop"
    assert "the central square is resized to 32 x 32" in card
    assert "No formal privacy is claimed" in card


def test_calibration_uses_no_test_images(saved, monkeypatch):
    splits = []
    read = readers.read

    def watched(source, split, *rest):
        splits.append(split)
        return read(source, split, *rest)

    monkeypatch.setattr(readers, "read", watched)
    command.export(saved, to=("int8",), check=False)
    assert splits == ["train"]
    source = command._source(checkpoint.load(saved), "", 10**8, False)
    images = command._training(source, "")
    train = read(dataclasses.replace(specs.call("dataset", "digits"), pixels=32), "train", "")
    rows = {image.numpy().tobytes() for image in train.pixels}
    assert len(images) == command.CALIBRATION
    assert all(image.numpy().tobytes() in rows for image in images)
    assert torch.equal(images, command._training(source, ""))


@pytest.mark.parametrize("split", ["test", "train"])
def test_images_are_read_as_those_that_the_student_was_trained_on(split, saved, monkeypatch):
    def stopped(source, of, data_dir):
        assert of == split
        assert (source.pixels, source.resize, source.max_pixels, source.skip_damaged) == (32, "pad", 5, True)
        raise DataError("as it should be")

    monkeypatch.setattr(readers, "read", stopped)
    name = {"test": "onnx", "train": "int8"}[split]
    with pytest.raises(DataError, match="as it should be"):
        command.export(saved, to=(name,), check=split == "test", max_pixels=5, skip_damaged=True)


def test_without_a_check(saved):
    command.export(saved, to=("onnx",), check=False)
    assert json.loads((saved / "export.json").read_text())["files"]["onnx"]["check"] is None
    assert "None: the files were written without a check" in (saved / "MODEL_CARD.md").read_text()


def broken(folder, **changes):
    original = student()
    save_file(
        {name: tensor.contiguous() for name, tensor in original.weights.items()},
        folder / "student.safetensors",
        {"fedkd": json.dumps({**original.about(), **changes})},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": 0}, "0 pixels"),
        ({"pixels": 10**9}, "1000000000 pixels"),
        ({"model": "resnet8"}, "do not fit"),
        ({"classes": 7}, "do not fit"),
        ({"std": [0.0, 0.0, 0.0]}, "finite"),
        ({"dataset": "./theirs.py:read"}, "user-defined"),
        ({"model": "./theirs.py:Net"}, "user-defined"),
        ({"model": "cmn"}, "cannot be built"),
        ({"model": "a.b:"}, "without a description"),
        ({"dataset": "digitz"}, "give it by --dataset"),
        ({"dataset": "a.b:"}, "give it by --dataset"),
        ({"names": list("abcdefghij")}, "Give the student's own data set"),
        ({"resize": "squash"}, "without a description"),
    ],
)
def test_a_student_that_cannot_be_used(changes, message, saved):
    broken(saved, **changes)
    with pytest.raises(DataError, match=message):
        command.export(saved, to=("pt2",))
    assert listed(saved) == ["student.safetensors"]


def test_a_missing_student_is_reported(saved, tmp_path):
    with pytest.raises(DataError, match="no run or student"):
        command.export(tmp_path / "none", to=("pt2",))
    (saved / "student.safetensors").write_bytes(b"{}" * 50)
    with pytest.raises(DataError, match="damaged"):
        command.export(saved, to=("pt2",))
    (saved / "student.safetensors").unlink()
    with pytest.raises(DataError, match="not a run directory"):
        command.export(saved, to=("pt2",))
    (saved / "config.toml").write_text('algorithm = "central"\n')
    with pytest.raises(DataError, match=r"contains no student.*central"):
        command.export(saved, to=("pt2",))


@pytest.mark.parametrize(
    ("to", "message"), [((), "Name a format"), (("onx",), "Did you mean 'onnx'"), (("pte",), "fedkd\\[mobile\\]")]
)
def test_a_format_that_cannot_be_used(to, message, saved, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    with pytest.raises(UsageError, match=message):
        command.export(saved, to=to)
    assert listed(saved) == ["student.safetensors"]


@pytest.mark.parametrize(
    ("argv", "code"), [(["none", "--to", "onnx"], 3), (["none", "--to", "x"], 2), (["none", "--images", "-1"], 2)]
)
def test_a_mistake_is_reported_in_one_sentence_with_an_exit_code(argv, code, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.run(command.app, argv)
    assert exited.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith("fedkd: ")
    assert "Traceback" not in printed


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.floats() | st.text(), max_size=4),
    st.sampled_from([10**400, -1, 10, 7, "resnet8", "cnn:width=10000000", "vit-tiny:depth=100000000", "cnn:", "a.b:"]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_student_ends_with_one_sentence_and_exit_code_3(data, tmp_path_factory, monkeypatch, capfd):
    """Flipped bytes, truncations and edited metadata; a file that is still a student is exported."""
    unwritten = dataclasses.replace(formats.FORMATS["pt2"], write=lambda student, path, training: path.touch())
    monkeypatch.setitem(formats.FORMATS, "pt2", unwritten)
    path = tmp_path_factory.mktemp("damaged") / "student.safetensors"
    original = student()
    about = original.about()
    for key in data.draw(st.lists(st.sampled_from(list(about)), max_size=2, unique=True), label="edited"):
        about[key] = data.draw(VALUES, label=key)
    tensors.save(original.weights, path, {checkpoint.KEY: json.dumps(about)})
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3), label="flipped")):
        place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1), label="place")
        content[place] = data.draw(st.integers(0, 255), label="byte")
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)), label="length")
    path.write_bytes(content[:end])
    with pytest.raises(SystemExit) as exited:
        cli.run(command.app, [str(path), "--to", "pt2", "--no-check"])
    printed = capfd.readouterr().err
    assert exited.value.code in (0, 3), printed
    if exited.value.code:
        assert printed.startswith("fedkd: ")
        assert printed.count("\n") == 1


def test_nothing_is_written_if_a_runtime_computes_other_logits(saved, monkeypatch):
    wrong = dataclasses.replace(formats.FORMATS["pt2"], open=lambda path: lambda pixels: torch.ones(len(pixels), 10))
    monkeypatch.setitem(formats.FORMATS, "pt2", wrong)
    with pytest.raises(RunError, match="differ by"):
        command.export(saved, to=("pt2",), images=20, out=saved / "new")
    assert listed(saved) == ["student.safetensors"]


@pytest.mark.parametrize("error", [ValueError("no such operator\nand more"), KeyboardInterrupt()])
def test_a_failure_keeps_earlier_files(error, saved, monkeypatch):
    (saved / "student.onnx").write_text("earlier")

    def fails(student, path, training):
        path.write_text("half")
        raise error

    monkeypatch.setitem(formats.FORMATS, "pt2", dataclasses.replace(formats.FORMATS["pt2"], write=fails))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UsageError) as raised:
        command.export(saved, to=("onnx", "pt2"), check=False)
    if isinstance(error, ValueError):
        assert "cannot be exported to pt2: ValueError: no such operator." in str(raised.value)
    assert listed(saved) == ["student.onnx", "student.safetensors"]
    assert (saved / "student.onnx").read_text() == "earlier"


@pytest.mark.real
def test_real_cifar10_all_classes_are_equal(data_dir, tmp_path):
    original = student("cnn:width=16", dataset="cifar10")
    formats.write_onnx(original, tmp_path / "a.onnx")
    test = readers.read(dataclasses.replace(specs.call("dataset", "cifar10"), pixels=32), "test", data_dir)
    assert len(test.pixels) == 10_000
    module = formats.with_scaling(original)
    with torch.inference_mode():
        expected = check.logits(module, test.pixels)
    actual = check.logits(formats.open_onnx(tmp_path / "a.onnx"), test.pixels)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    assert (actual - expected).abs().max() < 1e-4
