"""The protocol of a method: ``broadcast -> local_update on every sampled client -> aggregate``.

An algorithm is a value: a frozen dataclass whose fields are its hyperparameters. Its methods are
pure functions, state in and state out; what they compute with is in the `Setup`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fedkd.core.brief import brief
from fedkd.core.lazy import torch
from fedkd.core.seeds import derive
from fedkd.core.tensors import take
from fedkd.training.early_stopping import EarlyStopping
from fedkd.training.objectives import Softened

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.core.config import Config
    from fedkd.core.soft_labels import SoftLabels
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.data.proxies import ProxySet
    from fedkd.data.readers import Images
    from fedkd.training.loop import Objective
    from fedkd.training.trainer import Trainer

    Aggregator = Callable[[Tensor, Tensor], Tensor]
    DistillationLoss = Callable[[Tensor, Tensor], Tensor]

#: Options of distillation on the server.
SERVER_DISTILLATION = frozenset({"distill_epochs", "distill_steps", "distill_schedule", "distill_patience"})
#: Options of the exchange of soft labels on a proxy set, and of any distillation.
DISTILLATION = SERVER_DISTILLATION | {
    *("aggregator", "weighting", "temperature", "loss", "proxy_samples", "distill_batch_size", "distill_learning_rate"),
    *("uplink_codec", "downlink_codec"),
}
#: Options of a global student.
STUDENT = frozenset({"student", "patience"})


@dataclass(frozen=True)
class Client:
    """A client in a round: its number, its seed for this round, its model's spec, its data and its memory.

    Rounds are counted from 1.
    """

    __repr__ = brief

    id: int
    seed: int
    model: str
    data: Images
    memory: Tensors
    round: int = 1

    def derive(self, purpose: str) -> int:
        """The seed of this client and round for one purpose."""
        return derive(self.seed, purpose)


@dataclass(frozen=True)
class Update:
    """What leaves a client, and nothing else."""

    __repr__ = brief

    tensors: Tensors
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Distillation:
    """How client logits become a teacher, and how a student is compared with it.

    ``aggregator``: logits [K, N, C] / T and weights -> probs [N, C]. ``loss``: student logits [B, C] / T and
    teacher probs [B, C] -> scalar. These are the only two places where logits are divided by T.
    """

    aggregator: Aggregator
    loss: DistillationLoss
    temperature: float
    weighting: Literal["uniform", "size"]

    def teacher_probs(self, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The teacher's probs [N, C] at T, from the logits [N, C] of K clients and their weights [K, 1 or N]."""
        return self.aggregator(torch.stack(list(logits)) / self.temperature, weights)

    def client_weights(self, examples: Sequence[int]) -> Tensor:
        """The weights of the clients in the ensemble [K, 1]: ones, or their numbers of examples."""
        sizes: Tensor = torch.tensor(examples, dtype=torch.float)[:, None]
        return sizes if self.weighting == "size" else torch.ones_like(sizes)

    @property
    def objective(self) -> Softened:
        """The loss at the temperature."""
        return Softened(self.loss, self.temperature)


