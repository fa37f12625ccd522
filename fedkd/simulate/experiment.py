"""The composition root: the only place where the names in a config become objects."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Algorithm
from fedkd.core import runtime, seeds, specs, tensors
from fedkd.core.brief import brief
from fedkd.core.errors import FedkdError, PluginError, UsageError
from fedkd.data import loading, partitioners
from fedkd.simulate import assignment
from fedkd.training import models

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fedkd.algorithms.base import Client, Setup
    from fedkd.core.communication.channel import Channel
    from fedkd.core.communication.codecs import Codec
    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.data.partition import Partition
    from fedkd.data.readers import Images
    from fedkd.training.models.checkpoint import Student

#: Steps of all clients in a round from which clients compute together on a GPU. A stack saves 0.7 ms of each step, and
#: takes ten seconds to compile: as much as a hundred rounds of so few steps (docs/decisions/0018-stacked-clients.md).
FEWEST_STEPS = 100


@dataclass(frozen=True, eq=False)
class Experiment:
    """An algorithm on its data: everything that the server and its clients share.

    ``partition`` assigns samples of the training set to clients, sorted for each; ``training_partition`` is the same,
    or one client with all samples if the algorithm pools data. ``local_tests`` has the samples that are held out of
    each client's training. ``client_test`` are the test images on which clients'
    models are evaluated, and ``test_sample`` the indices of those that count for the accuracy of clients and teacher.
    ``data_hashes`` are those of the data set and of a proxy set from another one.
    """

    __repr__ = brief

    config: Config
    algorithm: Algorithm
    setup: Setup
    channel: Channel
    train: Images
    test: Images
    client_test: Images
    test_sample: Tensor
    proxy_rows: NDArray[np.int64] | None  # of the training set, if the proxy is held out of it
    validation_rows: NDArray[np.int64]  # of the training set
    partition: Partition
    training_partition: Partition
    local_tests: Partition
    data_hashes: Mapping[str, str]

    def client(self, number: int, round_number: int, memory: Tensors, data: Images | None = None) -> Client:
        """A client in a round, with ``data`` of its own or its share, which is selected here and only here."""
        from fedkd.algorithms.base import Client

        if data is None:
            pools = self.algorithm.pools_data
            data = self.samples(self.pooled(round_number) if pools else self.training_partition[number])
        seed = seeds.derive(self.config.seed, "client", round_number, number)
        return Client(number, seed, self.setup.model_of(number), data, memory, round_number)

    def local_test_rows(self, number: int) -> NDArray[np.int64]:
        """The samples of a client's local test split in the training set; of all clients if data is pooled."""
        return self.local_tests.rows if self.algorithm.pools_data else self.local_tests[number]

    def samples(self, rows: NDArray[np.int64]) -> Images:
        """Samples of the training set."""
        import torch

        return self.train.select(torch.from_numpy(rows))

    def pooled(self, round_number: int) -> NDArray[np.int64]:
        """The samples of all clients sampled in a round, so that pooled data is trained on as often as shared data."""
        import numpy as np

        from fedkd.simulate.rounds import sample

        sampled = sample(len(self.partition), self.config.participation, self.config.seed, round_number)
        return np.concatenate([self.partition[client] for client in sampled])

    def student(self, weights: Tensors, model: str = "") -> Student:
        """The global student, or a client's ``model``, with everything that is needed to use it."""
        from fedkd.training.models.checkpoint import Student

        setup, test = self.setup, self.test
        about = (
            models.pretrained(model or setup.student)[0],
            self.config.norm,
            setup.classes,
            test.names,
            test.pixels.shape[1],
        )
        return Student(*about, setup.trainer.scaling, self.config.dataset, weights, self.config.resize)

    @property
    def clients(self) -> int:
        return len(self.training_partition)

    @property
    def sizes(self) -> Sequence[int] | None:
        """The number of samples of each client; None if deployed nodes bring their own."""
        return None if self.config.partitioner == partitioners.OWN else self.training_partition.sizes.tolist()


def prepare(config: Config) -> Experiment:
    """The experiment of one run (one algorithm, one seed).

    Raises:
        UsageError, DataError, PluginError: what cannot be used, in one sentence.

    """
    with attributing(config):
        return _prepare(config)


def attributing(config: Config) -> AbstractContextManager[None]:
    """Attribute what a user-defined component raises before the first round to that component."""
    kinds = ("algorithm", "aggregator", "loss", "uplink_codec", "downlink_codec", "dataset", "proxy", "partitioner")
    named = [(kind.replace("_", "-"), getattr(config, kind)) for kind in kinds]
    named += [("model", model) for model in models.split(config.model)]
    named += [("student", config.student)]
    return specs.attributing(named, "before the first round")


