"""The one round loop: ``ask``, an exchange with the chosen clients, ``tell``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd import seeds
from fedkd.algorithm import Update
from fedkd.errors import RunError

if TYPE_CHECKING:
    from fedkd.algorithm import Algorithm
    from fedkd.kit import Kit
    from fedkd.tensors import Tensors


@dataclass(frozen=True)
class Traffic:
    """Bytes of the records of some messages, as serialized: arrays, and what rides along."""

    arrays_down: int = 0
    arrays_up: int = 0
    rest_down: int = 0
    rest_up: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.arrays_down + other.arrays_down,
            self.arrays_up + other.arrays_up,
            self.rest_down + other.rest_down,
            self.rest_up + other.rest_up,
        )


@dataclass(frozen=True)
class Reply:
    """A client's answer, or the reason why there is none; and what it weighed on the wire."""

    client: int
    update: Update | None
    failure: str
    traffic: Traffic


#: Sends a request to clients in a round and yields their replies as they come, in any order.
Exchange = Callable[[str, int, list[int], "Tensors"], Iterable[Reply]]


@dataclass(frozen=True)
class Round:
    """What a round left: the server's new state, who answered, who failed and why, and bytes."""

    number: int
    state: Tensors
    updates: Mapping[int, Update]
    failures: Mapping[int, str]
    traffic: Traffic


def play(
    algorithm: Algorithm,
    kit: Kit,
    exchange: Exchange,
    clients: int,
    *,
    state: Tensors | None = None,
    start: int = 1,
) -> Iterator[Round]:
    """The rounds of a run, one at a time. Stopping early is ``break``.

    Raises:
        RunError: in some round no client gave a usable answer.

    """
    config = kit.config
    state = algorithm.init(kit) if state is None else state
    for number in range(start, config.rounds + 1):
        chosen = sample(clients, config.participation, config.seed, number)
        replies = sorted(exchange("train", number, chosen, algorithm.ask(kit, state)), key=lambda r: r.client)
        updates, failures, traffic = {}, {}, Traffic()
        for reply in replies:
            traffic += reply.traffic
            fault = reply.failure or refusal(reply.update, algorithm.sends(kit))
            if fault:
                failures[reply.client] = fault
            elif reply.update is not None:
                updates[reply.client] = reply.update
        failures |= {c: "no reply" for c in chosen if c not in updates and c not in failures}
        if not updates:
            first = min(failures)
            raise RunError(
                f"Round {number}: none of {len(chosen)} clients gave a usable answer; "
                f"client {first}: {last_line(failures[first])}.",
                details="\n".join(f"client {client}\n{failures[client]}" for client in sorted(failures)),
            )
        state = algorithm.tell(kit, state, updates, seeds.derive(config.seed, "tell", number))
        yield Round(number, state, updates, failures, traffic)


def last_line(failure: str) -> str:
    """The end of a traceback is what a person wants to read; the whole of it goes to ``errors.log``."""
    return failure.strip().splitlines()[-1].rstrip(".")


def participants(clients: int, participation: float) -> int:
    """How many clients take part in a round: at least one."""
    return max(1, round(clients * participation))


def sample(clients: int, participation: float, seed: int, number: int) -> list[int]:
    """Who takes part in a round: drawn without replacement by client number, sorted."""
    wanted = participants(clients, participation)
    if wanted == clients:
        return list(range(clients))
    drawn = seeds.rng(seed, "participation", number).choice(clients, size=wanted, replace=False, shuffle=False)
    return sorted(int(client) for client in drawn)


def refusal(update: Update | None, declared: Mapping[str, tuple[int, ...]]) -> str:
    """Why the server does not count an update; empty if it does.

    Names and shapes must be those the algorithm declares, values finite, ``probs`` distributions.
    """
    if update is None:
        return "an empty reply"
    if set(update.tensors) != set(declared):
        return f"sent {sorted(update.tensors)} instead of {sorted(declared)}"
    if not (update.examples > 0 and all(math.isfinite(v) for v in update.metrics.values())):
        return "sent no examples, or a metric that is not finite"
    for name, tensor in update.tensors.items():
        if tuple(tensor.shape) != declared[name]:
            return f"sent {name} of shape {tuple(tensor.shape)} instead of {declared[name]}"
        if not tensor.isfinite().all():
            return f"sent {name} with values that are not finite"
        if name == "probs" and not ((tensor >= 0).all() and ((tensor.sum(-1) - 1).abs() < 1e-3).all()):
            return "sent probs that are not distributions"
    return ""
