"""The peak throughput of this processor in GFLOP/s."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

SECONDS = 1.0  # duration of each measurement


def matrix_product(size: int = 2048) -> float:
    """GFLOP/s of the product of two square float32 matrices."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _seconds(lambda: left @ right) / 1e9


def convolution(channels: int = 64, pixels: int = 8, batch: int = 64) -> float:
    """GFLOP/s of a 3x3 convolution in float32 and channels_last, with the fastest shape of the cnn."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(batch, channels, pixels, pixels).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return 2 * batch * pixels**2 * channels**2 * 9 / _seconds(lambda: layer(images)) / 1e9


def _seconds(compute: Callable[[], object]) -> float:
    """The median time of a call in seconds."""
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return median(times[len(times) // 4 :])


def main() -> None:
    """``python -m fedkd.bench.peak THREADS``: print a JSON object."""
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({"matrix_product": matrix_product(), "convolution": convolution()}))


if __name__ == "__main__":
    main()
