"""Checkpoints of a run (one method, one seed): everything that its next round depends on.

A checkpoint is a directory ``RUN/checkpoint/NAME``: the server's state and channel memory, and with the engines of this
machine one file for each client's memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Update
from fedkd.core import checkpoint, run_directory
from fedkd.core.communication.ledger import Traffic
from fedkd.core.errors import DataError, ResumeError
from fedkd.core.tensors import put, take
from fedkd.simulate.rounds import Memories, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.simulate.rounds import Round


@dataclass(frozen=True)
class Checkpoint:
    """The end of a round: what the server needs for the next one, and which memory each client uses.

    ``best`` are the weights of the best student so far, with a validation set.
    """

    progress: Progress
    memories: Memories
    best: Tensors
    rows: str  # the digest of the rows so far

    @property
    def number(self) -> int:
        """The round."""
        return self.progress.number


def save(
    out: Path, config: Config, round_: Round, memories: Memories, best: Tensors, rows: Sequence[Mapping[str, object]]
) -> None:
    """Write the checkpoint of a round, then delete the previous one; ``memories`` keeps what it refers to."""
    folder = folder_of(out, config)
    content = put("state", round_.state) | put("best", best)
    for client, memory in round_.channel_memory.items():
        content |= put(f"channel/{client}", memory)
    for client, (update, _) in round_.late.items():
        content |= put(f"late/{client}", update.tensors)
    unique, aliases = _without_repetitions(content)
    memories.stored |= {name for client in round_.updates if (folder / (name := str(client + 1))).exists()}
    more = {
        "aliases": aliases,
        "run": memories.run,
        "stored": len(memories.stored),
        "memories": {str(client): number for client, number in sorted(memories.latest.items())},
        "rows": digest(rows),
        "refusals": {str(client): count for client, count in sorted(round_.refusals.items())},
        "late": {str(c): _about(*late) for c, late in round_.late.items()},
    }
    checkpoint.write(folder, round_.number, unique, config, more)
    memories.kept = dict(memories.latest)


def load_all(out: Path, runs: Sequence[Config]) -> dict[tuple[str, int], Checkpoint | None]:
    """The checkpoint of each run, by method and seed.

    Raises:
        DataError: one is damaged, or was written by another version.
        ResumeError: one was written with other options, or is that of another run.

    """
    known = {folder_of(out, run) for run in runs}
    for file in (out / "checkpoint").glob("*/checkpoint.json"):
        if file.parent not in known:
            raise ResumeError(f"{file.parent} is of a method or seed that {out / 'config.toml'} does not name.")
    return {(run.algorithm, run.seed): load(out, run) for run in runs}


def load(out: Path, config: Config) -> Checkpoint | None:
    """The checkpoint of a run, if there is one.

    Raises:
        DataError: it is damaged, or was written by another version.
        ResumeError: it was written with other options.

    """
    folder = folder_of(out, config)
    if (found := checkpoint.read(folder, config)) is None:
        return None
    about, content = found
    content |= {name: content[first] for name, first in about["aliases"].items()}
    sent = _by_client(take("late", content))
    late = {
        int(c): (Update(sent.get(int(c), {}), u["examples"], u["metrics"]), Traffic(*u["traffic"]))
        for c, u in about["late"].items()
    }
    refusals = {int(client): count for client, count in about["refusals"].items()}
    channel = _by_client(take("channel", content))
    progress = Progress(about["number"], take("state", content), channel, refusals, late)
    latest = {int(client): number for client, number in about["memories"].items()}
    stored = {path.name for path in folder.iterdir() if path.name.isdecimal()}
    if len(stored) < about["stored"]:
        raise DataError(f"{folder} is damaged: client memories are missing. {checkpoint.START_AGAIN}")
    for name in stored:
        checkpoint.without_checksum((folder / name).read_bytes(), str(folder / name))
    memories = Memories(about["run"], latest, dict(latest), stored)
    return Checkpoint(progress, memories, take("best", content), about["rows"])


def digest(rows: Sequence[Mapping[str, object]]) -> str:
    """The SHA-256 of rows as they stand in ``rounds.jsonl``."""
    return hashlib.sha256("".join(map(run_directory.line, rows)).encode()).hexdigest()


def _about(update: Update, traffic: Traffic) -> dict[str, object]:
    """What a late update has besides its tensors."""
    return {"examples": update.examples, "metrics": dict(update.metrics), "traffic": astuple(traffic)}


def _by_client(tensors: Tensors) -> dict[int, dict[str, Tensor]]:
    """The tensors of each client, from names such as ``3/probs``."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        client, _, rest = name.partition("/")
        found.setdefault(int(client), {})[rest] = tensor
    return found


def _without_repetitions(content: Tensors) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the other names of the same ones: many clients remember one broadcast."""
    names: dict[int, str] = {}
    aliases = {name: names[id(t)] for name, t in content.items() if names.setdefault(id(t), name) != name}
    return {name: tensor for name, tensor in content.items() if name not in aliases}, aliases


def folder_of(out: Path, config: Config) -> Path:
    """The directory of a run's checkpoint."""
    return out / "checkpoint" / run_directory.run_name(config.algorithm, config.seed)
