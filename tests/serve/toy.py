"""An ONNX file as ``fedkd.export`` writes one, without training; a server of it, and images for it."""

from __future__ import annotations

import io
import json
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fedkd.serve import http, network, web

SIDE = 8
NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "<img src=x onerror=alert(1)>", "truck"]
ABOUT = {
    "model": "toy",
    "norm": "group",
    "classes": 10,
    "names": NAMES,
    "pixels": SIDE,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "dataset": "cifar10",
    "resize": "crop",
}


def model(
    about: dict[str, Any] | None = None, *, output: str = "logits", kind: int = TensorProto.UINT8, batch: Any = "N"
):
    """Pixels are scaled, flattened and multiplied by a fixed random matrix."""
    about = ABOUT if about is None else about
    side, classes = SIDE, 10
    matrix = np.random.default_rng(0).normal(size=(side * side * 3, classes)).astype(np.float32) * 0.2
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], [output]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(255), "scale"),
        numpy_helper.from_array(matrix, "matrix"),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("pixels", kind, [batch, side, side, 3])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, classes])],
        constants,
    )
    created = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(created, {"fedkd": json.dumps(about)})
    return created


def write(path: Path, **changes: Any) -> Path:
    """Write a toy network and return its path."""
    onnx.save(model(**changes), path)
    return path


@contextmanager
def serving(file, **limits):
    """The address of a server in a thread, and the state of its routes."""
    limits = web.Limits(**{"timeout": 120.0} | limits)  # a slow machine is no slow client
    app = web.app(network.load(file), limits)
    with http.listen("127.0.0.1", 0) as listening:
        server = http.server(app, limits.timeout)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def noise(seed=0, size=(SIDE, SIDE), channels=3):
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stream, kind, **options)
    return stream.getvalue()


def direct(file, pixels):
    """Probabilities [C] by ONNX Runtime only."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixels": pixels[None]})
    powers = np.exp(logits[0].astype(float))
    return powers / powers.sum()


def probs(answer):
    return [one["probability"] for one in sorted(answer["probabilities"], key=lambda one: one["class"])]
