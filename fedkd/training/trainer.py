"""Trainer: local training, distillation and prediction of models that are given by a spec and a dict of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import seeds, specs
from fedkd.core.brief import brief
from fedkd.core.errors import DataError
from fedkd.core.tensors import shapes
from fedkd.training import layers, loop, models, networks, schedules, together
from fedkd.training.batches import Job
from fedkd.training.models import checkpoint
from fedkd.training.networks import Network
from fedkd.training.objectives import Joint, LabelSmoothed
from fedkd.training.requests import Fit, Prediction, TaughtFit, Training

if TYPE_CHECKING:
    from fedkd.algorithms.base import Client
    from fedkd.core.config import Config
    from fedkd.core.soft_labels import SoftLabels
    from fedkd.core.tensors import Shapes, Tensors
    from fedkd.data.scaling import Scaling
    from fedkd.training.early_stopping import EarlyStopping
    from fedkd.training.loop import Objective, Penalty
    from fedkd.training.precision import Precision
    from fedkd.training.terms import Term


@dataclass(frozen=True)
class Trainer:
    """Trains models on one device, by the options of the config; with ``stacks``, clients together on a GPU."""

    __repr__ = brief

    config: Config
    classes: int
    scaling: Scaling
    flip: bool
    device: str
    precision: Precision
    stacks: bool = True
    _files: dict[Path, tuple[int, int]] = field(default_factory=dict, compare=False)  # time and size

    def initial_weights(self, model: str) -> dict[str, Tensor]:
        """The initial weights of a model; the same wherever the model is used, as paired comparisons need.

        Raises:
            DataError: they are in a file that cannot be used, or that has changed since it was used first.

        """
        return loop.weights_of(self._initial(model)[0])

    def note(self, model: str) -> str:
        """A sentence on the initial weights of a model, if there is something to know about them."""
        return self._initial(model)[1]

    def _initial(self, model: str) -> tuple[nn.Module, str]:
        initial = checkpoint.initial(model, self.classes, self.config.norm, self.config.seed)
        if file := models.pretrained(model)[1]:
            found = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._files.setdefault(file, found) != found:
                raise DataError(f"{file} has changed during the run; start a new one.")
        return initial

    def misfit(self, model: str, pixels: Tensor) -> str:
        """What a new model returns instead of logits for images [N, H, W, 3], in words; empty if it returns logits."""
        module = self._network(model).build()
        return loop.misfit(module, self.scaling(pixels.to(self.device)), self.classes)

    def weight_shapes(self, model: str) -> Shapes:
        """The names and shapes of a model's weights."""
        return _shapes(self._network(model))

    def parameter_zeros(self, model: str) -> dict[str, Tensor]:
        """A zero tensor for each parameter of a model, without its buffers."""
        module = self._network(model).module
        return {name: torch.zeros(tensor.shape) for name, tensor in module.named_parameters()}

    def has_batch_norm(self, model: str) -> bool:
        """Whether a model has BatchNorm layers, so that it is not trained on a single sample (`loop.batch_sizes`)."""
        return loop.has_batch_norm(self._network(model).module)

    def check_batch_norm(self, model: str, size: int, option: str) -> None:
        """Raise a `UsageError` if ``option`` gives the model batches of a single sample and it has BatchNorm layers."""
        module = self._network(model).module
        loop.check_batch_norm(module, model, size, option)

    def steps(self, client: Client) -> int:
        """The number of steps of local training on the client's samples."""
        module = self._network(client.model).module
        batches = loop.batch_sizes(module, len(client.data), self.config.batch_size)
        return sum(loop.epoch_lengths(len(batches), self.config.local_epochs, self.config.local_steps))

    def learning_rate(self, client: Client) -> float:
        """The learning rate of the client's local training in its round."""
        config = self.config
        return config.learning_rate * schedules.factor(config.schedule, client.round - 1, config.rounds)

    def train(
        self,
        client: Client,
        weights: Tensors,
        *,
        objective: Objective | None = None,
        penalty: Penalty | None = None,
        with_embeddings: bool = False,
        teachers: Sequence[Tensors] = (),
        soft_labels: SoftLabels | None = None,
        soft_objective: Objective = nn.functional.cross_entropy,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weights after local training on the client's samples.

        ``objective`` compares logits with labels, by default by the cross-entropy with ``--label-smoothing``;
        ``targets`` [N, ...] of the samples take the place of the labels. With
        ``with_embeddings`` it gets (logits, embeddings). ``teachers`` are frozen models of the client's architecture,
        given by their weights: with them, the objective gets a pair, what it would get otherwise and a list of the same
        of each teacher, for the same augmented batch. ``soft_labels`` are trained on together with the client's
        samples: the loss is the mean over both, of ``objective`` for the former and ``soft_objective`` for the latter,
        whose images are not augmented.
        """
        output, share = loop.Embedded if with_embeddings else None, self.config.label_smoothing
        objective = objective or (LabelSmoothed(share) if share else nn.functional.cross_entropy)
        if soft_labels is None:
            wanted = client.data.labels if targets is None else targets
            job = self._job(client, client.data.pixels, wanted, objective, penalty=penalty)
            return self._fit(client, weights, job, output, teachers)
        # One tensor of targets for both kinds: one-hot or soft labels, and a last column that is 1 for soft labels.
        labels = nn.functional.one_hot(client.data.labels, self.classes).float()
        both = [nn.functional.pad(labels, (0, 1)), nn.functional.pad(soft_labels.targets, (0, 1), value=1.0)]
        pixels = torch.cat([client.data.pixels, soft_labels.images])
        joint, private = Joint(objective, soft_objective), len(client.data)
        job = self._job(client, pixels, torch.cat(both), joint, penalty=penalty, augment_first=private)
        return self._fit(client, weights, job, output, teachers)

    def train_with_teacher(
        self, client: Client, weights: Tensors, teacher: tuple[str, Tensors], term: Term, adapters: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights after local training with a teacher (model, weights) on the same client, and the adapters.

        Adapters are the parameters of the loss term, trained with the student; pass an empty dict for new ones.
        """
        from fedkd.training.terms.objective import DistillationObjective

        targets = torch.stack([client.data.labels, torch.arange(len(client.data))], 1)
        job = self._job(client, client.data.pixels, targets, nn.functional.cross_entropy)

        def taught(module: nn.Module, teachers: Sequence[nn.Module]) -> DistillationObjective:
            sample = self.scaling(client.data.pixels[:2].to(self.device))
            labels = client.data.labels.to(self.device)
            with seeds.seeded(client.derive("adapters")):
                both = DistillationObjective(module, teachers, [term], sample, labels).to(self.device)
            if adapters:
                both.terms.load_state_dict(dict(adapters))
            return both

        how = replace(self._training(client.model), teachers=(self._network(teacher[0]),))
        trained: tuple[dict[str, Tensor], dict[str, Tensor]] = together.result(
            TaughtFit(how, weights, job, (self.learning_rate(client),), [teacher[1]], taught=taught)
        )
        return trained

    def train_pair(
        self, client: Client, weights: Tensors, mentor: tuple[str, Tensors], objective: Objective
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights after local training of the client's model and a mentor (model, weights) on the same batches.

        ``objective`` gets the logits [B, 2, C] of both, and the labels.
        """
        pair = {"student": weights, "mentor": mentor[1]}
        both = {f"{of}.{name}": tensor for of, tensors in pair.items() for name, tensor in tensors.items()}
        how = self._training(client.model)
        how = replace(how, network=replace(how.network, partner=mentor[0]))
        job = self._job(client, client.data.pixels, client.data.labels, objective)
        trained = together.result(Fit(how, both, job, (self.learning_rate(client),)))
        student, taught = ({n: trained[f"{of}.{n}"] for n in names} for of, names in pair.items())
        return student, taught

    def _training(self, model: str, output: type[nn.Module] | None = None) -> Training:
        """How clients train on their samples."""
        config = self.config
        is_sgd = specs.parse(config.optimizer).name == "sgd"
        numbers = (config.momentum, config.weight_decay) if is_sgd else (config.weight_decay,)
        budget = config.local_epochs, config.batch_size, config.local_steps, config.clip_norm
        return Training(self._network(model), self.scaling, config.optimizer, numbers, *budget, output=output)

    def _job(
        self,
        client: Client,
        pixels: Tensor,
        targets: Tensor,
        objective: Objective,
        *,
        penalty: Penalty | None = None,
        augment_first: int | None = None,
    ) -> Job:
        augmentation = loop.Augmentation(self.config.augment, self.flip, augment_first)
        return Job(pixels, targets, objective, augmentation, client.derive("fit"), penalty)

    def _fit(
        self,
        client: Client,
        weights: Tensors,
        job: Job,
        output: type[nn.Module] | None,
        teachers: Sequence[Tensors],
    ) -> dict[str, Tensor]:
        how = replace(
            self._training(client.model, output), teachers=tuple(self._network(client.model) for _ in teachers)
        )
        trained: dict[str, Tensor] = together.result(Fit(how, weights, job, (self.learning_rate(client),), teachers))
        return trained

    def distill(
        self,
        model: str,
        weights: Tensors,
        soft_labels: SoftLabels,
        objective: Objective,
        *,
        epochs: int,
        seed: int,
        steps: int = 0,
        schedule: str = "constant",
        average: bool = False,
        stopping: EarlyStopping | None = None,
        are_maps: bool = False,
    ) -> dict[str, Tensor]:
        """The weights after minimizing ``objective(logits, targets)`` over the soft labels (Adam).

        Without augmentation, since the targets belong to exactly these pixels. The schedule is that of the learning
        rate over the steps. ``steps``, ``average`` and ``stopping``: see `loop.train`. With ``are_maps`` the images are
        feature maps [N, H, W, D], and the layers after the extractor (`layers.Tail`) are trained on them.
        """
        rate, size, network = self.config.distill_learning_rate, self.config.distill_batch_size, self._network(model)
        rates: tuple[float, ...] = (rate,)
        if schedule != "constant":
            batches = loop.batch_sizes(network.module, len(soft_labels.images), size)
            total = sum(loop.epoch_lengths(len(batches), epochs, steps))
            rates = schedules.rates(schedule, rate, total, max(1, len(batches)))
        scaling, output = self._input(are_maps)
        how = Training(network, scaling, "adam", (0.0,), epochs, size, steps, average=average, output=output)
        job = Job(soft_labels.images, soft_labels.targets, objective, loop.Augmentation(), seed, stopping=stopping)
        trained: dict[str, Tensor] = together.result(Fit(how, weights, job, rates))
        return trained

    def predict(self, model: str, weights: Tensors, pixels: Tensor, *, are_maps: bool = False) -> Tensor:
        """Logits [N, C] on images [N, H, W, 3], or on feature maps as in `distill`."""
        if not len(pixels):
            return torch.zeros(0, self.classes)
        scaling, output = self._input(are_maps)
        logits: Tensor = together.result(Prediction(self._network(model), scaling, weights, pixels, output))
        return logits

    def _input(self, are_maps: bool) -> tuple[Scaling | Callable[[Tensor], Tensor], type[nn.Module] | None]:
        """What scales the input of a network, and the module around it."""
        return (layers.channels_first, layers.Tail) if are_maps else (self.scaling, None)

    def extract(self, model: str, weights: Tensors, pixels: Tensor) -> Tensor:
        """Feature maps [N, H, W, D] of images [N, H, W, 3], by a model's extractor (`layers.Extractor`)."""
        request = Prediction(self._network(model), self.scaling, weights, pixels, layers.Extractor)
        maps: Tensor = together.result(request)
        return maps

    def extractor(self, model: str, pixels: Tensor) -> tuple[Shapes, tuple[int, ...]]:
        """The shapes of the weights of a model's extractor and of a feature map, for images of the size of ``pixels``.

        Raises:
            ValueError: the model cannot be split.

        """
        return networks.extractor(self._network(model), *pixels.shape[1:3])

    def embed(self, model: str, weights: Tensors, pixels: Tensor) -> Tensor:
        """Embeddings [N, D] of images [N, H, W, 3]: the input of the last linear layer."""
        request = Prediction(self._network(model), self.scaling, weights, pixels, loop.Embedding)
        embeddings: Tensor = together.result(request)
        return embeddings

    def head(self, model: str, pixels: Tensor) -> str:
        """The name of a model's layer from embeddings to logits, for images of the size of ``pixels`` [N, H, W, 3].

        Raises:
            ValueError: it has no such layer.

        """
        return networks.head(self._network(model), *pixels.shape[1:3])

    def frozen(self, model: str, weights: Tensors) -> nn.Module:
        """A network of its own with these weights, in evaluation mode, that is not trained."""
        return self._network(model).frozen(weights)

    def _network(self, model: str) -> Network:
        return Network(model, self.classes, self.config.norm, self.device, self.precision, self.stacks)


@lru_cache(maxsize=32)
def _shapes(network: Network) -> Shapes:
    """Cached, since both sides ask for it for each client in each round."""
    return shapes(network.module.state_dict())
