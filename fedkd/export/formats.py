"""The formats by name: writing and running a file. Libraries are imported only when they are used."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from fedkd.export.with_scaling import WithScaling
    from fedkd.training.models.checkpoint import Student

Run = Callable[["Tensor"], "Tensor"]  # pixels uint8 [N, P, P, 3] -> logits float32 [N, C]
OPSET = 20  # of ONNX: the first with GELU as one operator
BATCH = 64  # images per calibration batch of the quantizer


@dataclass(frozen=True)
class Format:
    """A file format: its name and ending, its runtime, the modules it needs, and functions to write and to open it.

    ``write(student, path, training)`` gets training images [M, P, P, 3] if the format is ``calibrated``;
    ``batch`` is the number of images per call, 0 for any.
    """

    name: str
    ending: str
    runtime: str
    needs: tuple[str, ...]
    extra: str
    write: Callable[[Student, Path, Tensor | None], None]
    open: Callable[[Path], Run]
    calibrated: bool = False
    batch: int = 0


def select(names: tuple[str, ...]) -> list[Format]:
    """The formats of these names, without repetitions, in the given order.

    Raises:
        UsageError: there are no names, a name is unknown, or a required module is not installed.

    """
    if not names:
        raise UsageError(f"Name a format: --to {', --to '.join(FORMATS)}.")
    formats = []
    for name in dict.fromkeys(names):
        if name not in FORMATS:
            raise UsageError(unknown("format", name, FORMATS))
        chosen = FORMATS[name]
        if missing := [module for module in chosen.needs if find_spec(module) is None]:
            raise UsageError(f"--to {name} needs {', '.join(missing)}: pip install 'fedkd[{chosen.extra}]'.")
        formats.append(chosen)
    return formats


def write_onnx(student: Student, path: Path, training: Tensor | None = None) -> None:
    """Write an ONNX file of opset `OPSET` with the student's metadata."""
    import torch

    with _quiet():
        program = torch.onnx.export(
            _traced(student),
            (),
            input_names=["pixels"],
            output_names=["logits"],
            opset_version=OPSET,
            external_data=False,
            dynamic_shapes={"pixels": {0: "batch"}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_about(student))
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # notes of the exporter
        node.doc_string = None
    program.save(path)


def write_int8(student: Student, path: Path, training: Tensor | None = None) -> None:
    """Write an ONNX file with 8-bit weights (one scale per channel) and activations, calibrated on ``training``."""
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    assert training is not None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        whole, folded, quantized = (Path(folder) / name for name in ("whole.onnx", "folded.onnx", "int8.onnx"))
        write_onnx(student, whole)
        quant_pre_process(whole, folded)
        quantize_static(folded, quantized, _CalibrationImages(training), per_channel=True)
        model = onnx.load(quantized)
    onnx.helper.set_model_props(model, _about(student))  # the quantizer adds to the metadata
    onnx.save(model, path)


def write_pt2(student: Student, path: Path, training: Tensor | None = None) -> None:
    """Write an exported program of PyTorch; the student's metadata is its extra file ``fedkd``."""
    import torch

    with _quiet():
        torch.export.save(_traced(student), path, extra_files=_about(student))


def write_pte(student: Student, path: Path, training: Tensor | None = None) -> None:
    """Write a program for ExecuTorch with the XNNPACK backend.

    It takes one image per call, since memory is planned at export for the maximum batch. Its method ``fedkd`` returns
    the student's metadata.
    """
    import torch

    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        module = with_scaling(student).to(
            memory_format=torch.contiguous_format
        )  # XNNPACK refuses weights in channels_last
        program = to_edge_transform_and_lower(
            torch.export.export(module, (_images(student, 1),)),
            partitioner=[XnnpackPartitioner()],
            constant_methods=_about(student),
        ).to_executorch()
    path.write_bytes(program.buffer)


def open_onnx(path: Path) -> Run:
    """ONNX Runtime on one thread of the CPU."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])

    return run


def open_pt2(path: Path) -> Run:
    """PyTorch, from the file only, without code of fedkd."""
    import torch

    with _quiet():
        module = torch.export.load(path).module()

    def run(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = module(pixels)
            return logits

    return run


def open_pte(path: Path) -> Run:
    """ExecuTorch on one thread, one image after the other."""
    import torch

    with _quiet():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)  # unsafe only while a program runs; there is no other function for this
    content = path.read_bytes()
    program = Runtime.get().load_program(content)
    forward = program.load_method("forward")

    def run(
        pixels: Tensor, _references: object = (content, program)
    ) -> Tensor:  # keeps them alive, which a method does not
        return torch.cat([forward.execute([image[None]])[0] for image in pixels])

    return run


FORMATS = {
    one.name: one
    for one in (
        Format("onnx", ".onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), "export", write_onnx, open_onnx),
        Format("pt2", ".pt2", "torch", (), "", write_pt2, open_pt2),
        Format("pte", ".pte", "executorch", ("executorch",), "mobile", write_pte, open_pte, batch=1),
        Format(
            "int8",
            "-int8.onnx",
            "onnxruntime",
            ("onnx", "onnxscript", "onnxruntime"),
            "export",
            write_int8,
            open_onnx,
            calibrated=True,
        ),
    )
}


def with_scaling(student: Student) -> WithScaling:
    """The network that is written in every format."""
    from fedkd.export.with_scaling import WithScaling

    return WithScaling(student.module(), student.scaling).eval()


def _traced(student: Student) -> ExportedProgram:
    """The exported program of the network, for any batch size."""
    import torch

    shapes = {"pixels": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        with_scaling(student), (_images(student, 2),), dynamic_shapes=shapes
    )  # sizes 0 and 1 would be specialized
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains local paths
    return program


def _about(student: Student) -> dict[str, str]:
    """The student's metadata as JSON, under the same key as in its own file."""
    from fedkd.training.models.checkpoint import KEY

    return {KEY: json.dumps(student.about())}


def _images(student: Student, count: int) -> Tensor:
    import torch

    return torch.zeros(count, student.pixels, student.pixels, 3, dtype=torch.uint8)


class _CalibrationImages:
    """Training images in batches, in the form of ONNX Runtime's calibration data readers."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter([images[start : start + BATCH] for start in range(0, len(images), BATCH)])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixels": batch.numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the libraries: deprecations, and memory layouts, which the check covers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


#: All formats, with the extra of fedkd that each one needs, if any.
LISTING = ", ".join(f"{one.name} (needs fedkd[{one.extra}])" if one.extra else one.name for one in FORMATS.values())