def _prepare(config: Config) -> Experiment:
    import torch

    from fedkd.algorithms import aggregators
    from fedkd.algorithms.base import Distillation, Setup
    from fedkd.core.communication.channel import Channel
    from fedkd.data.partition import Partition
    from fedkd.data.scaling import Scaling
    from fedkd.simulate.evaluation import per_client
    from fedkd.training import precision
    from fedkd.training.trainer import Trainer

    algorithm, device = algorithm_of(config), runtime.device(config.device)
    resolved = precision.resolve(config.precision, device)
    shares = assignment.assign(config, algorithm.reads_proxy_labels)
    train, test, classes, proxy, partition = shares.train, shares.test, shares.classes, shares.proxy, shares.partition
    held_out = train.select(torch.from_numpy(shares.validation_rows))
    pooled = Partition(partition.rows, partition.ends[-1:])
    names = models.split(config.model)
    scaling = train.scaling or Scaling.of(proxy.images)
    setup = Setup(
        config=config,
        classes=classes,
        models=tuple(names),
        student=config.student or names[0],
        proxy=dataclasses.replace(proxy, images=proxy.images.to(device)),
        validation=dataclasses.replace(held_out, pixels=held_out.pixels.to(device)),
        distillation=Distillation(
            aggregator=aggregators.named(config.aggregator),
            loss=specs.bind("loss", config.loss),
            temperature=config.temperature,
            weighting=config.weighting,
        ),
        trainer=Trainer(config, classes, scaling, shares.flip, device, resolved, _are_worth_a_stack(config, partition)),
    )
    _check_loss(config.loss, setup)
    codecs = algorithm.codecs or (config.uplink_codec, config.downlink_codec)
    uplink, downlink = (_codec(text, classes) for text in codecs)
    for model in {*names, setup.student}:
        _check_model(setup, model)
        setup.trainer.check_batch_norm(model, config.distill_batch_size, "--distill-batch-size")
    for model in {*names, *algorithm.private_models}:
        setup.trainer.check_batch_norm(model, config.batch_size, "--batch-size")
    has_student = _has_student(algorithm, setup)
    hashes = {config.dataset: loading.digest(train, test)}
    if shares.proxy_rows is None:
        hashes[f"--proxy {config.proxy}"] = tensors.digest({"images": proxy.images.cpu()})
    if "file" in specs.parse(config.partitioner).options:
        hashes[f"--partitioner {config.partitioner}"] = partition.digest()
    train, test = (images.on(device, classes) for images in (train, test))
    client_test, test_sample = per_client.evaluated_images(test, config.client_test_samples, has_student)
    return Experiment(
        config=config,
        algorithm=algorithm,
        setup=setup,
        channel=Channel(uplink, downlink, config.temperature),
        train=train,
        test=test,
        client_test=client_test,
        test_sample=test_sample,
        proxy_rows=shares.proxy_rows,
        validation_rows=shares.validation_rows,
        partition=partition,
        training_partition=pooled if algorithm.pools_data else partition,
        local_tests=shares.local_tests,
        data_hashes=hashes,
    )


def _are_worth_a_stack(config: Config, partition: Partition) -> bool:
    """Whether clients have enough steps of training in a round. It does not depend on the number of rounds."""
    epochs = (-(-partition.sizes // config.batch_size)) * config.local_epochs
    steps = config.local_steps * len(partition.sizes) if config.local_steps else epochs.sum()
    return bool(steps * config.participation >= FEWEST_STEPS)


prepared = lru_cache(maxsize=2)(prepare)


def algorithm_of(config: Config) -> Algorithm:
    """The method of a run."""
    algorithm = specs.call("algorithm", config.algorithm)
    if not isinstance(algorithm, Algorithm):
        raise PluginError(f"--algorithm {config.algorithm} is not a subclass of fedkd.algorithms.base.Algorithm.")
    return algorithm


def _codec(text: str, classes: int) -> Codec:
    """The codec, tried on one distribution, so that a mistake shows before the first round."""
    import torch

    from fedkd.core.communication.codecs import Codec

    codec = specs.call("codec", text)
    if not isinstance(codec, Codec):
        raise PluginError(f"codec {text} is not a subclass of fedkd.core.communication.codecs.Codec.")
    try:
        codec.encode(torch.full((1, classes), 1 / classes), None)
    except ValueError as error:
        raise UsageError(f"codec {text} cannot be used here: {error}.") from error
    return codec


def _has_student(algorithm: Algorithm, setup: Setup) -> bool:
    """Whether the method has a global student. A method that cannot run says so here, before others run."""
    try:
        return bool(algorithm.global_model(setup, algorithm.initial_state(setup)))
    except FedkdError:
        raise
    except Exception:
        return False  # of a user-defined algorithm: attributed to it when it runs


def _check_loss(text: str, setup: Setup) -> None:
    """Try a user-defined loss on random logits, so that a mistake shows before the first round."""
    import torch

    if not specs.is_user_defined(text):
        return
    student, teacher = torch.randn(2, 8, setup.classes, generator=torch.Generator().manual_seed(0))
    value = setup.distillation.loss(student.requires_grad_(), teacher.softmax(-1))
    if not isinstance(value, torch.Tensor) or value.shape:
        what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise PluginError(f"--loss {text} returns {what}, not one number: a tensor of shape [], the mean of samples.")
    if not value.requires_grad:
        raise PluginError(f"--loss {text} has no gradient with respect to the student's logits.")
    if not value.isfinite():
        raise PluginError(f"--loss {text} is {value.item()} for random logits.")


def _check_model(setup: Setup, model: str) -> None:
    """Try a new model on two proxy images, in training too, so that a mistake shows before the first round."""
    images = setup.proxy.images[:2].repeat(2, 1, 1, 1)[:2]  # BatchNorm cannot train on one
    is_user_defined = specs.is_user_defined(model)
    try:
        setup.trainer.initial_weights(model)
        misfit = setup.trainer.misfit(model, images)
    except FedkdError:
        raise
    except Exception as error:
        if is_user_defined:
            raise
        raise UsageError(f"--model {model} cannot be used on these images: {error}.") from error
    if misfit:
        raise (PluginError if is_user_defined else UsageError)(f"--model {model} {misfit}.")
