"""The round loop: ``broadcast``, an exchange with the sampled clients, ``aggregate``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedkd.core import seeds
from fedkd.core.communication.channel import Channel, Encoded
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Expected, Failure, Reply, excluded
from fedkd.core.communication.validation import MAX_EXAMPLES, largest, validate_update
from fedkd.core.errors import RunError, last_line
from fedkd.simulate import faults

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm, Setup, Update
    from fedkd.core.communication.channel import Cache
    from fedkd.core.config import Config
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.simulate.faults import Faults


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
Exchange = Callable[[str, int, Mapping[int, "Tensors"], Mapping[int, Expected]], Iterable[Reply]]


@dataclass(frozen=True)
class Progress:
    """Everything on the server that the next round depends on, after round ``number``.

    ``channel_memory`` is the server's copy of what each client remembers of the channel, ``refusals`` how many replies
    of a client were refused in a row, ``late`` the updates that came too late for their round, and their bytes.
    """

    number: int
    state: Tensors
    channel_memory: Mapping[int, Tensors] = field(default_factory=dict)
    refusals: Mapping[int, int] = field(default_factory=dict)
    late: Mapping[int, tuple[Update, Traffic]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Round(Progress):
    """What a round gave: the server's new state, accepted updates, failures, and bytes.

    Failures and bytes are of all ``attempts``. ``duration`` is simulated (`faults.durations`), if that is asked for.
    """

    updates: Mapping[int, Update]
    failures: Sequence[Failure]
    serialized: SerializedBytes
    downlink: Traffic
    uplink: Traffic
    attempts: int = 1
    duration: float | None = None


def run_rounds(
    algorithm: Algorithm,
    setup: Setup,
    exchange: Exchange,
    clients: int,
    channel: Channel,
    *,
    samples: Sequence[int] | None = None,
    after: Progress | None = None,
) -> Iterator[Round]:
    """The rounds of a run after ``after``, one at a time. To stop early, ``break``.

    ``samples`` are the numbers of samples of the clients, if the server knows them.

    Raises:
        RunError: in some round the server accepted fewer updates than ``--min-clients``, in every attempt.

    """
    federation = _Federation(algorithm, setup, exchange, clients, channel, samples)
    progress = after or Progress(0, algorithm.initial_state(setup))
    while progress.number < setup.config.rounds:
        progress = round_ = _round(federation, progress)
        yield round_


@dataclass(frozen=True)
class _Federation:
    """What stays the same in all rounds."""

    algorithm: Algorithm
    setup: Setup
    exchange: Exchange
    clients: int
    channel: Channel
    samples: Sequence[int] | None


def _round(federation: _Federation, before: Progress) -> Round:
    """The next round: an attempt with enough updates, and the aggregate of these."""
    algorithm, setup, config = federation.algorithm, federation.setup, federation.setup.config
    attempts: list[Round] = []
    for attempt in range(config.round_retries + 1):
        last = _attempt(federation, attempts[-1] if attempts else before, before.number + 1, attempt)
        attempts.append(last)
        arrived = {client: late for client, late in before.late.items() if client not in last.updates}
        updates = dict(sorted({**{client: update for client, (update, _) in arrived.items()}, **last.updates}.items()))
        if len(updates) >= min(config.min_clients, federation.clients):
            break
    else:
        raise _too_few(attempts, len(updates), config)
    state = algorithm.aggregate(setup, before.state, updates, seeds.derive(config.seed, "tell", last.number))
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise RunError(f"Round {last.number}: the aggregate is not finite. {largest(updates)}")
    durations = [each.duration for each in attempts if each.duration is not None]
    return replace(
        last,
        state=state,
        late={c: late for each in attempts for c, late in each.late.items() if c not in last.updates},
        updates=updates,
        failures=[failure for each in attempts for failure in each.failures],
        serialized=sum((each.serialized for each in attempts), SerializedBytes()),
        downlink=sum((each.downlink for each in attempts), Traffic()),
        uplink=sum((traffic for _, traffic in arrived.values()), sum((each.uplink for each in attempts), Traffic())),
        attempts=len(attempts),
        duration=sum(durations) if durations else None,
    )


def _attempt(federation: _Federation, before: Progress, number: int, attempt: int) -> Round:
    """One exchange with sampled clients, not aggregated yet."""
    algorithm, setup, channel = federation.algorithm, federation.setup, federation.channel
    config, state = setup.config, before.state
    memories, refusals = dict(before.channel_memory), dict(before.refusals)
    left_out = excluded(refusals, config.exclude_after)
    sampled = sample(federation.clients, config.participation, config.seed, number, left_out, attempt)
    simulated = faults.parse(config.faults)
    drawn = faults.draw(simulated, config.seed, number, attempt, sampled)
    cache: Cache = {}
    # A client that fails is taken to remember nothing.
    known = {client: memories.pop(client, {}) for client in sampled}
    sent = {c: channel.encode_message(algorithm.broadcast(setup, state, c), known[c], cache) for c in sampled}
    shapes = {client: algorithm.upload_spec(setup, client, number) for client in sampled}
    sizes = {client: channel.upload_sizes(shapes[client]) for client in sampled}
    expected = {client: Expected(sizes[client], algorithm.metrics, drawn.get(client, "")) for client in sampled}
    # Each reply is checked when it arrives, so that what is refused is not held until the last one has come.
    outcomes: dict[int, tuple[Update, Encoded] | Failure] = {c: Failure(c, "no reply", "no reply") for c in sampled}
    received = dict.fromkeys(sampled, SerializedBytes())
    for reply in federation.exchange("train", number, {c: each.tensors for c, each in sent.items()}, expected):
        client, most = reply.client, federation.samples[reply.client] if federation.samples else 0
        received[client] = reply.serialized
        outcomes[client] = accept_reply(reply, algorithm, setup, shapes[client], channel, known[client], most)
    samples = federation.samples if simulated.straggler or config.round_timeout else None
    if samples and config.local_steps:
        samples = [1] * len(samples)  # all train on as many batches
    durations = _durations(samples, simulated, drawn, outcomes) if samples else {}
    updates: dict[int, Update] = {}
    late: dict[int, tuple[Update, Traffic]] = {}
    failures, uplink = list[Failure](), Traffic()
    for client, outcome in outcomes.items():
        if isinstance(outcome, Failure):
            failures.append(outcome)
            if outcome.cause == "refused":
                refusals[client] = refusals.get(client, 0) + 1
            continue
        refusals.pop(client, None)
        update, encoded = outcome
        if 0 < config.round_timeout < durations.get(client, 0.0):
            reason = f"its local update took {durations[client]:.3g}, and --round-timeout is {config.round_timeout:g}"
            failures.append(Failure(client, "late", reason))
            late |= {client: (update, encoded.traffic)} if simulated.late == "use" else {}
            continue
        updates[client], uplink = update, uplink + encoded.traffic
        if memory := channel.new_memory(number, sent[client], encoded):
            memories[client] = memory
    return Round(
        number,
        state,
        memories,
        refusals,
        late,
        updates=updates,
        failures=failures,
        serialized=sum(received.values(), SerializedBytes()),
        downlink=sum((encoded.traffic for encoded in sent.values()), Traffic()),
        uplink=uplink,
        duration=_duration(durations, len(updates) == len(sampled), config) if samples else None,
    )


def accept_reply(
    reply: Reply,
    algorithm: Algorithm,
    setup: Setup,
    shapes: Shapes,
    channel: Channel,
    memory: Tensors,
    most_examples: int = 0,
) -> tuple[Update, Encoded] | Failure:
    """The decoded update of a reply, and its encoding; or why the server refuses it.

    ``shapes`` are declared by the algorithm; ``most_examples`` is the number of samples of the client, 0 if unknown.
    """
    if reply.failure or reply.update is None:
        return Failure(reply.client, reply.cause, reply.failure or "an empty reply")
    try:
        encoded = channel.decode_update(reply.update.tensors, shapes, memory)
    except ValueError as error:
        return Failure(reply.client, "refused", f"sent what cannot be decoded: {error}")
    update = replace(reply.update, tensors=encoded.tensors)
    if fault := validate_update(
        update, shapes, algorithm.metrics, most_examples or MAX_EXAMPLES
    ) or algorithm.check_update(setup, update):
        return Failure(reply.client, "refused", fault)
    if "probs" in update.tensors:  # a codec may have changed the sums by rounding
        probs = update.tensors["probs"].double()
        update = replace(update, tensors={**update.tensors, "probs": (probs / probs.sum(-1, keepdim=True)).float()})
    return update, encoded


def _durations(
    samples: Sequence[int], simulated: Faults, drawn: Mapping[int, str], outcomes: Mapping[int, object]
) -> dict[int, float]:
    """The simulated duration of the local update of each client that replied."""
    replied = {c: samples[c] for c, outcome in outcomes.items() if not isinstance(outcome, Failure)}
    return faults.durations(simulated, replied, sum(samples) / len(samples), drawn)


def _duration(durations: Mapping[int, float], is_complete: bool, config: Config) -> float:
    """How long the server waits: for the last reply, or for those that do not come until ``--round-timeout``."""
    is_last = is_complete or not config.round_timeout
    return max(durations.values(), default=0.0) if is_last else config.round_timeout


def _too_few(attempts: Sequence[Round], count: int, config: Config) -> RunError:
    """The error that ends a run."""
    number, failures = attempts[-1].number, [failure for each in attempts for failure in each.failures]
    if not attempts[-1].failures:
        return RunError(f"Round {number}: {count or 'no'} clients are left; the others are excluded (--exclude-after).")
    sampled = len(attempts[-1].failures) + len(attempts[-1].updates)
    first = min(attempts[-1].failures, key=lambda failure: failure.client)
    times = f" in the last of {len(attempts)} attempts" if len(attempts) > 1 else ""
    limit = f", fewer than --min-clients {config.min_clients}" if count else ""
    return RunError(
        f"Round {number}: {count or 'none'} of {sampled} clients sent a usable update{times}{limit}; "
        f"client {first.client}: {last_line(first.reason)}.",
        details="\n".join(f"client {failure.client}\n{failure.reason}" for failure in failures),
    )


def participants(clients: int, participation: float) -> int:
    """The number of clients that are sampled in a round: at least one."""
    return max(1, round(clients * participation))


def sample(
    clients: int,
    participation: float,
    seed: int,
    number: int,
    left_out: Collection[int] = (),
    attempt: int = 0,
) -> list[int]:
    """The clients of an attempt at a round, sorted: sampled without replacement from those that are not left out."""
    left = [client for client in range(clients) if client not in left_out] if left_out else range(clients)
    wanted = min(participants(clients, participation), len(left))
    if wanted == len(left):
        return list(left)
    path = ("participation", number, attempt) if attempt else ("participation", number)
    drawn = seeds.rng(seed, *path).choice(len(left), size=wanted, replace=False, shuffle=False)
    return sorted(left[int(place)] for place in drawn)
