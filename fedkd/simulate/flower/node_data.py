"""The data of a node in a deployment."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING

from fedkd.core.errors import DataError
from fedkd.data import loading, sources
from fedkd.simulate.experiment import prepared

if TYPE_CHECKING:
    from fedkd.core.config import Config
    from fedkd.data.readers import Images


def split(images: Images, config: Config, client: int) -> tuple[Images, Images]:
    """Of a node's data, what it trains on and its local test split."""
    import torch

    from fedkd.data.partition import held_out

    if not config.local_test:
        return images, images.first(0)
    training, test = held_out(len(images), config.local_test, config.seed, client)
    return images.select(torch.from_numpy(training)), images.select(torch.from_numpy(test))


@lru_cache(maxsize=2)
def node_data(path: str, config: Config) -> Images:
    """The data of a node in a deployment, with classes numbered as in the public set.

    Raises:
        DataError: it cannot be read, has unknown classes, or images of the proxy or the test set.

    """
    import numpy as np

    from fedkd.data import readers

    experiment = prepared(config)
    proxy = experiment.setup.proxy.images
    read = loading.read(sources.own(path, proxy.shape[1]).read_by(config), "train", "")
    images = readers.renumbered(read, experiment.test.names, experiment.setup.classes, path)
    public_keys = np.concatenate([readers.keys_of(proxy.cpu()), experiment.test.keys])
    if public := int(np.isin(images.keys, public_keys).sum()):
        raise DataError(
            f"{public} of the {len(images)} images in {path} are in the proxy or the test set; remove them."
        )
    return dataclasses.replace(images, pixels=images.pixels.to(experiment.setup.trainer.device))
