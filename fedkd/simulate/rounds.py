"""The one round loop: ``ask``, an exchange with the chosen clients, ``tell``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Update
from fedkd.communication.channel import Load, Packed, Wire
from fedkd.core import seeds
from fedkd.core.errors import RunError
from fedkd.core.tensors import Int64, UInt8

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm
    from fedkd.communication.channel import Made
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.trainer import Kit


KINDS = {Int64: "torch.int64", UInt8: "torch.uint8"}
LARGEST = 1e6  # of a logit: what is beyond has diverged, and would be infinite when it is divided by T
VASTEST = 1e30  # of a metric, so that their sum is finite
CLOSE = 5e-3  # to one: what bfloat16 does to the sum of a distribution


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


#: Sends each client its request in a round and yields their replies as they come, in any order.
Exchange = Callable[[str, int, Mapping[int, "Tensors"]], Iterable[Reply]]


@dataclass(frozen=True)
class Round:
    """What a round left: the server's new state, who answered, who failed and why, and bytes.

    ``remembered`` is what the server knows that clients remember of the wire.
    """

    number: int
    state: Tensors
    updates: Mapping[int, Update]
    failures: Mapping[int, str]
    traffic: Traffic
    down: Load
    up: Load
    remembered: Mapping[int, Tensors]


def play(
    algorithm: Algorithm,
    kit: Kit,
    exchange: Exchange,
    clients: int,
    wire: Wire,
    *,
    state: Tensors | None = None,
    remembered: Mapping[int, Tensors] | None = None,
    start: int = 1,
) -> Iterator[Round]:
    """The rounds of a run, one at a time.

    Stopping early is ``break``, going on is a round's state and what is remembered.

    Raises:
        RunError: in some round no client gave a usable answer.

    """
    config = kit.config
    state = algorithm.init(kit) if state is None else state
    known = dict(remembered or {})
    for number in range(start, config.rounds + 1):
        chosen = sample(clients, config.participation, config.seed, number)
        made: Made = {}
        held = {client: known.pop(client, {}) for client in chosen}  # whoever fails is taken to remember nothing
        asked = {c: wire.ask(algorithm.ask(kit, state, c), held[c], made) for c in chosen}
        requests = {client: packed.tensors for client, packed in asked.items()}
        replies = sorted(exchange("train", number, requests), key=lambda r: r.client)
        updates, failures = dict[int, Update](), dict.fromkeys(chosen, "no reply")
        traffic, up = Traffic(), Load()
        for reply in replies:
            traffic += reply.traffic
            outcome = admit(reply, algorithm, kit, state, wire, held[reply.client])
            if isinstance(outcome, str):
                failures[reply.client] = outcome
                continue
            update, packed = outcome
            failures.pop(reply.client)
            updates[reply.client], up = update, up + packed.load
            if memory := wire.memory(number, asked[reply.client], packed):
                known[reply.client] = memory
        if not updates:
            first = min(failures)
            raise RunError(
                f"Round {number}: none of {len(chosen)} clients gave a usable answer; "
                f"client {first}: {last_line(failures[first])}.",
                details="\n".join(f"client {client}\n{failures[client]}" for client in sorted(failures)),
            )
        state = algorithm.tell(kit, state, updates, seeds.derive(config.seed, "tell", number))
        down = sum((packed.load for packed in asked.values()), Load())
        yield Round(number, state, updates, failures, traffic, down, up, dict(known))


def admit(
    reply: Reply, algorithm: Algorithm, kit: Kit, state: Tensors, wire: Wire, held: Tensors
) -> tuple[Update, Packed] | str:
    """The update in a reply, and how it went; or why the server does not count it."""
    if reply.failure or reply.update is None:
        return reply.failure or "an empty reply"
    shapes = algorithm.sends(kit, state, reply.client)
    try:
        packed = wire.tell(reply.update.tensors, shapes, held)
    except ValueError as error:
        return f"sent what cannot be decoded: {error}"
    update = replace(reply.update, tensors=packed.tensors)
    if fault := refusal(update, shapes) or algorithm.objection(kit, update):
        return fault
    if "probs" in update.tensors:  # rounding on the way moved the sums
        probs = update.tensors["probs"].double()
        update = replace(update, tensors={**update.tensors, "probs": (probs / probs.sum(-1, keepdim=True)).float()})
    return update, packed


def last_line(failure: str) -> str:
    """The end of a traceback is what a person wants to read; the whole of it goes to ``errors.log``."""
    return (failure.strip().splitlines() or ["no reason given"])[-1].rstrip(".")


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


def refusal(update: Update, declared: Shapes) -> str:
    """Why the server does not count an update; empty if it does.

    Names, shapes and kinds must be those the algorithm declares, values finite, ``probs`` distributions.
    """
    if set(update.tensors) != set(declared):
        return f"sent {sorted(update.tensors)} instead of {sorted(declared)}"
    if not (update.examples > 0 and all(abs(value) <= VASTEST for value in update.metrics.values())):
        return "sent no examples, or a metric that is not finite"
    for name, tensor in update.tensors.items():
        if not _fits(tuple(tensor.shape), declared[name]):
            return f"sent {name} of shape {tuple(tensor.shape)} instead of {declared[name]}"
        kind = KINDS.get(type(declared[name]), "torch.float32")
        if str(tensor.dtype) != kind:
            return f"sent {name} of type {tensor.dtype} instead of {kind}"
        if not tensor.isfinite().all():
            return f"sent {name} with values that are not finite"
        if name == "logits" and (tensor.abs() > LARGEST).any():
            return f"sent logits beyond {LARGEST:,.0f}"
        if name == "probs" and not ((tensor >= 0).all() and ((tensor.double().sum(-1) - 1).abs() < CLOSE).all()):
            return "sent probs that are not distributions"
    return ""


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a shape is the declared one, in which -n stands for at most n."""
    return len(shape) == len(declared) and all(
        have <= -wanted if wanted < 0 else have == wanted for have, wanted in zip(shape, declared, strict=True)
    )
