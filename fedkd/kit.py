"""Kit: what everyone knows before round one, and the few verbs a method is written with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedkd import learning, models, optimizers, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedkd.algorithm import Client
    from fedkd.config import Config
    from fedkd.data.scaling import Scaling
    from fedkd.learning import Objective
    from fedkd.tensors import Tensors

    Aggregator = Callable[[Tensor, Tensor], Tensor]
    DistillationLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kit:
    """Proxy images [P, H, W, 3] uint8, models, teacher and losses of a run.

    ``aggregator``: logits [K, N, C] / T and weights -> probs [N, C]. ``loss``: student logits
    [B, C] / T and teacher probs -> scalar. These two divisions are the only ones by T.
    """

    config: Config
    classes: int
    proxy: Tensor
    scaling: Scaling
    flip: bool
    device: str
    student: str
    aggregator: Aggregator
    loss: DistillationLoss

    def initial(self, model: str) -> dict[str, Tensor]:
        """Fresh weights; the same for everyone who has this model, as paired comparisons need."""
        with seeds.seeded(seeds.derive(self.config.seed, "initial", model)):
            module = models.build(model, self.classes, self.config.norm)
        return _weights(module)

    def own(self, client: Client) -> dict[str, Tensor]:
        """The client's model as it remembers it; fresh if this is its first turn."""
        from fedkd.tensors import take

        return take("model", client.memory) or self.initial(client.model)

    def subset(self, number: int) -> Tensor:
        """Rows of the proxy set used in a round, sorted; all of them by default.

        Derived from the seed, so that naming the round (8 bytes) names the rows.
        """
        wanted = self.config.proxy_samples
        if not 0 < wanted < len(self.proxy):
            return torch.arange(len(self.proxy))
        generator = seeds.generator(self.config.seed, "subset", number)
        return torch.randperm(len(self.proxy), generator=generator)[:wanted].sort().values

    def answers(self) -> tuple[int, int]:
        """The shape [P, C] of a client's answer on the proxy images of one round."""
        return len(self.subset(1)), self.classes

    def fit(self, client: Client, weights: Tensors, mu: float = 0.0) -> dict[str, Tensor]:
        """The weights after local training on the client's own rows; mu adds FedProx's term."""
        config = self.config
        module = self._module(client.model, weights)
        learning.descend(
            module,
            optimizers.sgd(list(module.parameters()), config.learning_rate, config.momentum, config.weight_decay),
            client.data.pixels,
            client.data.labels,
            nn.functional.cross_entropy,
            self.scaling,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            augmentation=learning.Augmentation(config.augment, self.flip),
            seed=seeds.derive(client.seed, "fit"),
            anchor=learning.Anchor(mu, dict(weights)) if mu else None,
        )
        return _weights(module)

    def distill(
        self,
        model: str,
        weights: Tensors,
        rows: Tensor,
        targets: Tensor,
        *,
        epochs: int,
        seed: int,
        objective: Objective | None = None,
    ) -> dict[str, Tensor]:
        """The weights after distilling the teacher's ``targets`` [R, C] on the proxy's ``rows``.

        By default targets are probabilities, compared at the temperature T by the loss times T^2.
        No augmentation: the targets belong to these very pixels.
        """
        module = self._module(model, weights)
        learning.descend(
            module,
            optimizers.adam(list(module.parameters()), self.config.distill_learning_rate),
            self.proxy[rows],
            targets,
            objective or self.softened,
            self.scaling,
            epochs=epochs,
            batch_size=self.config.distill_batch_size,
            augmentation=learning.Augmentation(),
            seed=seed,
        )
        return _weights(module)

    def softened(self, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
        """T^2 * loss(student_logits / T, teacher_probs): gradients keep their size (Hinton et al., 2015)."""
        temperature = self.config.temperature
        return temperature**2 * self.loss(student_logits / temperature, teacher_probs)

    def predict(self, model: str, weights: Tensors, pixels: Tensor) -> Tensor:
        """Logits [N, C] on images [N, H, W, 3]."""
        return learning.predict(self._module(model, weights), pixels, self.scaling)

    def answer(self, client: Client, weights: Tensors, number: int) -> Tensor:
        """The client's logits [P, C] on the proxy images of a round."""
        return self.predict(client.model, weights, self.proxy[self.subset(number)])

    def ensemble(self, logits: Sequence[Tensor]) -> Tensor:
        """The teacher's probs [N, C] at the run's temperature; every member counts the same."""
        stacked = torch.stack(list(logits)) / self.config.temperature
        return self.aggregator(stacked, torch.ones(len(stacked), 1))

    def _module(self, model: str, weights: Tensors) -> nn.Module:
        """The one module of this architecture, holding ``weights``."""
        module = _architecture(model, self.classes, self.config.norm, self.device)
        module.load_state_dict(weights)
        return module


@lru_cache(maxsize=32)
def _architecture(model: str, classes: int, norm: Any, device: str) -> nn.Module:
    """A module to load weights into: built once, since building costs more than loading."""
    return models.build(model, classes, norm).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, copied to the CPU in plain order."""
    held = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in held.items()}
