"""A network from an ONNX file: refused unless it is what ``fedkd.export`` writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core.errors import DataError, FedkdError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

KEY = "fedkd"  # of the JSON among the file's metadata
LARGEST = 2**31 - 1  # bytes: what a protobuf message, and so an ONNX file, can be


@dataclass(frozen=True, eq=False)
class Network:
    """What an ONNX file holds: a session that answers, and what the file says about itself."""

    session: onnxruntime.InferenceSession
    about: dict[str, Any]

    @property
    def pixels(self) -> int:
        """The side of its images."""
        side: int = self.about["pixels"]
        return side

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Logits [N, C] in float32 for images [N, P, P, 3] in uint8."""
        (answer,) = self.session.run(["logits"], {"pixels": pixels})
        return answer  # type: ignore[no-any-return]


def load(path: Path, threads: int = 1) -> Network:
    """The network of an ONNX file, which has answered once.

    The file may come from anybody: it is read once, nothing it names is opened, and what is not of the contract is
    refused.

    Raises:
        DataError: there is no such file, it is not ONNX, it cannot be run, or it was not written by ``fedkd.export``.

    """
    import numpy as np

    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path} is larger than an ONNX file can be.")
    content = path.read_bytes()
    _refuse_external(content, path)
    try:
        network = _open(content, path, threads)
        side, classes = network.pixels, network.about["classes"]
        shape = network.logits(np.zeros((2, side, side, 3), np.uint8)).shape
    except FedkdError:
        raise
    except Exception as error:  # classes of ONNX Runtime's own, which have no public base; text that is none
        raise DataError(f"ONNX Runtime cannot use {path}: {_reason(error)}") from error
    if shape != (2, classes):
        raise DataError(f"{path} answers two images with {list(shape)}, not with two rows of {classes} logits.")
    return network


def _refuse_external(content: bytes, path: Path) -> None:
    """Raise if the bytes are not ONNX, or if a tensor of theirs lies in another file.

    ONNX Runtime would look for such a file where the process happens to stand. That a model made to harm gets
    to read no file must not hang on its version: every message is visited, so that no place in the schema is forgotten.
    """
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError
        raise DataError(f"{path} is not an ONNX file, or a damaged one.") from error
    if not model.graph.node:
        raise DataError(f"{path} is not an ONNX file, or an empty one.")
    waiting: list[Any] = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):
            if message.external_data or message.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(f"{path} keeps tensors in other files, which are not read; export it as one file.")
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "ListFields") else value


def _open(content: bytes, path: Path, threads: int) -> Network:
    """The network, whose inputs and outputs are those of the contract."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # its builds for Windows have some
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong is said in our sentence
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle server costs nothing
    session = onnxruntime.InferenceSession(
        content,
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=0,  # to the same provider, with a banner
    )
    about = _about(session.get_modelmeta().custom_metadata_map.get(KEY, ""), path)
    side, classes = about["pixels"], about["classes"]
    _check_port(session.get_inputs(), ("pixels", "tensor(uint8)", [side, side, 3]), path)
    _check_port(session.get_outputs(), ("logits", "tensor(float)", [classes]), path)
    return Network(session, about)


def _about(text: str, path: Path) -> dict[str, Any]:
    """What the file says about itself: the known keys only, each of its type, and text that can be sent."""
    try:
        held = json.loads(text)
        about: dict[str, Any] = {key: _sendable(held[key]) for key in ("model", "norm", "dataset")}
        about |= {key: int(held[key]) for key in ("classes", "pixels")}
        about |= {key: [float(value) for value in held[key]] for key in ("mean", "std")}
        about["names"] = [_sendable(name) for name in held["names"]]
        if not all(len(about[key]) == 3 and all(map(math.isfinite, about[key])) for key in ("mean", "std")):
            raise ValueError("three numbers are meant")
        if not (about["classes"] > 0 and about["pixels"] > 0 and len(about["names"]) in (0, about["classes"])):
            raise ValueError("counts do not fit")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} does not say what it is: it was not written by fedkd.export.") from error
    return about


def _sendable(text: object) -> str:
    """Text without halves of characters, which JSON can hold and UTF-8 cannot."""
    return str(text).encode("utf-8", "replace").decode()


def _check_port(ports: list[Any], wanted: tuple[str, str, list[int]], path: Path) -> None:
    """Raise unless there is one input (or output) of this name, type and shape after a batch of any size."""
    name, kind, shape = wanted
    found = [(port.name, port.type, port.shape[1:]) for port in ports]
    if found != [wanted] or isinstance(ports[0].shape[0], int):
        raise DataError(f"{path} is not a network of fedkd.export: {name} must be {kind} of [N, {str(shape)[1:]}.")


def _reason(error: Exception) -> str:
    """The message of a library's error on one printable line: its text may come from the file."""
    line = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:300]
