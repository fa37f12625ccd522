"""Which samples of a data set are whose: those of each client, of the proxy set, of validation and of tests."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkd.core import seeds, specs
from fedkd.core.errors import UsageError
from fedkd.data import loading, partitioners, proxies, sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedkd.core.config import Config
    from fedkd.data.partition import Partition
    from fedkd.data.readers import Images


@dataclass(frozen=True, eq=False)
class Assignment:
    """The data of a run, and the samples of its training set by their purpose.

    ``partition`` has the samples that clients train on, and ``local_tests`` those held out of them; ``private`` is the
    number of samples that clients could train on: some partitioners leave samples out. ``flip`` says whether images may
    be mirrored.
    """

    dataset: str
    train: Images
    test: Images
    classes: int
    flip: bool
    proxy: proxies.ProxySet
    proxy_rows: NDArray[np.int64] | None  # of the training set, if the proxy is held out of it
    validation_rows: NDArray[np.int64]  # of the training set
    partition: Partition
    local_tests: Partition
    private: int


def attributing(config: Config) -> AbstractContextManager[None]:
    """Attribute what a user-defined component raises while data is assigned to that component."""
    kinds = ("dataset", "proxy", "partitioner")
    return specs.attributing([(kind, getattr(config, kind)) for kind in kinds], "before the first round")


def assign(config: Config, with_proxy_labels: bool = False) -> Assignment:
    """Read the data set of a run, and assign its samples. It depends on data, options and seed only.

    Raises:
        UsageError, DataError, PluginError: what cannot be used, in one sentence.

    """
    from fedkd.data.partition import hold_out

    dataset, _ = loading.choose_dataset(config.dataset, config.data_dir)
    source = sources.named(dataset).read_by(config)
    source = dataclasses.replace(source, client_column=partitioners.column(config.partitioner))
    train, test = _images(source, config)
    proxy, proxy_rows, private = _proxy(config, source, train, test, with_proxy_labels)
    validation_rows, private = _validation(config, private)
    partition, local_tests = hold_out(_partition(config, train, private), config.local_test, config.seed)
    return Assignment(
        dataset=dataset,
        train=train,
        test=test,
        classes=max(train.classes, test.classes),
        flip=source.flip,
        proxy=proxy,
        proxy_rows=proxy_rows,
        validation_rows=validation_rows,
        partition=partition,
        local_tests=local_tests,
        private=len(private) - len(local_tests.rows),
    )


def _images(source: sources.Source, config: Config) -> tuple[Images, Images]:
    """Training and test images; no training images if neither clients nor the proxy need them."""
    proxy_source, _ = proxies.parse(config.proxy)
    if proxy_source is None or config.partitioner != partitioners.OWN:
        return loading.splits(source, config.data_dir)
    test = loading.read(source, "test", config.data_dir)
    return test.first(0), test


def _proxy(
    config: Config, source: sources.Source, train: Images, test: Images, with_labels: bool
) -> tuple[proxies.ProxySet, NDArray[np.int64] | None, NDArray[np.int64]]:
    """The proxy set, its indices in the training set if it is held out of it, and those of the private samples."""
    import numpy as np
    import torch

    proxy_source, size = proxies.parse(config.proxy)
    if proxy_source is None:
        rows, private = proxies.hold_out(size, len(train), config.seed)
        indices = torch.from_numpy(rows)
        labels = train.labels[indices] if with_labels else None
        return proxies.ProxySet(train.pixels[indices], labels, config.proxy_samples, config.seed), rows, private
    proxy_source = dataclasses.replace(proxy_source.read_by(config), pixels=source.pixels)
    public = loading.read(proxy_source, "train", config.data_dir)
    images = proxies.draw(public, size, [train, test], config.seed, config.proxy)
    private = np.arange(len(train), dtype=np.int64)
    return proxies.ProxySet(images, None, config.proxy_samples, config.seed), None, private


def _validation(config: Config, private: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the validation samples in the training set and of the other private samples, both sorted."""
    import numpy as np

    if not (count := config.validation):
        return private[:0], private
    if count + config.clients > len(private):
        raise UsageError(
            f"--validation {count} and {config.clients} clients need more than the {len(private):,} private samples; "
            "use a smaller number."
        )
    order = seeds.rng(config.seed, "validation").permutation(private)
    return np.sort(order[:count]), np.sort(order[count:])


def _partition(config: Config, train: Images, private: NDArray[np.int64]) -> Partition:
    """The private samples of each client; of none if deployed nodes bring their own."""
    import numpy as np

    from fedkd.data.partition import Partition

    if config.partitioner == partitioners.OWN:
        return Partition.of([np.zeros(0, np.int64)] * config.clients)
    owners = None if train.clients is None else train.clients.numpy()[private]
    labels = train.labels.numpy()[private]
    ids = train.client_names
    assigned = partitioners.assign(config.partitioner, labels, config.clients, config.seed, owners, ids)
    return Partition(private[assigned.rows], assigned.ends, assigned.ids)
