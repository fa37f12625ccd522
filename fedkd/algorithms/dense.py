"""DENSE (Zhang et al., 2022): one-shot and without data; the server distills its student on generated images.

Co-Boosting is the same protocol with another loss of the generator and another ensemble (`co_boosting.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fedkd.algorithms import aggregators
from fedkd.algorithms.base import DISTILLATION, Algorithm, Client, Update
from fedkd.core import notes, seeds
from fedkd.core.errors import RunError
from fedkd.core.lazy import torch
from fedkd.core.soft_labels import SoftLabels, normalized
from fedkd.core.tensors import put, take
from fedkd.data import augment
from fedkd.training.losses.logits import cross_entropy
from fedkd.training.objectives import Softened

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedkd.algorithms.base import Setup
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.training.synthesis import Ensemble, Seen

Weight = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Scale = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Pool:
    """The clients' networks and weights [K] in the ensemble, and the images generated so far with their labels."""

    models: Sequence[tuple[str, Tensors]]
    networks: Sequence[nn.Module]
    weights: Tensor
    images: Tensor
    labels: Tensor

    def ensemble(self, setup: Setup) -> Ensemble:
        """The ensemble as a function of images."""
        from fedkd.training.synthesis import Ensemble

        weights = self.weights[:, None]
        return Ensemble(self.networks, normalized(weights, weights)[:, 0], setup.trainer.scaling)

    def logits(self, setup: Setup, images: Tensor) -> Tensor:
        """The clients' logits [K, N, C]."""
        return torch.stack([setup.trainer.predict(model, weights, images) for model, weights in self.models])


