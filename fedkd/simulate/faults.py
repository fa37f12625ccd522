"""Simulated faults of clients, drawn for each client of a round: repeatable, and the same on every engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedkd.core import seeds
from fedkd.core.errors import UsageError, unknown

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

#: What a client that sends a corrupt reply sends: see `fedkd.simulate.flower.client_app`.
CORRUPT = ("nan", "shape", "dtype", "missing", "extra", "oversized")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Faults:
    """The probabilities of each fault for a client in a round; at most one occurs.

    ``dropout``: no reply. ``straggler``: the local update takes ``slowdown`` times as long. ``crash``: the process of
    the client ends during the local update. ``corrupt``: the reply is one of `CORRUPT`. A reply that is ``late`` is
    dropped, or used in the next round.
    """

    dropout: Probability = 0.0
    straggler: Probability = 0.0
    slowdown: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    crash: Probability = 0.0
    corrupt: Probability = 0.0
    late: Literal["drop", "use"] = "drop"


@lru_cache
def parse(text: str) -> Faults:
    """The faults that a text such as ``dropout=0.3,straggler=0.2:slowdown=10`` names.

    Raises:
        UsageError: an unknown fault, or a value that is no probability.

    """
    values: dict[str, str] = {}
    for item in filter(None, re.split("[,:]", text.replace(" ", ""))):
        key, equals, value = item.partition("=")
        known = Faults.__dataclass_fields__
        if key not in known:
            raise UsageError(unknown("fault in --faults:", key, known))
        if not equals or key in values:
            raise UsageError(f"Cannot read {item!r} in --faults; write dropout=0.3,crash=0.1.")
        values[key] = value
    try:
        faults = TypeAdapter(Faults).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        given = f"{first['loc'][0]}={first['input']}"
        raise UsageError(f"--faults {given} is not usable: {first['msg'].lower()}.") from error
    if "slowdown" in values and not faults.straggler:
        raise UsageError("slowdown in --faults needs stragglers: straggler=0.2:slowdown=10.")
    if faults.dropout + faults.straggler + faults.crash + faults.corrupt > 1:
        raise UsageError("The probabilities in --faults sum to more than 1.")
    return faults


def draw(faults: Faults, seed: int, number: int, attempt: int, clients: Iterable[int]) -> dict[int, str]:
    """The clients that have a fault in an attempt at a round: dropout, straggler, crash, or one of `CORRUPT`."""
    rates = {"dropout": faults.dropout, "straggler": faults.straggler, "crash": faults.crash, "": faults.corrupt}
    drawn: dict[int, str] = {}
    if not any(rates.values()):
        return drawn
    for client in clients:
        rng = seeds.rng(seed, "faults", number, attempt, client)
        place = rng.random()
        for name, rate in rates.items():
            if place < rate:
                drawn[client] = name or CORRUPT[rng.integers(len(CORRUPT))]
                break
            place -= rate
    return drawn


def durations(faults: Faults, samples: Mapping[int, int], mean: float, drawn: Mapping[int, str]) -> dict[int, float]:
    """The simulated duration of each client's local update; 1 is that of a client with the mean number of samples."""
    slow = {client: faults.slowdown if drawn.get(client) == "straggler" else 1.0 for client in samples}
    return {client: count / mean * slow[client] for client, count in samples.items()}
