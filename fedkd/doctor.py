"""``python -m fedkd.doctor``: whether runs work on this machine, and what to do if not."""

from __future__ import annotations

import json as json_
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from fedkd.core import cache, cli, memory, runtime
from fedkd.core.environment import PACKAGES
from fedkd.core.errors import DataError, FedkdError, RunError, StorageError, last_line
from fedkd.core.report.text import size

if TYPE_CHECKING:
    from fedkd.data.sources import Source

app = cli.new("doctor")
MARKS = {"ok": "✓", "note": "·", "problem": "✗"}
LEAST_MEMORY, LEAST_DISK = 2 * 10**9, 200 * 10**6  # bytes for a small run
CPU_LIMITS = ("cpu.max", "cpu/cpu.cfs_quota_us")  # of a container: "QUOTA PERIOD", or the quota of 100,000 us
#: Torchvision's folders, and their archives.
TORCHVISION = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}
#: Packages that some commands need, by the extra that installs them.
EXTRAS = {
    "ray": ("ray",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "serve": ("starlette", "uvicorn", "multipart"),
    "heic": ("pi_heif",),
    "bench": ("psutil",),
    "mobile": ("executorch",),
    "dev": ("pytest", "playwright"),
}


@dataclass(frozen=True)
class Finding:
    """A line of the report. With a problem, no run works; ``code`` is then the exit code, and ``advice`` what to do."""

    name: str
    mark: Literal["ok", "note", "problem"]
    text: str
    advice: str = ""
    code: int = 0


def problem(name: str, text: str, advice: str, kind: type[FedkdError] = RunError) -> Finding:
    """What keeps runs from working."""
    return Finding(name, "problem", text, advice, kind.code)


@app.default
def doctor(*, json: Annotated[bool, Parameter(help="Print JSON on standard output.", negative=())] = False) -> None:
    """Check this installation and this machine: packages, GPU, cores, data, folders, and a round on digits.

    The exit code is 0 if runs work, otherwise that of the first problem.
    """
    findings = []
    console = cli.Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for each in examine():
        findings.append(each)
        if not json:
            console.print(f"{MARKS[each.mark]} {each.name}: {each.text}", markup=False)
            if each.advice:
                console.print(f"    {each.advice}", markup=False)
    code = next((each.code for each in findings if each.code), 0)
    if json:
        print(json_.dumps({"works": not code, "findings": [asdict(each) for each in findings]}, indent=2))
    if code:
        sys.exit(code)


def examine() -> Iterator[Finding]:
    """All findings, as they are made. What needs PyTorch is left out if that cannot be imported."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}")
    broken = False
    for name in PACKAGES:
        found = package(name)
        broken |= found.mark == "problem"
        yield found
    yield pair()
    yield ray()
    yield extras()
    yield cores()
    yield free_memory()
    yield from folders()
    if broken:
        return
    yield gpu()
    yield data()
    for name, check in (("computation", computation), ("run", a_round)):
        yield _checked(name, check)


def _checked(name: str, check: Callable[[], str]) -> Finding:
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return Finding(name, "ok", check())
    except (Exception, SystemExit) as error:  # whatever a broken package raises
        text = last_line(f"{type(error).__name__}: {error}")
        code = error.code if isinstance(error, FedkdError) else RunError.code
        return Finding(name, "problem", text, "If the packages above are in order, please report this.", code)


def package(name: str) -> Finding:
    """Whether a package is there and can be imported, and its version."""
    advice = f"Install it again: pip install --force-reinstall {name}"
    try:
        version = metadata.version(name)
        import_module(name.replace("-", "_"))
    except metadata.PackageNotFoundError:
        return problem(name, "is not installed", "Install fedkd with what it needs: pip install -e .")
    except (Exception, SystemExit) as error:  # a library that does not load, an operator that does not exist
        return problem(name, last_line(f"{version} cannot be imported: {type(error).__name__}: {error}"), advice)
    return Finding(name, "ok", version)


def pair() -> Finding:
    """Whether torch is the version that torchvision was built for."""
    wanted, found = _wanted("torchvision", "torch"), _version("torch")
    if not wanted or not found:
        return Finding("torch and torchvision", "note", "whether they fit each other is not known")
    fits = _fits(found, wanted)
    text = f"torchvision {_version('torchvision')} wants torch{wanted}, and {found} is installed"
    if not fits:
        both = f"pip install torch{wanted} torchvision=={_version('torchvision')}"
        return problem("torch and torchvision", text, f"Install a pair: {both}")
    return Finding("torch and torchvision", "ok", text)


def ray() -> Finding:
    """Whether ``--engine ray`` works."""
    wanted, found = _wanted("flwr", "ray"), _version("ray")
    if not found:
        return Finding("ray", "note", "is not installed", "Only --engine ray needs it: pip install 'fedkd[ray]'")
    if wanted and not _fits(found, wanted):
        text = f"{found}, but flwr wants ray{wanted}"
        return Finding("ray", "note", text, f"For --engine ray: pip install 'ray{wanted}'")
    return Finding("ray", "ok", found)


def extras() -> Finding:
    """Which optional packages are there."""
    missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in EXTRAS.items()}
    lacking = [f"{', '.join(names)} (pip install 'fedkd[{extra}]')" for extra, names in missing.items() if names]
    there = [name for extra, names in EXTRAS.items() for name in names if name not in missing[extra]]
    text = f"{', '.join(there) or 'none'}" + (f"; not installed: {'; '.join(lacking)}" if lacking else "")
    return Finding("optional packages", "note" if lacking else "ok", text)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _wanted(package: str, name: str) -> str:
    """The versions of ``name`` that a package declares, as ``==2.10.0``; empty if it declares none."""
    from packaging.requirements import Requirement

    try:
        declared = map(Requirement, metadata.requires(package) or ())
    except metadata.PackageNotFoundError:
        return ""
    return next((str(each.specifier) for each in declared if each.name.lower() == name), "")


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def cores() -> Finding:
    """The cores of this process, and the limit of a container."""
    usable, limit = runtime.cores(), _cpu_limit()
    text = f"{usable} of {os.cpu_count()} usable, so many workers by default"
    if limit is not None and limit < usable:
        few = max(1, int(limit))
        return Finding("cores", "note", f"{text}, but a container limits them to {limit:g}", f"Use --workers {few}.")
    return Finding("cores", "ok", text)


def _cpu_limit() -> float | None:
    for name in CPU_LIMITS:
        try:
            quota, *period = (memory.CGROUP / name).read_text().split()
            return int(quota) / int(period[0] if period else 100_000) if int(quota) > 0 else None
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def free_memory() -> Finding:
    """The RAM that a run can use."""
    free = memory.available()
    if free is None:
        return Finding("memory", "note", "how much is free is not known")
    few = free < LEAST_MEMORY
    return Finding("memory", "note" if few else "ok", f"{size(free)} free", "Use --workers 1." if few else "")


def folders() -> Iterator[Finding]:
    """Whether the current folder and the cache can be written."""
    for name, folder in (("runs", Path.cwd()), ("cache", cache.directory())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            text = f"{folder} cannot be written ({error.strerror})"
            if name == "cache":  # a run does without it
                yield Finding(name, "note", text, "Set FEDKD_CACHE to another folder; data is decoded anew until then.")
            else:
                yield problem(name, text, "Change to a folder that can be written, or use --out.", StorageError)
            continue
        if free < LEAST_DISK:
            yield problem(name, f"{folder} has {size(free)} left", "Free some space.", StorageError)
        else:
            yield Finding(name, "ok", f"{folder}, {size(free)} free")


def gpu() -> Finding:
    """What PyTorch sees."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name, built = torch.cuda.get_device_name(), torch.version.cuda or torch.version.hip
        return Finding("gpu", "ok", f"{name}, {size(free)} of {size(total)} free, CUDA {built}")
    if shutil.which("nvidia-smi"):
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch cannot use it"
        advice = "Install PyTorch for the driver that nvidia-smi shows (pytorch.org); runs use the CPU until then."
        return Finding("gpu", "note", f"there is an NVIDIA driver, but {why}", advice)
    if torch.backends.mps.is_available():
        return Finding("gpu", "note", "MPS is there, but fedkd does not use it; runs use the CPU")
    return Finding("gpu", "note", "none; runs use the CPU")


def data() -> Finding:
    """Where CIFAR-10 and CIFAR-100 are; without them, the default data set is digits."""
    from fedkd.data import places, sources

    found = []
    try:
        for source in (sources.cifar10(), sources.cifar100()):
            found += [f"{source.name} in {place}" for place in _places(source)][:1]
        if (root := places.chosen("")) and not any(each.startswith("cifar10 ") for each in found):
            advice = "Name the folder of CIFAR-10, unset FEDKD_DATA, or use --dataset digits."
            return problem("data", f"FEDKD_DATA is {root}, where CIFAR-10 is not", advice, DataError)
    except DataError as error:
        return problem("data", str(error), "Fetch these files again.", DataError)
    if found:
        return Finding("data", "ok", ", ".join(found))
    text = "CIFAR-10 is not there; a run downloads it, or uses digits, which are bundled"
    return Finding("data", "note", text, "Set FEDKD_DATA (or --data-dir) to its folder if you have it.")


def _places(source: Source) -> Iterator[Path]:
    """The folders and archives that hold a data set."""
    from fedkd.data import places

    train, test = (places.parquet_files(source, split, "") for split in ("train", "test"))
    if train and test:
        yield train[0].parent
    extracted, archive = TORCHVISION[source.folder]
    for root in places.searched(""):
        for folder in places.torchvision_folders(source, root, extracted, [archive]):
            yield from filter(Path.exists, (folder / extracted, folder / archive))


def computation() -> str:
    """Two batches of training, twice.

    Raises:
        RunError: the results differ, or are not finite.

    """
    import torch

    def trained() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.randn(64, 3, 8, 8, generator=generator), torch.arange(64) % 10
        weights = (0.1 * torch.randn(10, 192, generator=generator)).requires_grad_()
        for batch in (slice(0, 32), slice(32, 64)):
            loss = torch.nn.functional.cross_entropy(images[batch].flatten(1) @ weights.T, labels[batch])
            (gradient,) = torch.autograd.grad(loss, weights)
            weights = (weights - 0.1 * gradient).detach().requires_grad_()
        return weights.detach()

    first, second = trained(), trained()
    if not first.isfinite().all() or not torch.equal(first, second):
        raise RunError("PyTorch computes something else the second time")
    return "two batches, twice: the same bits"


def a_round() -> str:
    """A round of two clients on digits, in a folder that is removed."""
    from fedkd.core.config import Config
    from fedkd.simulate import simulate

    options = {"dataset": "digits", "proxy": "holdout:size=20", "clients": 2, "rounds": 1, "model": "cnn:width=4"}
    with tempfile.TemporaryDirectory(prefix="fedkd-doctor-") as folder:
        quick = {"local_steps": 2, "distill_steps": 2, "workers": "1", "device": "cpu", "out": f"{folder}/run"}
        simulate(Config.parse({**options, **quick}))
    return "a round of two clients on digits works"


if __name__ == "__main__":
    cli.run(app)
