"""How good a classifier is: what it knows, how well it knows that, what hard images do to it, and what it costs."""

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

TEACHER = "teacher"  # the candidate whose answers the others are held against
BATCHES = (1, 64)  # images a forward pass whose time is taken

Verdict = dict[str, Any]  # what is found about one candidate, as JSON can hold it


@dataclass(frozen=True, eq=False)
class Candidate:
    """A classifier [B, 3, H, W] -> logits [B, C], how pixels become its input, and the file it lies in, if any."""

    module: nn.Module
    scaling: Scaling
    path: Path | None = None


class Reliability(NamedTuple):
    """Of each bin: the share of the images, their mean confidence and accuracy; None where there is no image."""

    share: list[float]
    confidence: list[float | None]
    accuracy: list[float | None]


def agreement(logits: Tensor, other: Tensor) -> float:
    """The share of images [N, C] for which both name the same class (Stanton et al., 2021: top-1 agreement)."""
    return (logits.argmax(-1) == other.argmax(-1)).double().mean().item()


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """The reliability diagram: images by the probability of their predicted class, in bins of equal width.

    Bin m of M holds the probabilities in ((m - 1) / M, m / M] (Guo et al., 2017).
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    places = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)  # rounding may lead beyond one
    counts = torch.bincount(places, minlength=bins)

    def means(values: Tensor) -> list[float | None]:
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, values.double())
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
    """How many numbers are trained; buffers are none of them."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(module: nn.Module, pixels: int) -> int:
    """Multiplications with an addition for one image of ``pixels`` a side: convolutions and matrix products alone.

    Counted on a CPU copy that is kept from fused kernels (cuDNN's and oneDNN's recurrent networks, flash attention),
    since what happens inside of those is not seen.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    alone = copy.deepcopy(module).cpu().eval()
    image = torch.zeros(1, 3, pixels, pixels)
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the flag of oneDNN speaks of GPUs that nobody has
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), torch.inference_mode(), counter:
            alone(image)
    return int(counter.get_total_flops()) // 2


def latency(call: Callable[[], object], repeats: int = 30) -> dict[str, float]:
    """Median and quartiles of the seconds a call takes, after calls that warm up.

    On a GPU ``call`` must wait for its result.
    """
    for _ in range(max(3, repeats // 5)):
        call()
    taken = torch.empty(repeats, dtype=torch.float64)
    for index in range(repeats):
        start = time.perf_counter()
        call()
        taken[index] = time.perf_counter() - start
    low, median, high = taken.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "low": low, "high": high}


def size(path: Path) -> int:
    """The bytes of a file on disk."""
    return path.stat().st_size


def judge(
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
) -> dict[str, Verdict]:
    """What each candidate knows and costs; shares in [0, 1], NLL in nats, latency in milliseconds, keys all text.

    All but the latency is the same for the same seed. The first ``count`` test images are corrupted, since twenty
    copies of all would take minutes. Without a shifted set the test images, rotated and moved, are one.
    """
    hard = test.first(count)
    harmed: dict[str, dict[str, dict[str, float]]] = {name: {kind: {} for kind in kinds} for name in candidates}
    for kind in kinds:
        for strength in strengths:
            pixels = corruptions.corrupt(hard.pixels, kind, strength, seed)  # once for all candidates
            for name, candidate in candidates.items():
                harmed[name][kind][str(strength)] = loop.score(_answer(candidate, pixels), hard.labels)[0]
    elsewhere = shifted or dataclasses.replace(test, pixels=corruptions.moved(test.pixels, seed))
    logits = {name: _answer(candidate, test.pixels) for name, candidate in candidates.items()}
    verdicts = {}
    for name, candidate in candidates.items():
        values = [value for row in harmed[name].values() for value in row.values()]
        verdicts[name] = {
            **_knows(logits[name], test.labels, None if name == TEACHER else logits.get(TEACHER), bins),
            "corrupted_images": len(hard),
            "uncorrupted_accuracy": loop.score(logits[name][:count], hard.labels)[0],
            "corruptions": harmed[name],
            "corruption_accuracy": fmean(values) if values else None,
            "shifted": "given" if shifted else "moved",
            "shifted_images": len(elsewhere),
            "shifted_accuracy": loop.score(_answer(candidate, elsewhere.pixels), elsewhere.labels)[0],
            **_costs(candidate, test.pixels, repeats),
        }
    return verdicts


def _answer(candidate: Candidate, pixels: Tensor) -> Tensor:
    return loop.predict(candidate.module, pixels, candidate.scaling)


def _knows(logits: Tensor, labels: Tensor, teacher: Tensor | None, bins: int) -> Verdict:
    """What the clean test images tell."""
    accuracy, nll = loop.score(logits, labels)
    return {
        "images": len(labels),
        "accuracy": accuracy,
        "nll": nll,
        "ece": ece(logits, labels, bins),
        "agreement": None if teacher is None else agreement(logits, teacher),
        "reliability": reliability(logits, labels, bins)._asdict(),
    }


def _costs(candidate: Candidate, pixels: Tensor, repeats: int) -> Verdict:
    """Size and time, from pixels in memory to logits in memory."""
    module = candidate.module.eval()
    device = next(module.parameters()).device

    def timed(batch: int) -> dict[str, float]:
        images = pixels[torch.arange(batch) % len(pixels)]
        with torch.inference_mode():
            taken = latency(lambda: module(candidate.scaling(images.to(device))).cpu(), repeats)
        return {key: 1000 * value for key, value in taken.items()}

    return {
        "parameters": parameters(module),
        "multiply_adds": multiply_adds(module, pixels.shape[1]),
        "bytes": None if candidate.path is None else size(candidate.path),
        "latency_ms": {str(batch): timed(batch) for batch in BATCHES},
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
