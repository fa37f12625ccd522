"""Partitioners: how samples are assigned to clients, by flwr-datasets, by this module or by a user-defined function.

A partition depends on labels and seed only. Functions named after a partitioner return a `Recipe`; flwr-datasets takes
seconds to import and is imported only if a partition is not in the cache.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from fedkd.core import cache, seeds, specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import FedkdError, PluginError, UsageError
from fedkd.data import published
from fedkd.data.partition import Partition, by_ids, checked

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Rows = NDArray[np.int64]

Alpha = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Recipe:
    """A partitioner of flwr-datasets and its arguments; ``by_clients`` may add some.

    ``direct`` is what is called instead, with the labels, the number of clients and the seed: for what the library does
    not have, or takes a millisecond per client for.
    """

    kind: str = ""
    by_label: bool = False
    is_counted: bool = True  # takes num_partitions
    is_seeded: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    by_clients: Callable[[Rows, int, int], Mapping[str, object]] | None = None  # labels, clients, seed
    direct: Callable[[Rows, int, int], Partition] | None = None
    by_column: tuple[str, int] = ("", 1)  # the column whose values are client ids, and how many of them a client has


def iid() -> Recipe:
    """Equal shares at random."""

    def cut(labels: Rows, clients: int, seed: int) -> Partition:
        small, larger = divmod(len(labels), clients)
        sizes = np.full(clients, small) + (np.arange(clients) < larger)
        return Partition(_shuffled(labels, seed), np.cumsum(sizes))

    return Recipe("IidPartitioner", direct=cut)


def dirichlet(*, alpha: Alpha = 0.5, min_size: PositiveInt = 2, self_balancing: bool = False) -> Recipe:
    """Each class is divided among clients by a draw of Dirichlet(alpha) (Yurochkin et al., 2019)."""
    options = {"alpha": alpha, "min_partition_size": min_size, "self_balancing": self_balancing}
    return Recipe("DirichletPartitioner", by_label=True, is_seeded=True, options=options)


def inner_dirichlet(*, alpha: Alpha = 0.5) -> Recipe:
    """Equal sizes; each client draws its label distribution from Dirichlet(alpha) (Acar et al., 2021)."""

    def equal_sizes(labels: Rows, clients: int, seed: int) -> Mapping[str, object]:
        return {"partition_sizes": [len(part) for part in np.array_split(labels, clients)]}

    return Recipe("InnerDirichletPartitioner", True, False, True, {"alpha": alpha}, equal_sizes)


def equal_dirichlet(*, alpha: Alpha = 0.5) -> Recipe:
    """Equal sizes; each class is divided among groups of ten clients by Dirichlet(alpha) (Lin et al., 2020, FedDF)."""

    def divide(labels: Rows, clients: int, seed: int) -> Partition:
        return published.equal_dirichlet(labels, _shuffled(labels, seed), clients, alpha, seeds.rng(seed, "partition"))

    return Recipe(direct=divide)


def few_shot(*, ways: PositiveInt = 3, shots: PositiveInt = 100, spread: NonNegativeInt = 2) -> Recipe:
    """``ways`` classes per client, ``shots`` samples of each, both up to ``spread`` more or less (Tan et al., 2022)."""

    def draw(labels: Rows, clients: int, seed: int) -> Partition:
        rng = seeds.rng(seed, "partition")
        return published.few_shot(labels, _shuffled(labels, seed), clients, ways, shots, spread, rng)

    return Recipe(direct=draw)


def counts(*, file: str) -> Recipe:
    """As many samples of each class as a CSV file says: a line per client, a number per class (DENSE's README)."""
    table = published.table(file)
    return Recipe(direct=lambda labels, _, seed: published.counts(labels, _shuffled(labels, seed), table))


def pathological(
    *,
    classes: PositiveInt = 2,
    mode: Literal["random", "deterministic", "first-deterministic"] = "first-deterministic",
) -> Recipe:
    """Each client has ``classes`` classes (McMahan et al., 2017)."""
    options = {"num_classes_per_partition": classes, "class_assignment_mode": mode}
    return Recipe("PathologicalPartitioner", by_label=True, is_seeded=True, options=options)


def shard(*, shards: PositiveInt = 2) -> Recipe:
    """Samples sorted by label are cut into shards; each client gets ``shards`` (McMahan et al., 2017)."""
    options = {"num_shards_per_partition": shards}
    return Recipe("ShardPartitioner", by_label=True, is_seeded=True, options=options)


def distribution(*, classes: PositiveInt = 2, preassigned: PositiveInt = 5, sigma: Alpha = 1.0) -> Recipe:
    """``classes`` classes per client in log-normal amounts (Li et al., 2020, FedProx)."""

    def log_normal(labels: Rows, clients: int, seed: int) -> Mapping[str, object]:
        kinds = len(np.unique(labels))
        draws = seeds.rng(seed, "distribution").lognormal(0.0, sigma, size=(kinds, clients * classes // kinds))
        return {"distribution_array": draws}

    options = {"num_unique_labels_per_partition": classes, "preassigned_num_samples_per_label": preassigned}
    return Recipe("DistributionPartitioner", True, True, True, options, log_normal)


def size(*, sizes: str) -> Recipe:
    """The given sizes, separated by plus signs: ``size:sizes=100+200+300``."""
    if not all(part.isdecimal() and int(part) for part in sizes.split("+")):
        raise ValueError("sizes are positive integers separated by +")
    options = {"partition_sizes": [int(part) for part in sizes.split("+")]}
    return Recipe("SizePartitioner", is_counted=False, options=options)


def linear() -> Recipe:
    """Client i gets a share proportional to i + 1."""
    return Recipe("LinearPartitioner")


def square() -> Recipe:
    """Client i gets a share proportional to (i + 1) squared."""
    return Recipe("SquarePartitioner")


def exponential() -> Recipe:
    """Client i gets a share proportional to exp(i + 1); for few clients."""
    return Recipe("ExponentialPartitioner")


def id_to_size(*, power: Alpha = 1.0) -> Recipe:
    """Client i gets a share proportional to (i + 1) ** power."""
    options = {"partition_id_to_size_fn": partial(_power, power=power)}
    return Recipe("IdToSizeFncPartitioner", options=options)


def _power(client: Any, power: float) -> Any:
    """The power of a client's number, or of an array of numbers."""
    return (client + 1.0) ** power


def continuous(*, strictness: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Recipe:
    """Samples sorted by label, blurred by ``1 - strictness``, cut into equal shares."""
    return Recipe("ContinuousPartitioner", True, True, True, {"strictness": strictness})


def natural_id(*, column: str = "") -> Recipe:
    """A client for each value of a column of the data, in order; by default for each class."""
    return Recipe("NaturalIdPartitioner", by_label=True, is_counted=False, by_column=(column, 1))


def grouped_natural_id(*, group: PositiveInt = 2, column: str = "") -> Recipe:
    """``group`` values of a column of the data per client, in order; by default ``group`` classes."""
    options = {"group_size": group, "sort_unique_ids": True}
    recipe = Recipe("GroupedNaturalIdPartitioner", by_label=True, is_counted=False, options=options)
    return replace(recipe, by_column=(column, group))


#: Nothing is assigned: every node of a deployment brings its own data.
OWN = "own"


def check(text: str) -> None:
    """Check the name and the options without making a partition."""
    if text == OWN:
        return
    if not _is_plugin(text):
        specs.call("partitioner", text)
    else:
        specs.bind("partitioner", text, RESERVED)


RESERVED = ("num_partitions", "seed", "partition_by")


def _is_plugin(text: str) -> bool:
    """Whether it is a user-defined function or class, or one of an installed package."""
    return specs.parse(text).name not in CATALOG["partitioner"]


def column(text: str) -> str:
    """The column of client ids that a partitioner needs, if it needs one."""
    return "" if text == OWN or _is_plugin(text) else specs.call("partitioner", text).by_column[0]


def assign(
    text: str, labels: Rows, clients: int, seed: int, owners: Rows | None = None, ids: Sequence[str] = ()
) -> Partition:
    """Indices into ``labels`` for each client, sorted, without repetition.

    ``owners`` are the numbers of the client ids of the samples, for a partitioner that needs a `column`.

    Raises:
        UsageError: the labels cannot be partitioned in this way.
        PluginError: a user-defined partitioner breaks its contract.

    """
    if clients > len(labels):
        raise UsageError(f"{clients} clients cannot share {len(labels)} images; use --clients {len(labels)} or fewer.")
    if _is_plugin(text):
        return checked(_by_plugin(text, labels, clients, seed), len(labels), clients, text, PluginError)
    recipe: Recipe = specs.call("partitioner", text)
    if recipe.by_column[0]:
        assert owners is not None
        partition = by_ids(owners, ids, recipe.by_column[1])
        _require_count(len(partition), clients, text, UsageError)
        return partition
    if recipe.direct is not None:
        try:
            partition = recipe.direct(labels, clients, seed).sorted()
        except ValueError as error:
            raise UsageError(
                f"--partitioner {text!r} cannot assign these samples to {clients} clients: {error}."
            ) from None
        _require_count(len(partition), clients, text, UsageError)
        return partition
    versions = [np.__version__, version("flwr-datasets")]
    described = json.dumps([4, text, clients, seed, versions, hashlib.sha256(labels.tobytes()).hexdigest()])

    def make() -> dict[str, Tensor]:
        import torch

        parts = _by_flower(recipe, text, labels, clients, seed)
        partition = checked(parts, len(labels), clients, text, UsageError)
        return {"rows": torch.from_numpy(partition.rows), "ends": torch.from_numpy(partition.ends)}

    kept = cache.get(f"partitions/{hashlib.sha256(described.encode()).hexdigest()[:24]}", make)
    return Partition(kept["rows"].numpy(), kept["ends"].numpy())


def _shuffled(labels: Rows, seed: int) -> Rows:
    """All indices in random order: several partitioners cut the samples in the order given."""
    return seeds.rng(seed, "partition", "order").permutation(len(labels))


def _by_flower(recipe: Recipe, text: str, labels: Rows, clients: int, seed: int) -> list[Any]:
    from datasets import Dataset
    from flwr_datasets import partitioner as flower

    options = dict(recipe.options)
    if recipe.by_clients is not None:
        options |= recipe.by_clients(labels, clients, seed)
    if recipe.by_label:
        options["partition_by"] = "label"
    if recipe.is_counted:
        options["num_partitions"] = clients
    if recipe.is_seeded:  # the library's own default is the constant 42
        options["seed"] = seeds.derive(seed, "partition") % 2**32
    order = _shuffled(labels, seed)
    table = Dataset.from_dict({"index": order, "label": labels[order]})
    try:
        with warnings.catch_warnings(action="ignore"):  # what it warns of is checked or shown by fedkd
            partitioner = getattr(flower, recipe.kind)(**options)
            partitioner.dataset = table
            _require_count(partitioner.num_partitions, clients, text, UsageError)
            return [partitioner.load_partition(i)["index"][:] for i in range(clients)]
    except (ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise UsageError(
            f"--partitioner {text!r} cannot assign {len(labels)} samples to {clients} clients ({reason}); "
            "use fewer clients, a milder skew, or inner-dirichlet, which keeps sizes equal."
        ) from error


def _by_plugin(text: str, labels: Rows, clients: int, seed: int) -> object:
    """A user-defined function ``(labels, clients, rng)``, or a subclass of flwr-datasets' Partitioner."""
    bound = specs.bind("partitioner", text, RESERVED)
    try:
        if not inspect.isclass(bound.func):
            return bound(labels.copy(), clients, seeds.rng(seed, "partition"))
        parameters = inspect.signature(bound.func).parameters
        offered = {"num_partitions": clients, "seed": seeds.derive(seed, "partition") % 2**32, "partition_by": "label"}
        partitioner = bound(**{k: v for k, v in offered.items() if k in parameters})
        return _by_subclass(partitioner, text, labels, clients)
    except FedkdError:
        raise
    except Exception as error:  # anything that user-defined code raises
        raise PluginError(f"--partitioner {text} failed: {type(error).__name__}: {error}.") from error


def _by_subclass(partitioner: Any, text: str, labels: Rows, clients: int) -> list[Any]:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

    if not isinstance(partitioner, Partitioner):
        raise PluginError(
            f"--partitioner {text} is neither a subclass of flwr_datasets.partitioner.Partitioner "
            "nor a function (labels, clients, rng)."
        )
    partitioner.dataset = Dataset.from_dict({"index": np.arange(len(labels)), "label": labels})
    _require_count(partitioner.num_partitions, clients, text, PluginError)
    return [partitioner.load_partition(i)["index"][:] for i in range(clients)]


def _require_count(count: int, clients: int, text: str, kind: type[FedkdError]) -> None:
    if count != clients:
        raise kind(f"--partitioner {text!r} makes {count} shares for {clients} clients; use --clients {count}.")