@dataclass(frozen=True)
class Setup:
    """What the server and all clients share before the first round.

    ``models`` are the specs of the clients' models, assigned in turn; ``student`` is that of the global student.
    ``validation`` are the samples of ``--validation``, none without it.
    """

    __repr__ = brief

    config: Config
    classes: int
    models: tuple[str, ...]
    student: str
    proxy: ProxySet
    validation: Images
    distillation: Distillation
    trainer: Trainer

    @property
    def logits_shape(self) -> tuple[int, int]:
        """The shape [P, C] of a client's logits on the proxy samples of one round."""
        return self.proxy.samples, self.classes

    def model_of(self, client: int) -> str:
        """The spec of a client's model."""
        return self.models[client % len(self.models)]

    def local_weights(self, client: Client) -> dict[str, Tensor]:
        """The client's own model from its memory; the initial weights in its first round."""
        return take("model", client.memory) or self.trainer.initial_weights(client.model)

    def proxy_logits(self, model: str, weights: Tensors, number: int) -> Tensor:
        """A model's logits [P, C] on the proxy samples of a round."""
        return self.trainer.predict(model, weights, self.proxy.select(self.proxy.subset(number)))

    def distill(
        self,
        model: str,
        weights: Tensors,
        soft_labels: SoftLabels,
        objective: Objective,
        *,
        seed: int,
        average: bool = False,
        are_maps: bool = False,
    ) -> dict[str, Tensor]:
        """A model's weights after distillation on the server, by the options of the run; see `Trainer.distill`."""
        config, held_out = self.config, self.validation
        patience = config.distill_patience
        return self.trainer.distill(
            model,
            weights,
            soft_labels,
            objective,
            epochs=config.distill_epochs,
            steps=config.distill_steps,
            schedule=config.distill_schedule,
            seed=seed,
            average=average,
            are_maps=are_maps,
            stopping=EarlyStopping(held_out.pixels, held_out.labels, patience) if patience else None,
        )


class Algorithm(ABC):
    """A method of federated learning."""

    #: Whether one client holds the private data of all (an upper bound, not a federation).
    pools_data: ClassVar[bool] = False
    #: Whether the method reads the proxy's labels. They are loaded only for methods that set it.
    reads_proxy_labels: ClassVar[bool] = False
    #: Whether the method assumes that local training is SGD, whose steps are sums of gradients.
    assumes_sgd: ClassVar[bool] = False
    #: Options that the method does not use, of those that other methods do; a run that is given one of them says so.
    #: A codec stands for those of soft labels. A subclass that uses one of these options sets this anew.
    ignores: ClassVar[frozenset[str]] = frozenset()
    #: Whether an update may be aggregated in the round after its own.
    accepts_late: ClassVar[bool] = True
    #: Names of the metrics in a client's update. Others are refused, on both sides.
    metrics: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_one_model(self) -> bool:
        """Whether all clients and the student must have the same architecture."""
        return False

    @property
    def needs_validation(self) -> bool:
        """Whether the server needs the samples of ``--validation``."""
        return False

    @property
    def private_models(self) -> tuple[str, ...]:
        """Models that every client trains besides its own."""
        return ()

    @property
    def codecs(self) -> tuple[str, str] | None:
        """The uplink and the downlink codec if they are part of the method; by default those of the run."""
        return None

    def initial_state(self, setup: Setup) -> Tensors:
        """The server's state before the first round."""
        return {}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        """What the server sends to a sampled client."""
        return {}

    @abstractmethod
    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        """A client's computation in a round: its update, and its new memory.

        The memory holds the client's own model as ``model/NAME``; evaluation reads it there.
        """

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        """Names and shapes of the tensors in a client's update in a round. Anything else is refused, on both sides.

        A negative extent -n means at most n; `Int64` and `UInt8` declare integers, all other tensors are float32.
        A tensor named ``probs`` must hold probability distributions.
        """
        return {}

    def check_update(self, setup: Setup, update: Update) -> str:
        """What is wrong with an update that has the declared shapes; empty if nothing is."""
        return ""

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        """The server's new state. ``updates`` is ordered by client and not empty."""
        return state

    def teacher_probs(self, setup: Setup, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The ensemble's probs [N, C] from the logits [N, C] of K clients and their weights [K, 1 or N].

        By default by the run's aggregator. Evaluation uses it to measure the teacher.
        """
        return setup.distillation.teacher_probs(logits, weights)

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        """The weights of the global student; empty if the method has none."""
        return {}

    def evaluation_message(self, setup: Setup, state: Tensors) -> Tensors:
        """What the server sends to the participants so that their models can be evaluated; not part of a round."""
        return {}

    def evaluated_model(self, setup: Setup, client: int, memory: Tensors, message: Tensors) -> tuple[str, Tensors]:
        """The spec and the weights of the model that is evaluated as a client's own, from this message."""
        return setup.model_of(client), take("model", memory)
