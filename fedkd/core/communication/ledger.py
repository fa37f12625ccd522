"""The byte ledger: what tensors and messages take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of tensors: as float32, as encoded by a codec, and at the entropy bound of their symbols.

    Floats and integers are not symbols of a small alphabet; for them the bound is the encoded size.
    """

    float32: int = 0
    encoded: int = 0
    entropy_bound: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.float32 + other.float32, self.encoded + other.encoded, self.entropy_bound + other.entropy_bound
        )


@dataclass(frozen=True)
class SerializedBytes:
    """Bytes of the records of messages, as serialized: of arrays, and of metadata (settings and metrics)."""

    downlink_arrays: int = 0
    uplink_arrays: int = 0
    downlink_metadata: int = 0
    uplink_metadata: int = 0

    def __add__(self, other: SerializedBytes) -> SerializedBytes:
        return SerializedBytes(
            self.downlink_arrays + other.downlink_arrays,
            self.uplink_arrays + other.uplink_arrays,
            self.downlink_metadata + other.downlink_metadata,
            self.uplink_metadata + other.uplink_metadata,
        )


def break_even(weights: int, weight_bits: float, classes: int, label_bits: float) -> float:
    """The number of proxy samples at which soft labels take as many bytes as the weights: |theta| b_w / (C b_l)."""
    return weights * weight_bits / (classes * label_bits)


def is_soft_label(name: str) -> bool:
    """Whether a tensor holds soft labels: its name ends in ``probs`` or ``logits``."""
    return name.rpartition("/")[2] in ("probs", "logits")
