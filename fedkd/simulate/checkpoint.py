"""Checkpoints of a run (one method, one seed): everything that its next round depends on.

A checkpoint is a directory ``RUN/checkpoint/NAME`` with ``checkpoint.json``, ``state-ROUND.safetensors`` (the server's
state and channel memory) and, with the engines of this machine, one file for each client's memory. The JSON file is
replaced last, so that it always names a complete checkpoint; only then is the previous state deleted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Update
from fedkd.core import run_directory, tensors
from fedkd.core.errors import DataError
from fedkd.core.tensors import integer, put, take
from fedkd.simulate.rounds import Memories, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.simulate.rounds import Round

FORMAT = 2  # increase it when older checkpoints cannot be read


@dataclass(frozen=True)
class Checkpoint:
    """The end of a round: what the server needs for the next one, and which memory each client uses.

    ``best`` are the weights of the best student so far, with a validation set.
    """

    progress: Progress
    memories: Memories
    best: Tensors

    @property
    def number(self) -> int:
        """The round."""
        return self.progress.number


def save(out: Path, config: Config, round_: Round, memories: Memories, best: Tensors) -> None:
    """Write the checkpoint of a round, then delete the previous one; ``memories`` keeps what it refers to."""
    folder = folder_of(out, config)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"round": integer(round_.number), **put("state", round_.state)}  # the format has no empty files
    content |= put("best", best)
    for client, memory in round_.channel_memory.items():
        content |= put(f"channel/{client}", memory)
    for client, update in round_.late.items():
        content |= put(f"late/{client}", update.tensors)
    unique, aliases = _without_repetitions(content)
    state = folder / f"state-{round_.number}.safetensors"
    tensors.save(unique, state)
    run_directory.sync(state)
    memories.stored |= {name for client in round_.updates if (folder / (name := str(client + 1))).exists()}
    about = {
        "format": FORMAT,
        "round": round_.number,
        "sha256": tensors.digest(unique),
        "aliases": aliases,
        "run": memories.run,
        "stored": len(memories.stored),
        "memories": {str(client): number for client, number in sorted(memories.latest.items())},
        "refusals": {str(client): count for client, count in sorted(round_.refusals.items())},
        "late": {str(c): {"examples": u.examples, "metrics": dict(u.metrics)} for c, u in round_.late.items()},
    }
    run_directory.write_json(folder / "checkpoint.json", about)
    run_directory.sync(folder)
    memories.kept = dict(memories.latest)
    for old in folder.glob("state-*.safetensors"):
        if old != state:
            old.unlink()


def load(out: Path, config: Config) -> Checkpoint | None:
    """The checkpoint of a run, if there is one.

    Raises:
        DataError: it is damaged, or was written by another version.

    """
    folder = folder_of(out, config)
    try:
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise DataError(f"{folder} was written by another version of fedkd; resume it with that version.")
        content = tensors.load(folder / f"state-{about['round']}.safetensors")
        if tensors.digest(content) != about["sha256"]:
            raise DataError(f"{folder} is damaged: its checksum is wrong. Start the run again.")
        content |= {name: content[first] for name, first in about["aliases"].items()}
        sent = _by_client(take("late", content))
        late = {int(c): Update(sent.get(int(c), {}), u["examples"], u["metrics"]) for c, u in about["late"].items()}
        refusals = {int(client): count for client, count in about["refusals"].items()}
        channel = _by_client(take("channel", content))
        progress = Progress(about["round"], take("state", content), channel, refusals, late)
        latest = {int(client): int(number) for client, number in about["memories"].items()}
        stored = {path.name for path in folder.iterdir() if path.name.isdecimal()}
        if len(stored) < about["stored"]:
            raise DataError(f"{folder} is damaged: client memories are missing. Start the run again.")
        memories = Memories(about["run"], latest, dict(latest), stored)
        return Checkpoint(progress, memories, take("best", content))
    except FileNotFoundError:
        if (folder / "checkpoint.json").exists():
            raise DataError(f"{folder} is damaged: a file is missing. Start the run again.") from None
        return None
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file causes
        raise DataError(f"{folder} is damaged ({type(error).__name__}). Start the run again.") from error


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
    # Cloned, since different tensors may be views of one memory, which the format refuses.
    return {name: tensor.clone() for name, tensor in content.items() if name not in aliases}, aliases


def folder_of(out: Path, config: Config) -> Path:
    """The directory of a run's checkpoint."""
    return out / "checkpoint" / run_directory.run_name(config.algorithm, config.seed)
