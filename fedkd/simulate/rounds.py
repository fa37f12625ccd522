"""The round loop: ``broadcast``, an exchange with the sampled clients, ``aggregate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Update
from fedkd.communication.channel import Channel, Encoded
from fedkd.communication.ledger import SerializedBytes, Traffic
from fedkd.communication.validation import validate_update
from fedkd.core import seeds
from fedkd.core.errors import RunError, last_line

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm, Setup
    from fedkd.communication.channel import Cache
    from fedkd.core.tensors import Tensors


@dataclass(frozen=True)
class Reply:
    """A client's update, or the reason why there is none; and the bytes of the messages in both directions."""

    client: int
    update: Update | None
    failure: str
    serialized: SerializedBytes


@dataclass
class Memories:
    """Which of its memories each client uses, by the round that left it: ``latest``, and ``kept`` for a resume.

    A client's latest memory is that of the last round in which its reply arrived. ``run`` names the run, so that the
    memories of another one do not count.
    """

    run: str  # not empty: Flower cannot count the bytes of an empty text
    latest: dict[int, int] = field(default_factory=dict)
    kept: Mapping[int, int] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)  # names of the files of client memories


#: Sends each client its message in a round and yields the replies as they arrive, in any order.
Exchange = Callable[[str, int, Mapping[int, "Tensors"]], Iterable[Reply]]


@dataclass(frozen=True)
class Round:
    """What a round gave: the server's new state, accepted updates, failures with their reasons, and bytes.

    ``channel_memory`` is the server's copy of what each client remembers of the channel.
    """

    number: int
    state: Tensors
    updates: Mapping[int, Update]
    failures: Mapping[int, str]
    serialized: SerializedBytes
    downlink: Traffic
    uplink: Traffic
    channel_memory: Mapping[int, Tensors]


def run_rounds(
    algorithm: Algorithm,
    setup: Setup,
    exchange: Exchange,
    clients: int,
    channel: Channel,
    *,
    state: Tensors | None = None,
    channel_memory: Mapping[int, Tensors] | None = None,
    start: int = 1,
) -> Iterator[Round]:
    """The rounds of a run, one at a time.

    To stop early, ``break``. To continue, pass the state and the channel memory of a round.

    Raises:
        RunError: in some round the server accepted no update.

    """
    config = setup.config
    state = algorithm.initial_state(setup) if state is None else state
    memories = dict(channel_memory or {})
    for number in range(start, config.rounds + 1):
        sampled = sample(clients, config.participation, config.seed, number)
        cache: Cache = {}
        # A client that fails is taken to remember nothing.
        known = {client: memories.pop(client, {}) for client in sampled}
        sent = {c: channel.encode_message(algorithm.broadcast(setup, state, c), known[c], cache) for c in sampled}
        messages = {client: encoded.tensors for client, encoded in sent.items()}
        replies = sorted(exchange("train", number, messages), key=lambda r: r.client)
        updates, failures = dict[int, Update](), dict.fromkeys(sampled, "no reply")
        serialized, uplink = SerializedBytes(), Traffic()
        for reply in replies:
            serialized += reply.serialized
            outcome = accept_reply(reply, algorithm, setup, state, channel, known[reply.client])
            if isinstance(outcome, str):
                failures[reply.client] = outcome
                continue
            update, encoded = outcome
            failures.pop(reply.client)
            updates[reply.client], uplink = update, uplink + encoded.traffic
            if memory := channel.new_memory(number, sent[reply.client], encoded):
                memories[reply.client] = memory
        if not updates:
            first = min(failures)
            raise RunError(
                f"Round {number}: none of {len(sampled)} clients sent a usable update; "
                f"client {first}: {last_line(failures[first])}.",
                details="\n".join(f"client {client}\n{failures[client]}" for client in sorted(failures)),
            )
        state = algorithm.aggregate(setup, state, updates, seeds.derive(config.seed, "tell", number))
        downlink = sum((encoded.traffic for encoded in sent.values()), Traffic())
        yield Round(number, state, updates, failures, serialized, downlink, uplink, dict(memories))


def accept_reply(
    reply: Reply, algorithm: Algorithm, setup: Setup, state: Tensors, channel: Channel, memory: Tensors
) -> tuple[Update, Encoded] | str:
    """The decoded update of a reply, and its encoding; or why the server refuses it."""
    if reply.failure or reply.update is None:
        return reply.failure or "an empty reply"
    shapes = algorithm.upload_spec(setup, state, reply.client)
    try:
        encoded = channel.decode_update(reply.update.tensors, shapes, memory)
    except ValueError as error:
        return f"sent what cannot be decoded: {error}"
    update = replace(reply.update, tensors=encoded.tensors)
    if fault := validate_update(update, shapes) or algorithm.check_update(setup, update):
        return fault
    if "probs" in update.tensors:  # a codec may have changed the sums by rounding
        probs = update.tensors["probs"].double()
        update = replace(update, tensors={**update.tensors, "probs": (probs / probs.sum(-1, keepdim=True)).float()})
    return update, encoded


def participants(clients: int, participation: float) -> int:
    """The number of clients that are sampled in a round: at least one."""
    return max(1, round(clients * participation))


def sample(clients: int, participation: float, seed: int, number: int) -> list[int]:
    """The clients of a round, sorted: sampled without replacement."""
    wanted = participants(clients, participation)
    if wanted == clients:
        return list(range(clients))
    drawn = seeds.rng(seed, "participation", number).choice(clients, size=wanted, replace=False, shuffle=False)
    return sorted(int(client) for client in drawn)
