"""Kit: what everyone knows before round one, and the few verbs a method is written with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedkd import models
from fedkd.core import seeds
from fedkd.training import loop, optimizers

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedkd.algorithms.base import Client
    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.data.scaling import Scaling
    from fedkd.training.loop import Objective, Penalty
    from fedkd.training.terms import Term

    Aggregator = Callable[[Tensor, Tensor], Tensor]
    DistillationLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kit:
    """Proxy images [P, H, W, 3] uint8, models, teacher and losses of a run.

    ``proxy_labels`` [P] are there only for a method that declares that it reads them; else they are none.
    ``aggregator``: logits [K, N, C] / T and weights -> probs [N, C]. ``loss``: student logits
    [B, C] / T and teacher probs -> scalar. These two divisions are the only ones by T.
    """

    config: Config
    classes: int
    proxy: Tensor
    scaling: Scaling
    flip: bool
    device: str
    models: tuple[str, ...]
    student: str
    aggregator: Aggregator
    loss: DistillationLoss
    proxy_labels: Tensor | None = None

    def initial(self, model: str) -> dict[str, Tensor]:
        """Fresh weights; the same for everyone who has this model, as paired comparisons need."""
        with seeds.seeded(seeds.derive(self.config.seed, "initial", model)):
            module = models.build(model, self.classes, self.config.norm)
        return _weights(module)

    def own(self, client: Client) -> dict[str, Tensor]:
        """The client's model as it remembers it; fresh if this is its first turn."""
        from fedkd.core.tensors import take

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

    def fit(
        self,
        client: Client,
        weights: Tensors,
        *,
        objective: Objective = nn.functional.cross_entropy,
        penalty: Penalty | None = None,
        embedded: bool = False,
    ) -> dict[str, Tensor]:
        """The weights after local training on the client's own rows.

        ``objective`` sees logits and labels; with ``embedded`` (logits, embeddings) and labels.
        """
        module = self._module(client.model, weights)
        seen = loop.Embedded(module) if embedded else module
        self._fit(seen, client.data.pixels, client.data.labels, objective, client.seed, penalty=penalty)
        return _weights(module)

    def fit_jointly(
        self, client: Client, weights: Tensors, rows: Tensor, targets: Tensor, pull: Objective
    ) -> dict[str, Tensor]:
        """The weights after local training on the union of the client's rows and the proxy's ``rows``.

        The loss is the mean over both kinds: cross-entropy for the former, for the latter ``pull`` of their
        logits to ``targets`` [R, C]. Proxy images are not augmented.
        """
        own, module = len(client.data), self._module(client.model, weights)

        def objective(logits: Tensor, wanted: Tensor) -> Tensor:
            public = wanted[:, -1] > 0
            private = wanted[~public, :-1].argmax(-1)
            losses = [
                loss(logits[chosen], aims) * len(aims)
                for loss, chosen, aims in (
                    (nn.functional.cross_entropy, ~public, private),
                    (pull, public, wanted[public, :-1]),
                )
                if len(aims)
            ]
            return torch.stack(losses).sum() / len(wanted)

        labels = nn.functional.one_hot(client.data.labels, self.classes).float()
        together = torch.cat([nn.functional.pad(labels, (0, 1)), nn.functional.pad(targets, (0, 1), value=1.0)])
        pixels = torch.cat([client.data.pixels, self.proxy[rows]])
        self._fit(module, pixels, together, objective, client.seed, only=own)
        return _weights(module)

    def fit_taught(
        self, client: Client, weights: Tensors, teacher: tuple[str, Tensors], term: Term, adapters: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights after local training beside a teacher (model, weights), and the adapters.

        The latter are what the term learns along with the student: fresh where there are none yet.
        """
        from fedkd.training.terms.objective import Lesson

        # A copy, made first: there is one module of an architecture, and the student's may be of the same.
        taught_by = copy.deepcopy(self._module(*teacher)).eval().requires_grad_(False)
        module = self._module(client.model, weights)
        sample = self.scaling(client.data.pixels[:2].to(self.device))
        with seeds.seeded(seeds.derive(client.seed, "adapters")):
            lesson = Lesson(module, [taught_by], [term], sample, client.data.labels.to(self.device)).to(self.device)
        if adapters:
            lesson.pulls.load_state_dict(dict(adapters))
        rows = torch.arange(len(client.data))
        targets = torch.stack([client.data.labels, rows], 1)
        self._fit(lesson, client.data.pixels, targets, lesson.loss, client.seed)
        return _weights(module), _weights(lesson.pulls)

    def _fit(
        self,
        module: nn.Module,
        pixels: Tensor,
        targets: Tensor,
        objective: Objective,
        seed: int,
        *,
        penalty: Penalty | None = None,
        only: int | None = None,
    ) -> None:
        config = self.config
        loop.descend(
            module,
            optimizers.sgd(list(module.parameters()), config.learning_rate, config.momentum, config.weight_decay),
            pixels,
            targets,
            objective,
            self.scaling,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            augmentation=loop.Augmentation(config.augment, self.flip, only),
            seed=seeds.derive(seed, "fit"),
            penalty=penalty,
        )

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
        average: bool = False,
    ) -> dict[str, Tensor]:
        """The weights after distilling the teacher's ``targets`` [R, C] on the proxy's ``rows``.

        By default targets are probabilities, compared at the temperature T by the loss times T^2.
        No augmentation: the targets belong to these very pixels. ``average`` over epochs, see `loop.descend`.
        """
        module = self._module(model, weights)
        loop.descend(
            module,
            optimizers.adam(list(module.parameters()), self.config.distill_learning_rate),
            self.proxy[rows],
            targets,
            objective or self.softened,
            self.scaling,
            epochs=epochs,
            batch_size=self.config.distill_batch_size,
            augmentation=loop.Augmentation(),
            seed=seed,
            average=average,
        )
        return _weights(module)

    def digest(
        self,
        client: Client,
        weights: Tensors,
        rows: Tensor,
        targets: Tensor,
        epochs: int,
        objective: Objective | None = None,
    ) -> dict[str, Tensor]:
        """The weights after the client distilled what came down for the proxy's ``rows``; see `distill`."""
        seed = seeds.derive(client.seed, "digest")
        return self.distill(client.model, weights, rows, targets, epochs=epochs, seed=seed, objective=objective)

    def softened(self, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
        """T^2 * loss(student_logits / T, teacher_probs): gradients keep their size (Hinton et al., 2015)."""
        temperature = self.config.temperature
        return temperature**2 * self.loss(student_logits / temperature, teacher_probs)

    def predict(self, model: str, weights: Tensors, pixels: Tensor) -> Tensor:
        """Logits [N, C] on images [N, H, W, 3]."""
        if not len(pixels):
            return torch.zeros(0, self.classes)
        return loop.predict(self._module(model, weights), pixels, self.scaling)

    def embed(self, model: str, weights: Tensors, pixels: Tensor) -> Tensor:
        """Embeddings [N, D] of images [N, H, W, 3]: what the last linear layer sees."""
        return loop.predict(loop.Embedding(self._module(model, weights)), pixels, self.scaling)

    def trainable(self, model: str) -> dict[str, Tensor]:
        """A zero for each number that training moves: the parameters, without buffers."""
        module = self._module(model, self.initial(model))
        return {name: torch.zeros(tensor.shape) for name, tensor in module.named_parameters()}

    def model_of(self, client: int) -> str:
        """The spec of a client's model: the list is dealt in turn."""
        return self.models[client % len(self.models)]

    def answer(self, client: Client, weights: Tensors, number: int) -> Tensor:
        """The client's logits [P, C] on the proxy images of a round."""
        return self.predict(client.model, weights, self.proxy[self.subset(number)])

    def ensemble(self, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The teacher's probs [N, C] at the run's temperature; ``weights`` [K, 1 or N] of the members."""
        return self.aggregator(torch.stack(list(logits)) / self.config.temperature, weights)

    def votes(self, examples: Sequence[int]) -> Tensor:
        """What each member's vote weighs [K, 1]: the same, or its number of examples (``--votes``)."""
        votes = torch.tensor(examples, dtype=torch.float)[:, None]
        return votes if self.config.votes == "size" else torch.ones_like(votes)

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