@dataclass(frozen=True)
class DataFree(Algorithm):
    """Clients upload their weights once; the server distills its student on images from a generator.

    In each of ``epochs`` a new generator makes a batch of images, and the student is trained once on all so far.
    """

    ignores: ClassVar[frozenset[str]] = DISTILLATION - {"weighting", "distill_batch_size", "distill_learning_rate"}
    epochs: PositiveInt = 200
    generator_steps: PositiveInt = 30
    generator_width: PositiveInt = 64
    temperature: Scale = 20.0

    def initial_state(self, setup: Setup) -> Tensors:
        from fedkd.training import loop, synthesis

        generator, size = synthesis.Generator(1, 1), setup.config.distill_batch_size
        loop.check_batch_norm(generator, "the generator", size, "--distill-batch-size")
        return {}

    def broadcast(self, setup: Setup, state: Tensors, client: int) -> Tensors:
        return take("student", state) if setup.model_of(client) == setup.student else {}

    def local_update(self, setup: Setup, client: Client, message: Tensors) -> tuple[Update, Tensors]:
        weights = setup.trainer.train(client, message or setup.local_weights(client))
        return Update(weights, len(client.data)), put("model", weights)

    def upload_spec(self, setup: Setup, client: int, number: int) -> Shapes:
        return setup.trainer.weight_shapes(setup.model_of(client))

    def aggregate(self, setup: Setup, state: Tensors, updates: Mapping[int, Update], seed: int) -> Tensors:
        pool = self._empty_pool(setup, updates, seed)
        student = take("student", state) or setup.trainer.initial_weights(setup.student)
        objective = Softened(cross_entropy, self.temperature)
        for epoch in range(self.epochs):
            own = seeds.derive(seed, "epoch", epoch)
            images, labels = self._generated(setup, pool, student, own)
            pool = self.reweighted(setup, pool, epoch, own)
            pool = replace(pool, images=torch.cat([pool.images, images]), labels=torch.cat([pool.labels, labels]))
            views = self.views(setup, pool, own)
            targets = aggregators.mean_logits(pool.logits(setup, views) / self.temperature, pool.weights[:, None])
            soft_labels, order = SoftLabels(views, targets), seeds.derive(own, "student")
            student = setup.trainer.distill(setup.student, student, soft_labels, objective, epochs=1, seed=order)
        return put("student", student)

    def teacher_probs(self, setup: Setup, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        return aggregators.mean_logits(torch.stack(list(logits)), weights)

    def global_model(self, setup: Setup, state: Tensors) -> Tensors:
        return take("student", state)

    @abstractmethod
    def loss(self, seen: Seen, labels: Tensor) -> Tensor:
        """The loss of the generator for a batch."""

    def client_weights(self, setup: Setup, examples: Sequence[int]) -> Tensor:
        """The weights [K] of the clients in the ensemble of the first epoch."""
        return setup.distillation.client_weights(examples).flatten()

    def reweighted(self, setup: Setup, pool: Pool, epoch: int, seed: int) -> Pool:
        """The pool with the weights of an epoch; its images are those of earlier epochs."""
        return pool

    def views(self, setup: Setup, pool: Pool, seed: int) -> Tensor:
        """The images that the student is trained on in an epoch: augmented as in local training."""
        drawn = seeds.generator(seed, "augmentation")
        return augment.crop_and_flip(pool.images, setup.trainer.flip, drawn) if setup.config.augment else pool.images

    def _empty_pool(self, setup: Setup, updates: Mapping[int, Update], seed: int) -> Pool:
        """A pool without images, of the clients whose models can be used."""
        side = setup.proxy.images.shape[1]
        noise = torch.randint(256, (64, side, side, 3), dtype=torch.uint8, generator=seeds.generator(seed, "noise"))
        # Finite weights may give infinite logits; such a model is not part of the ensemble.
        used = {
            client: update
            for client, update in updates.items()
            if setup.trainer.predict(setup.model_of(client), update.tensors, noise).isfinite().all()
        }
        if not used:
            raise RunError("No client's model gives finite logits; lower --learning-rate.")
        models = [(setup.model_of(client), update.tensors) for client, update in used.items()]
        networks = [setup.trainer.frozen(*model) for model in models]
        weights = self.client_weights(setup, [update.examples for update in used.values()])
        return Pool(models, networks, weights, noise[:0], torch.zeros(0, dtype=torch.int64))

    def _generated(self, setup: Setup, pool: Pool, student: Tensors, seed: int) -> tuple[Tensor, Tensor]:
        """A batch of new images and their labels."""
        from fedkd.training import synthesis

        trainer = setup.trainer
        frozen = synthesis.Ensemble([trainer.frozen(setup.student, student)], torch.ones(1), trainer.scaling)
        drawn = seeds.generator(seed, "labels")
        labels = torch.randint(setup.classes, (setup.config.distill_batch_size,), generator=drawn)
        images = synthesis.generated(
            pool.ensemble(setup),
            frozen,
            labels,
            self.loss,
            side=pool.images.shape[1],
            width=self.generator_width,
            steps=self.generator_steps,
            seed=seeds.derive(seed, "generator"),
            device=trainer.device,
            precision=trainer.precision,
        )
        return images, labels


@dataclass(frozen=True)
class Dense(DataFree):
    """DENSE (Zhang et al., 2022): one-shot; the student is distilled on images generated for the mean of logits.

    The generator minimizes CE(label) + ``bn`` * the distance from BatchNorm's statistics - ``boundary`` *
    KL(ensemble || student) of the images whose class they disagree on.
    """

    bn: Weight = 1.0
    boundary: Weight = 1.0

    def initial_state(self, setup: Setup) -> Tensors:
        if self.bn and not any(map(setup.trainer.has_batch_norm, setup.models)):
            notes.say("dense: no client's model has BatchNorm layers, so its term bn is zero; see --norm batch.")
        return super().initial_state(setup)

    def loss(self, seen: Seen, labels: Tensor) -> Tensor:
        differs = seen.ensemble.argmax(-1) != seen.student.argmax(-1)
        gap = divergence(seen.ensemble, seen.student) * differs
        fit = torch.nn.functional.cross_entropy(seen.ensemble, labels)
        return fit + self.bn * seen.distance - self.boundary * gap.mean()


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) [B] of logits [B, C]."""
    of_teacher, of_student = teacher.log_softmax(-1), student.log_softmax(-1)
    return (of_teacher.exp() * (of_teacher - of_student)).sum(-1)
