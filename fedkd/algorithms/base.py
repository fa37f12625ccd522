"""The protocol of a method: ``ask -> local on every chosen client -> tell``.

An algorithm is a value: a frozen dataclass whose fields are its hyperparameters. Its methods are
pure, state in and state out; what they compute with is in the `Kit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.data.readers import Images
    from fedkd.training.trainer import Kit


@dataclass(frozen=True)
class Client:
    """A client in a round: its number, its seed for this round, its model, its data, its memory."""

    id: int
    seed: int
    model: str
    data: Images
    memory: Tensors


@dataclass(frozen=True)
class Update:
    """What leaves a client, and nothing else."""

    tensors: Tensors
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Algorithm(ABC):
    """A method of federated learning."""

    #: Whether the private data of all clients lies in one place (the ceiling, not a federation).
    pooled: ClassVar[bool] = False
    #: Whether the proxy's labels are read; they are not even there for a method that does not say so.
    labeled_proxy: ClassVar[bool] = False

    @property
    def one_model(self) -> bool:
        """Whether all clients and the student must have one architecture."""
        return False

    @property
    def codecs(self) -> tuple[str, str] | None:
        """The codecs up and down where they are a part of the method; by default those of the run."""
        return None

    def init(self, kit: Kit) -> Tensors:
        """The server's state before the first round."""
        return {}

    def ask(self, kit: Kit, state: Tensors, client: int) -> Tensors:
        """What a chosen client is sent."""
        return {}

    @abstractmethod
    def local(self, kit: Kit, client: Client, request: Tensors) -> tuple[Update, Tensors]:
        """A client's turn: what it answers, and its new memory.

        The memory holds the client's own model as ``model/NAME``; evaluation takes it from there.
        """

    def sends(self, kit: Kit, state: Tensors, client: int) -> Shapes:
        """Names and shapes of the tensors in a client's update. The server refuses any other.

        A negative extent -n stands for at most n, `Int64` and `UInt8` for integers; all else must be float32.
        A tensor named ``probs`` must hold distributions.
        """
        return {}

    def objection(self, kit: Kit, update: Update) -> str:
        """What is wrong with an update of the declared shapes; empty if nothing is."""
        return ""

    def tell(self, kit: Kit, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        """The server's turn: its new state. ``updates`` is ordered by client and not empty."""
        return state

    def teacher(self, kit: Kit, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The ensemble's probs [N, C] from its K members' logits [N, C] and their weights [K, 1 or N].

        By default by the run's aggregator.
        """
        return kit.ensemble(logits, weights)

    def deploy(self, kit: Kit, state: Tensors) -> Tensors:
        """The weights of the global student, or nothing where a method has none."""
        return {}
