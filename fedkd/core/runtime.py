"""Settings of a process, made once before it computes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from functools import lru_cache

from fedkd.core.errors import UsageError


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(parent: int) -> None:
    """End this process as soon as its parent, the process ``parent``, has ended, whatever either of them is doing."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if sys.platform != "linux" or os.getppid() != parent:  # it had ended before the signal was set
        threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def settle(threads: int) -> None:
    """Set the number of threads (results depend on it bitwise) and keep freed memory in the process.

    A CPU is deterministic for a fixed number of threads, and requesting deterministic algorithms costs a second at the
    start. For a GPU they are requested, but without filling uninitialized memory. A GPU computes in IEEE float32 except
    where `fedkd.training.precision` says otherwise, and adds products of bfloat16 in float32.
    """
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Keep big buffers: glibc returns them at each free, and the page faults take up to 2.9 times as long on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has none
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)


def device(name: str) -> str:
    """The device to compute on; ``auto`` is the first GPU if there is one.

    Raises:
        UsageError: it cannot be used on this machine.

    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # read, since the device meta holds no values
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here{_reason(name)}; use cpu or auto.") from error
    return name


def _reason(device: str) -> str:
    """Why a GPU cannot be used, as far as PyTorch says; "" for other devices."""
    import torch

    if not device.startswith("cuda"):
        return ""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # true with ROCm, too
        return ", since this PyTorch is built without CUDA"
    count = torch.cuda.device_count()
    return f", where PyTorch finds {count} GPU{'s' * (count != 1)}"
