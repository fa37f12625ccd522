"""A client's reply as the server sees it: what was expected, what came, and why it is not used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.core.communication.ledger import SerializedBytes

if TYPE_CHECKING:
    from fedkd.algorithms.base import Update

#: Why there is no accepted update of a client: nothing came, or too late; its process ended; the app raised an
#: exception; the client has lost the memory that it needs; or the server refused what it sent.
CAUSES = ("no reply", "late", "died", "error", "lost memory", "refused")


@dataclass(frozen=True)
class Failure:
    """A client without an accepted update, and why."""

    client: int
    cause: str
    reason: str


def excluded(refusals: Mapping[int, int], limit: int) -> set[int]:
    """The clients of which ``limit`` replies in a row were refused; none if it is 0."""
    return {client for client, count in refusals.items() if limit and count >= limit}


@dataclass(frozen=True)
class Reply:
    """A client's update, or the reason why there is none; and the bytes of the messages in both directions."""

    client: int
    update: Update | None
    failure: str
    serialized: SerializedBytes
    cause: str = "error"


@dataclass(frozen=True)
class Expected:
    """What the reply of a client may hold: the most bytes of each tensor, and metrics; and a fault to simulate."""

    sizes: Mapping[str, int]
    metrics: Collection[str] = ()
    fault: str = ""
