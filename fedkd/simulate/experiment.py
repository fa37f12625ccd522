"""The composition root: the only place where the names in a config become objects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedkd import models
from fedkd.algorithms.base import Algorithm
from fedkd.core import seeds, specs
from fedkd.core.errors import DataError, FedkdError, PluginError, UsageError
from fedkd.data import partitioners, proxies, sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedkd.algorithms.base import Client
    from fedkd.communication.channel import Wire
    from fedkd.communication.codecs import Codec
    from fedkd.core.config import Config
    from fedkd.core.tensors import Tensors
    from fedkd.data.partition import Partition
    from fedkd.data.readers import Images
    from fedkd.data.sources import Source
    from fedkd.distill.config import DistillConfig
    from fedkd.models.checkpoint import Student
    from fedkd.training.trainer import Kit


@dataclass(frozen=True, eq=False)
class Experiment:
    """A method on its data: everything a server and its clients share."""

    config: Config
    algorithm: Algorithm
    kit: Kit
    wire: Wire
    train: Images
    test: Images
    proxy_rows: NDArray[np.int64] | None  # of the training set, where the proxy is held out of it
    dealt: Partition  # rows of the training set, sorted for each client
    parts: Partition  # the same, or everything for one client where data is pooled

    def client(self, number: int, round_number: int, memory: Tensors, data: Images | None = None) -> Client:
        """A client in a round, with ``data`` of its own or its share, which is cut out here, and only here."""
        import torch

        from fedkd.algorithms.base import Client
        from fedkd.data.readers import Images

        if data is None:
            rows = torch.from_numpy(self.pooled(round_number) if self.algorithm.pooled else self.parts[number])
            data = Images(self.train.pixels[rows], self.train.labels[rows], self.train.classes)
        seed = seeds.derive(self.config.seed, "client", round_number, number)
        return Client(number, seed, self.kit.model_of(number), data, memory)

    def pooled(self, round_number: int) -> NDArray[np.int64]:
        """The rows of all who would take part in a round, so that pooled data is trained on as often as shared data."""
        import numpy as np

        from fedkd.simulate.rounds import sample

        chosen = sample(len(self.dealt), self.config.participation, self.config.seed, round_number)
        return np.concatenate([self.dealt[client] for client in chosen])

    def student(self, weights: Tensors) -> Student:
        """What a method deploys, with all that is needed to use it."""
        from fedkd.models.checkpoint import Student

        kit, test = self.kit, self.test
        names = (kit.student, self.config.norm, kit.classes, test.names, test.pixels.shape[1])
        return Student(*names, kit.scaling, self.config.dataset, weights)

    @property
    def clients(self) -> int:
        return len(self.parts)


def check(config: Config) -> None:
    """Resolve every name and option before anything heavy is imported.

    Raises:
        UsageError, PluginError: the first thing that cannot be used.

    """
    for member in config.members(config.dataset):
        algorithm = _algorithm(member)
        if (
            algorithm.one_model
            and len({*models.split(member.model), member.student or models.split(member.model)[0]}) > 1
        ):
            raise UsageError(
                f"{member.algorithm} sends weights, so clients and student need one model, "
                f"not --model {member.model} --student {member.student or models.split(member.model)[0]}."
            )
        if algorithm.pooled and member.partitioner == partitioners.OWN:
            raise UsageError(f"{member.algorithm} needs all data in one place, and nodes keep theirs; leave it out.")
        if algorithm.labeled_proxy and proxies.parse(member.proxy)[0] is not None:
            raise UsageError(
                f"{member.algorithm} reads the proxy's labels, so the proxy must be held out of the data set "
                f"(--proxy holdout:size=N), not {member.proxy}."
            )
    specs.bind("aggregator", config.aggregator)
    specs.bind("loss", config.loss)
    for codec in (config.up, config.down):
        specs.call("codec", codec)
    for model in [*models.split(config.model), *([config.student] if config.student else [])]:
        specs.bind("model", model, models.RESERVED)
    if config.dataset != "auto":
        sources.named(config.dataset)
    proxies.parse(config.proxy)
    partitioners.check(config.partitioner)


def prepare(config: Config) -> Experiment:
    """The experiment of one member of a config (one algorithm, one seed).

    Raises:
        UsageError, DataError, PluginError: what cannot be used, in one sentence.

    """
    import numpy as np
    import torch

    from fedkd.communication.channel import Wire
    from fedkd.data.partition import Partition
    from fedkd.data.scaling import Scaling
    from fedkd.training.trainer import Kit

    source = sources.named(choose_dataset(config)[0])
    algorithm, computer = _algorithm(config), device(config.device)
    proxy_source, size = proxies.parse(config.proxy)
    is_own = config.partitioner == partitioners.OWN
    # Where nodes bring their own rows, the training set serves only to hold the proxy out of it.
    if proxy_source is None or not is_own:
        train, test = splits(source, config.data_dir)
    else:
        test = read(source, "test", config.data_dir)
        train = test.first(0)
    classes = max(train.classes, test.classes)
    proxy_labels = None
    if proxy_source is None:
        proxy_rows, private = proxies.hold_out(size, len(train), config.seed)
        proxy = train.pixels[torch.from_numpy(proxy_rows)]
        if algorithm.labeled_proxy:
            proxy_labels = train.labels[torch.from_numpy(proxy_rows)]
    else:
        proxy_rows, private = None, np.arange(len(train), dtype=np.int64)
        public = read(dataclasses.replace(proxy_source, pixels=source.pixels), "train", config.data_dir)
        proxy = proxies.draw(public.pixels, size, [train, test], config.seed, config.proxy)
    if is_own:
        dealt = Partition.of([np.zeros(0, np.int64)] * config.clients)
    else:
        shares = partitioners.deal(config.partitioner, train.labels.numpy()[private], config.clients, config.seed)
        dealt = Partition(private[shares.rows], shares.ends)
    parts = Partition(dealt.rows, dealt.ends[-1:]) if algorithm.pooled else dealt
    names = models.split(config.model)
    kit = Kit(
        config=config,
        classes=classes,
        proxy=proxy.to(computer),
        scaling=train.scaling or Scaling.of(proxy),
        flip=source.flip,
        device=computer,
        models=tuple(names),
        student=config.student or names[0],
        aggregator=specs.bind("aggregator", config.aggregator),
        loss=specs.bind("loss", config.loss),
        proxy_labels=proxy_labels,
    )
    up, down = (_codec(text, classes) for text in algorithm.codecs or (config.up, config.down))
    wire = Wire(up, down, config.temperature)
    for model in {*names, kit.student}:
        _buildable(kit, model)
    _startable(algorithm, kit)
    train, test = (
        dataclasses.replace(images, classes=classes, pixels=images.pixels.to(computer)) for images in (train, test)
    )
    return Experiment(config, algorithm, kit, wire, train, test, proxy_rows, dealt, parts)


prepared = lru_cache(maxsize=2)(prepare)


def choose_dataset(config: Config | DistillConfig) -> tuple[str, str]:
    """The spec of the data set, and why it is not CIFAR-10 if ``auto`` fell back."""
    if config.dataset != "auto":
        return config.dataset, ""
    return sources.by_auto(lambda source: read(source, "train", config.data_dir))


@lru_cache(maxsize=8)
def read(source: Source, split: str, data_dir: str) -> Images:
    """One split of a data set, read once in a process."""
    from fedkd.data import readers

    return readers.read(source, split, data_dir)


def splits(source: Source, data_dir: str) -> tuple[Images, Images]:
    """The training and the test images, whose labels number the classes alike: a folder may lack some in its tests."""
    from fedkd.data.readers import renumbered

    train, test = (read(source, split, data_dir) for split in ("train", "test"))
    if train.names and test.names and train.names != test.names:
        test = renumbered(test, train.names, train.classes, f"The test set of {source.name}")
    return train, test


@lru_cache(maxsize=2)
def own(path: str, config: Config) -> Images:
    """What a node of a deployment holds, with the classes numbered as in the public set.

    Raises:
        DataError: it cannot be read, has classes that nobody knows, or images of the proxy or the test set.

    """
    from fedkd.data.readers import renumbered

    experiment = prepared(config)
    pixels = experiment.kit.proxy.shape[1]
    images = renumbered(
        read(sources.own(path, pixels), "train", ""), experiment.test.names, experiment.kit.classes, path
    )
    if public := proxies.shared(images.pixels, [experiment.kit.proxy.cpu(), experiment.test.pixels.cpu()]):
        raise DataError(
            f"{public} of the {len(images)} images in {path} are in the proxy or the test set; remove them."
        )
    return dataclasses.replace(images, pixels=images.pixels.to(experiment.kit.device))


def device(name: str) -> str:
    """The device to compute on; ``auto`` is the first GPU if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here; use cpu or auto.") from error
    return name


