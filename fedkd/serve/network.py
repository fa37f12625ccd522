"""Loading a network from an ONNX file, which must have the form that ``fedkd.export`` writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fedkd.core.errors import DataError, FedkdError
from fedkd.core.values import Resize

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

KEY = "fedkd"  # of the JSON in the metadata of the file
MAX_BYTES = 2**31 - 1  # the maximum size of a protobuf message, and so of an ONNX file


@dataclass(frozen=True, eq=False)
class Network:
    """A session of ONNX Runtime and the metadata of its file."""

    session: onnxruntime.InferenceSession
    about: dict[str, Any]

    @property
    def pixels(self) -> int:
        """The side length of the input images."""
        side: int = self.about["pixels"]
        return side

    @property
    def resize(self) -> Resize:
        """How images that are not square are made so, as in training."""
        resize: Resize = self.about["resize"]
        return resize

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Logits float32 [N, C] of images uint8 [N, P, P, 3]."""
        (logits,) = self.session.run(["logits"], {"pixels": pixels})
        return logits  # type: ignore[no-any-return]


def load(path: Path, threads: int = 1) -> Network:
    """The network of an ONNX file, tested with one batch.

    The file is not trusted: it is read once, files it refers to are not opened, and any unexpected content is refused.

    Raises:
        DataError: there is no such file, it is not ONNX, it cannot be run, or it was not written by ``fedkd.export``.

    """
    import numpy as np

    if not path.is_file():
        hint = f" It is a directory; name a file in it that fedkd.export has written: {path / 'student.onnx'}."
        hint *= path.is_dir()
        raise DataError(f"There is no file {path}.{hint}")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than an ONNX file can be.")
    content = path.read_bytes()
    _refuse_external(content, path)
    try:
        network = _open(content, path, threads)
        side, classes = network.pixels, network.about["classes"]
        shape = network.logits(np.zeros((2, side, side, 3), np.uint8)).shape
    except FedkdError:
        raise
    except Exception as error:  # the exceptions of ONNX Runtime have no public base class
        raise DataError(f"ONNX Runtime cannot use {path}: {_reason(error)}") from error
    if shape != (2, classes):
        raise DataError(f"{path} returns shape {list(shape)} for two images, not (2, {classes}).")
    return network


def _refuse_external(content: bytes, path: Path) -> None:
    """Raise if the bytes are not ONNX, or if a tensor is stored in another file.

    ONNX Runtime would read such a file from the working directory. A malicious model must not read files, whatever the
    version of ONNX Runtime: all messages are visited, so that no field of the schema is missed.
    """
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError
        how = f"; export a student first: python -m fedkd.export {path} --to onnx" * (path.suffix == ".safetensors")
        raise DataError(f"{path} is not an ONNX file, or is damaged{how}.") from error
    if not model.graph.node:
        raise DataError(f"{path} is not an ONNX file, or is empty.")
    pending: list[Any] = [model]
    while pending:
        message = pending.pop()
        if isinstance(message, onnx.TensorProto):
            if message.external_data or message.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(f"{path} stores tensors in other files, which are not read; export it as one file.")
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending += [value] if hasattr(value, "ListFields") else value


def _open(content: bytes, path: Path, threads: int) -> Network:
    """The network, after a check of its inputs and outputs."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # only in its builds for Windows
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are reported by DataError
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle server costs nothing
    session = onnxruntime.InferenceSession(
        content,
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=0,  # it would retry with the same provider and print a banner
    )
    about = _about(session.get_modelmeta().custom_metadata_map.get(KEY, ""), path)
    side, classes = about["pixels"], about["classes"]
    _check_port(session.get_inputs(), ("pixels", "tensor(uint8)", [side, side, 3]), path)
    _check_port(session.get_outputs(), ("logits", "tensor(float)", [classes]), path)
    return Network(session, about)


def _about(text: str, path: Path) -> dict[str, Any]:
    """The metadata of the file: only the known keys, with checked types and valid text."""
    try:
        metadata = json.loads(text)
        about: dict[str, Any] = {key: _valid_text(metadata[key]) for key in ("model", "norm", "dataset")}
        about |= {key: int(metadata[key]) for key in ("classes", "pixels")}
        about |= {key: [float(value) for value in metadata[key]] for key in ("mean", "std")}
        about["resize"] = metadata.get("resize", "stretch")  # files without it are older, and were trained so
        about["names"] = [_valid_text(name) for name in metadata["names"]]
        if not all(len(about[key]) == 3 and all(map(math.isfinite, about[key])) for key in ("mean", "std")):
            raise ValueError("mean and std must be three finite numbers")
        if not (about["classes"] > 0 and about["pixels"] > 0 and len(about["names"]) in (0, about["classes"])):
            raise ValueError("counts do not fit")
        if about["resize"] not in get_args(Resize):
            raise ValueError("there is no such way to make an image square")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} has no valid metadata: it was not written by fedkd.export.") from error
    return about


def _valid_text(text: object) -> str:
    """Text without lone surrogates, which JSON allows and UTF-8 does not."""
    return str(text).encode("utf-8", "replace").decode()


def _check_port(ports: list[Any], expected: tuple[str, str, list[int]], path: Path) -> None:
    """Raise unless there is exactly one input (or output) of this name, type and shape [N, *shape]."""
    name, kind, shape = expected
    actual = [(port.name, port.type, port.shape[1:]) for port in ports]
    if actual != [expected] or isinstance(ports[0].shape[0], int):
        raise DataError(f"{path} was not written by fedkd.export: {name} must be {kind} of [N, {str(shape)[1:]}.")


def _reason(error: Exception) -> str:
    """The message of a library's error on one printable line: its text may come from the file."""
    line = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:300]
