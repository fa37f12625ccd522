"""``python -m fedkd.export``: a trained student in the files of other runtimes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

import fedkd
from fedkd.core import cli, run_directory, seeds, specs
from fedkd.core.errors import DataError, FedkdError, PluginError, UsageError
from fedkd.core.options import MAX_PIXELS_TEXT, SKIP_TEXT, from_file
from fedkd.core.report.screen import Screen
from fedkd.core.values import MAX_PIXELS
from fedkd.data import sources
from fedkd.export import formats
from fedkd.training import models

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.data.readers import Images
    from fedkd.data.sources import Source
    from fedkd.export.formats import Format
    from fedkd.training.models.checkpoint import Student

app = cli.new("export")
CALIBRATION = 512  # training images for the ranges of activations
MAX_SIDE = 1024  # pixels; no data set has larger images


@app.default
def export(
    run: Annotated[Path, Parameter(help="A run directory, or a student's .safetensors file.")],
    /,
    *,
    to: Annotated[
        tuple[str, ...],
        Parameter(help=f"What to write (several): {formats.LISTING}.", consume_multiple=True, negative=()),
    ] = (),
    out: Annotated[Path | None, Parameter(help="Output directory; by default that of the student.")] = None,
    model: Annotated[str, Parameter(help="The spec of a user-defined model (./file.py:Name). Its code is run.")] = "",
    dataset: Annotated[str, Parameter(help="The data set of the check; by default the student's.")] = "",
    data_dir: Annotated[str, Parameter(help="Directory of the data set; also FEDKD_DATA.")] = "",
    images: Annotated[int, Parameter(help="Check on the first N test images; 0 for all.", validator=Number(gte=0))] = 0,
    max_pixels: Annotated[int, Parameter(help=MAX_PIXELS_TEXT, validator=Number(gte=1))] = MAX_PIXELS,
    skip_damaged: Annotated[bool, Parameter(help=SKIP_TEXT)] = False,
    check: Annotated[bool, Parameter(help="Run each file on test images and compare it with the student.")] = True,
    json: Annotated[bool, Parameter(help="Print export.json on standard output.", negative=())] = False,
) -> None:
    """Write a student for ONNX Runtime, PyTorch or a phone, and check that its outputs are the same.

    Every file takes pixels uint8 [N, P, P, 3] and returns logits float32 [N, C]; the scaling is included. export.json
    and MODEL_CARD.md are written beside the files. Either everything is written or nothing.
    """
    selected = formats.select(to)
    file = _file(run)
    if dataset:
        sources.named(dataset)  # before torch is imported, so that a mistake is reported within a second
    if model:
        specs.bind("model", model, models.RESERVED)
    from fedkd.export import card
    from fedkd.export.check import grid
    from fedkd.training.models import checkpoint

    student = checkpoint.load(file, model)
    _check_student(student)
    is_calibrated = any(one.calibrated for one in selected)
    source = _source(student, dataset, max_pixels, skip_damaged) if check or is_calibrated else None
    test = _test(student, source, data_dir, images) if source and check else None
    training = _training(source, data_dir) if source and is_calibrated else None
    screen = Screen(cli.Console(stderr=json))
    place, prefix = out or file.parent, "" if file.stem == "student" else f"{file.stem}-"
    with _staged(place) as folder:
        for one in selected:
            screen.print(f"writing {place / (file.stem + one.ending)}")
            _write(one, student, folder / (file.stem + one.ending), training)
        report = _report(file, student, selected, folder, test, dataset or student.dataset)
        report["files"] = _earlier_entries(place / f"{prefix}export.json", report) | report["files"]
        run_directory.write_json(folder / f"{prefix}export.json", report)
        run_directory.write(folder / f"{prefix}MODEL_CARD.md", card.card(report, card.trained(file)))
    if test is not None:
        screen.show(grid(report))
    if json:
        print((place / f"{prefix}export.json").read_text(encoding="utf-8"), end="")


def _file(run: Path) -> Path:
    """The student's file.

    Raises:
        DataError: there is none.

    """
    if not run.is_dir():
        if not run.exists():
            raise DataError(f"There is no run or student {run}.")
        return run
    file = run / "student.safetensors"
    if file.is_file():
        return file
    if (run / "config.toml").is_file():
        method = from_file(run / "config.toml").get("algorithm", "its method")
        raise DataError(f"{run} contains no student: the run was stopped too early, or {method} has no global model.")
    raise DataError(f"{run} is not a run directory.")


def _check_student(student: Student) -> None:
    """Compute the logits of one gray image, so that an unusable student is reported before anything is written.

    Raises:
        DataError: the student cannot be built from its file, or its logits are not finite.

    """
    import torch

    if not 1 <= student.pixels <= MAX_SIDE:
        raise DataError(f"The file of the student has images of {student.pixels} pixels, which no data set has.")
    gray = torch.full((1, student.pixels, student.pixels, 3), 128, dtype=torch.uint8)
    try:
        with torch.inference_mode():
            logits = formats.with_scaling(student)(gray)
    except FedkdError:
        raise
    except Exception as error:  # a network can raise any error for images of a wrong size
        raise DataError(f"{student.model} cannot be used on {student.pixels} pixels: {_line(error)}.") from error
    if logits.shape != (1, student.classes) or not logits.isfinite().all():
        raise DataError(f"The student does not return {student.classes} finite logits; was its training interrupted?")


def _source(student: Student, dataset: str, max_pixels: int, skip_damaged: bool) -> Source:
    """The data set, by default the student's own, whose images are read as those that the student was trained on.

    Raises:
        DataError: the student's file names a data set that cannot be used.

    """
    try:
        if not dataset and specs.parse(student.dataset).is_plugin:
            raise DataError(
                f"The student has a user-defined data set, {student.dataset}; "
                "give it by --dataset, which runs its code, or skip the check by --no-check."
            )
        source = sources.named(dataset or student.dataset)
    except UsageError as error:  # not of --dataset, which has been checked
        raise DataError(
            f"The student's file names a data set that cannot be used; give it by --dataset. {error}"
        ) from error
    how = {"resize": student.resize, "max_pixels": max_pixels, "skip_damaged": skip_damaged}
    return dataclasses.replace(source, pixels=student.pixels, **how)  # type: ignore[arg-type]


def _test(student: Student, source: Source, data_dir: str, count: int) -> Images:
    """The test images for the check.

    Raises:
        DataError: they cannot be read, or have other classes.

    """
    from fedkd.data import readers

    test = readers.read(source, "test", data_dir)
    try:
        if student.names:  # a class may have no test images
            test = readers.renumbered(test, student.names, student.classes, f"The test set of {source.name}")
    except DataError as error:
        raise DataError(f"{error} Give the student's own data set.") from error
    if test.classes > student.classes:
        raise DataError(f"The classes of {source.name} are not those of the student; give its own data set.")
    return test.first(count) if count else test


def _training(source: Source, data_dir: str) -> Tensor:
    """Random training images [M, P, P, 3] for calibration."""
    import torch

    from fedkd.data import readers

    pixels = readers.read(source, "train", data_dir).pixels
    return pixels[torch.randperm(len(pixels), generator=seeds.generator(0, "calibration"))[:CALIBRATION]]


def _write(chosen: Format, student: Student, path: Path, training: Tensor | None) -> None:
    """Write one file; errors of the exporting library are reported in one sentence."""
    try:
        chosen.write(student, path, training)
    except (FedkdError, OSError):
        raise
    except Exception as error:
        kind = PluginError if specs.parse(student.model).is_plugin else UsageError
        raise kind(f"{student.model} cannot be exported to {chosen.name}: {_line(error)}.") from error


def _report(
    file: Path, student: Student, selected: list[Format], folder: Path, test: Images | None, dataset: str
) -> dict[str, Any]:
    """The content of ``export.json``: the student, each file, and their comparison if there are test images."""
    import torch

    parameters = sum(parameter.numel() for parameter in student.module().parameters())
    report: dict[str, Any] = {
        "student": {**student.about(), **_entry(file), "parameters": parameters},
        "input": {"name": "pixels", "type": "uint8", "shape": ["batch", student.pixels, student.pixels, 3]},
        "output": {"name": "logits", "type": "float32", "shape": ["batch", student.classes]},
        "files": {one.name: _about(one, folder / (file.stem + one.ending)) for one in selected},
        "environment": {
            "fedkd": fedkd.__version__,
            "torch": torch.__version__,
            "platform": platform.platform(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": 1,
        },
    }
    return (
        report if test is None else report | _checked(file, student, selected, folder, test, dataset, report["files"])
    )


def _checked(
    file: Path,
    student: Student,
    selected: list[Format],
    folder: Path,
    test: Images,
    dataset: str,
    entries: dict[str, Any],
) -> dict[str, Any]:
    """The entries of the student and of the files, with the results of the check."""
    import torch

    from fedkd.core.runtime import settle
    from fedkd.export import check

    settle(1)
    module = formats.with_scaling(student)

    def plain(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = module(pixels)
            return logits

    opened = [one.open(folder / entries[one.name]["file"]) for one in selected]
    original, expected = check.original(file, plain, test)
    for one, run in zip(selected, opened, strict=True):
        comparison = check.compare(one, expected, check.logits(run, test.pixels), test.labels)
        entries[one.name]["check"] = {"dataset": dataset, **comparison}
    latencies = check.latency([plain, *opened], test.pixels)
    for entry, times in zip([original, *(entries[one.name] for one in selected)], latencies, strict=True):
        entry["milliseconds"] = times
    return {"original": original, "files": entries}


def _about(chosen: Format, path: Path) -> dict[str, Any]:
    """The entry of a written file before the check."""
    return {
        **_entry(path),
        "runtime": f"{chosen.runtime} {version(chosen.runtime)}",
        "batch": chosen.batch,
        "calibration_images": CALIBRATION if chosen.calibrated else 0,
        "check": None,
    }


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _earlier_entries(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The entries of files that an earlier export of the same student wrote and that have not changed."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["student"]["sha256"] != report["student"]["sha256"]:
            return {}
        return {
            name: entry
            for name, entry in earlier["files"].items()
            if name not in report["files"] and entry.items() >= _entry(path.parent / entry["file"]).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@contextmanager
def _staged(place: Path) -> Iterator[Path]:
    """A temporary folder. Its files move to ``place`` at the end of the block; after an error they are deleted."""
    is_new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=place) as folder:
            yield Path(folder)
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime_ns):
                path.replace(place / path.name)
    except BaseException:
        if is_new:
            with suppress(OSError):
                place.rmdir()
        raise


def _line(error: Exception) -> str:
    """Type and message of an error on one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200].rstrip('.')}" if first else type(error).__name__