def _algorithm(config: Config) -> Algorithm:
    algorithm = specs.call("algorithm", config.algorithm)
    if not isinstance(algorithm, Algorithm):
        raise PluginError(f"--algorithm {config.algorithm} is not a subclass of fedkd.algorithms.base.Algorithm.")
    return algorithm


def _codec(text: str, classes: int) -> Codec:
    """The codec, tried on one distribution, so that a mistake shows before the first round."""
    import torch

    from fedkd.communication.codecs import Codec

    codec = specs.call("codec", text)
    if not isinstance(codec, Codec):
        raise PluginError(f"codec {text} is not a subclass of fedkd.communication.codecs.Codec.")
    try:
        codec.encode(torch.full((1, classes), 1 / classes), None)
    except ValueError as error:
        raise UsageError(f"codec {text} cannot be used here: {error}.") from error
    return codec


def _startable(algorithm: Algorithm, kit: Kit) -> None:
    """Make the first state, so that a method that cannot be played says so before others are."""
    try:
        algorithm.init(kit)
    except FedkdError:
        raise
    except Exception:
        return  # somebody's own, which is called by its name when its turn comes


def _buildable(kit: Kit, model: str) -> None:
    """Try the model on one proxy image, so that a mistake shows before the first round."""
    try:
        shape = tuple(kit.predict(model, kit.initial(model), kit.proxy[:2]).shape)
    except (UsageError, PluginError):
        raise
    except Exception as error:
        raise UsageError(f"--model {model} cannot be used on these images: {error}.") from error
    count = min(2, len(kit.proxy))
    if shape != (count, kit.classes):
        raise UsageError(f"--model {model} returns {shape} for {count} images, not ({count}, {kit.classes}).")
