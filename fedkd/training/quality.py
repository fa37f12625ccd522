"""The quality of a classifier: accuracy, calibration, robustness to corrupted and shifted images, and cost."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedkd.data import corruptions
from fedkd.data.readers import Images
from fedkd.data.scaling import Scaling
from fedkd.training import loop

TEACHER = "teacher"  # the candidate to whose predictions those of the others are compared
BATCHES = (1, 64)  # images per forward pass, for the latency

Results = dict[str, Any]  # the results of one candidate; can be written as JSON


@dataclass(frozen=True, eq=False)
class Candidate:
    """A classifier [B, 3, H, W] -> logits [B, C], the scaling of its input, and its file, if any."""

    module: nn.Module
    scaling: Scaling
    path: Path | None = None


class Reliability(NamedTuple):
    """For each bin: the fraction of the images, their mean confidence and accuracy; None for an empty bin."""

    share: list[float]
    confidence: list[float | None]
    accuracy: list[float | None]


def agreement(logits: Tensor, other: Tensor) -> float:
    """The fraction of images [N, C] for which both predict the same class (Stanton et al., 2021: top-1 agreement)."""
    return (logits.argmax(-1) == other.argmax(-1)).double().mean().item()


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """The reliability diagram: images by the probability of their predicted class, in bins of equal width.

    Bin m of M holds the probabilities in ((m - 1) / M, m / M] (Guo et al., 2017).
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    indices = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)  # rounding may exceed 1
    counts = torch.bincount(indices, minlength=bins)

    def means(values: Tensor) -> list[float | None]:
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, indices, values.double())
        return [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]

    return Reliability((counts.double() / len(labels)).tolist(), means(confidence), means(predicted == labels))


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of |B_m| / n * |acc(B_m) - conf(B_m)| (Guo et al., 2017)."""
    return sum(
        share * abs(accuracy - confidence)
        for share, confidence, accuracy in zip(*reliability(logits, labels, bins), strict=True)
        if confidence is not None and accuracy is not None
    )


def parameters(module: nn.Module) -> int:
    """The number of trainable parameters, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: nn.Module, pixels: int) -> int:
    """Multiply-adds for one image of ``pixels`` x ``pixels``: convolutions and matrix products only.

    Counted on a copy on the CPU without fused kernels (recurrent networks of cuDNN and oneDNN, flash attention),
    whose operations the counter does not see.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    unfused = copy.deepcopy(module).cpu().eval()
    image = torch.zeros(1, 3, pixels, pixels)
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flag of oneDNN warns about GPUs
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), torch.inference_mode(), counter:
            unfused(image)
    return int(counter.get_total_flops()) // 2


def latency(call: Callable[[], object], repeats: int = 30) -> dict[str, float]:
    """Median and quartiles of the duration of a call in seconds, after warm-up calls.

    On a GPU ``call`` must wait for its result.
    """
    for _ in range(max(3, repeats // 5)):
        call()
    durations = torch.empty(repeats, dtype=torch.float64)
    for index in range(repeats):
        start = time.perf_counter()
        call()
        durations[index] = time.perf_counter() - start
    low, median, high = durations.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "low": low, "high": high}


def size(path: Path) -> int:
    """The size of a file in bytes."""
    return path.stat().st_size


def evaluate(
    candidates: Mapping[str, Candidate],
    test: Images,
    shifted: Images | None = None,
    *,
    seed: int,
    strengths: Sequence[int] = corruptions.STRENGTHS,
    kinds: Sequence[str] = tuple(corruptions.KINDS),
    count: int = 2000,
    bins: int = 15,
    repeats: int = 30,
) -> dict[str, Results]:
    """The quality and cost of each candidate: fractions in [0, 1], NLL in nats, latency in ms; keys are text.

    All but the latency is the same for the same seed. Only the first ``count`` test images are corrupted, since twenty
    copies of all take minutes. Without ``shifted``, the test images are rotated and translated.
    """
    subset = test.first(count)
    corrupted: dict[str, dict[str, dict[str, float]]] = {name: {kind: {} for kind in kinds} for name in candidates}
    for kind in kinds:
        for strength in strengths:
            pixels = corruptions.corrupt(subset.pixels, kind, strength, seed)  # once for all candidates
            for name, candidate in candidates.items():
                corrupted[name][kind][str(strength)] = loop.score(_predict(candidate, pixels), subset.labels)[0]
    shifted_set = shifted or dataclasses.replace(test, pixels=corruptions.transformed(test.pixels, seed))
    logits = {name: _predict(candidate, test.pixels) for name, candidate in candidates.items()}
    results = {}
    for name, candidate in candidates.items():
        values = [value for row in corrupted[name].values() for value in row.values()]
        results[name] = {
            **_quality(logits[name], test.labels, None if name == TEACHER else logits.get(TEACHER), bins),
            "corrupted_images": len(subset),
            "uncorrupted_accuracy": loop.score(logits[name][:count], subset.labels)[0],
            "corruptions": corrupted[name],
            "corruption_accuracy": fmean(values) if values else None,
            "shifted": "given" if shifted else "transformed",
            "shifted_images": len(shifted_set),
            "shifted_accuracy": loop.score(_predict(candidate, shifted_set.pixels), shifted_set.labels)[0],
            **_cost(candidate, test.pixels, repeats),
        }
    return results


def _predict(candidate: Candidate, pixels: Tensor) -> Tensor:
    return loop.predict(candidate.module, pixels, candidate.scaling)


def _quality(logits: Tensor, labels: Tensor, teacher: Tensor | None, bins: int) -> Results:
    """The results on the clean test images."""
    accuracy, nll = loop.score(logits, labels)
    return {
        "images": len(labels),
        "accuracy": accuracy,
        "nll": nll,
        "ece": ece(logits, labels, bins),
        "agreement": None if teacher is None else agreement(logits, teacher),
        "reliability": reliability(logits, labels, bins)._asdict(),
    }


def _cost(candidate: Candidate, pixels: Tensor, repeats: int) -> Results:
    """Size, and latency from pixels in memory to logits in memory."""
    module = candidate.module.eval()
    device = next(module.parameters()).device

    def timed(batch: int) -> dict[str, float]:
        images = pixels[torch.arange(batch) % len(pixels)]
        with torch.inference_mode():
            durations = latency(lambda: module(candidate.scaling(images.to(device))).cpu(), repeats)
        return {key: 1000 * value for key, value in durations.items()}

    return {
        "parameters": parameters(module),
        "multiply_adds": multiply_adds(module, pixels.shape[1]),
        "bytes": None if candidate.path is None else size(candidate.path),
        "latency_ms": {str(batch): timed(batch) for batch in BATCHES},
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
