from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.core import specs
from fedkd.core.catalog import CATALOG
from fedkd.core.errors import PluginError, UsageError
from fedkd.data import partitioners, skew
from fedkd.data.partition import Partition
from fedkd.simulate.experiment import prepare
from tests.conftest import tiny

LABELS = np.random.default_rng(0).integers(0, 10, 2000)
SPECS = {
    "natural-id": ("natural-id", 10),
    "distribution": ("distribution", 10),
    "grouped-natural-id": ("grouped-natural-id:group=2", 5),
    "size": ("size:sizes=100+200+300+400", 4),
    "few-shot": ("few-shot:shots=20", 5),
    "counts": (f"counts:file={Path(__file__).with_name('counts.csv')}", 5),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))


def deal(text: str, clients: int = 5, seed: int = 0):
    return partitioners.assign(text, LABELS, clients, seed)


@pytest.mark.parametrize("name", CATALOG["partitioner"])
def test_every_partitioner_assigns_each_sample_at_most_once(name):
    text, clients = SPECS.get(name, (name, 5))
    parts = deal(text, clients)
    together = np.concatenate(parts)
    assert len(parts) == clients
    assert min(map(len, parts)) > 0
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < len(LABELS)
    assert all((np.diff(part) > 0).all() for part in parts)


def test_the_catalog_has_every_horizontal_partitioner_of_the_library():
    from flwr_datasets import partitioner as flower

    theirs = {n for n in dir(flower) if n.endswith("Partitioner") and n != "Partitioner" and "Vertical" not in n}
    recipes = (specs.call("partitioner", SPECS.get(name, (name, 0))[0]) for name in CATALOG["partitioner"])
    assert {recipe.kind for recipe in recipes if recipe.kind} == theirs


@pytest.mark.parametrize(
    "text",
    [
        *("dirichlet:alpha=0.5", "iid", "pathological:classes=2", "shard", "equal-dirichlet", "few-shot:shots=9"),
        SPECS["counts"][0],
    ],
)
def test_the_seed_alone_decides(text, monkeypatch, tmp_path):
    first = deal(text, seed=1).digest()
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "another"))
    assert deal(text, seed=1).digest() == first
    assert deal(text, seed=2).digest() != first


def test_log_normal_amounts_follow_the_seed():
    sizes = [partitioners.assign("distribution", LABELS, 10, seed).sizes.tolist() for seed in (1, 1, 2)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_a_partition_is_the_same_on_every_machine():
    """Integers of NumPy's own generators: this hash may be committed."""
    assert deal("dirichlet:alpha=0.5").digest() == "a9f6ae2d6ebc347110aa6f78ac8fe0d5280baddd854df0ebf0fcfececa69f03c"


def test_the_second_time_it_comes_from_the_cache(monkeypatch):
    first = deal("dirichlet:alpha=0.5")
    monkeypatch.setattr(partitioners, "_by_flower", None)
    again = deal("dirichlet:alpha=0.5")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_smaller_alpha_is_more_skewed():
    distances = [skew.measure(LABELS, deal(f"dirichlet:alpha={a}"), 10, 2000).distance for a in (100, 1, 0.1)]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 < distances[2]


def test_pathological_gives_the_requested_number_of_classes():
    parts = deal("pathological:classes=2", clients=10)
    assert all(len(np.unique(LABELS[part])) == 2 for part in parts)


def fedavgs_shards(labels, clients, rng):
    """McMahan et al. (2017): sorted by label, cut into two shards per client of the same size, dealt at random."""
    size = len(labels) // (2 * clients)
    shards = np.argsort(labels, kind="stable")[: 2 * clients * size].reshape(-1, size)
    return [labels[rows].ravel() for rows in np.split(shards[rng.permutation(2 * clients)], clients)]


def test_shards_are_those_of_fedavg():
    labels = np.repeat(np.arange(10), 200)
    ours = [labels[part] for part in partitioners.assign("shard", labels, 10, 0)]
    theirs = fedavgs_shards(labels, 10, np.random.default_rng(0))
    assert {len(part) for part in ours} == {len(part) for part in theirs} == {200}
    for parts in (ours, theirs):
        assert all(set(np.bincount(part, minlength=10)) <= {0, 100, 200} for part in parts)
        assert sum(np.bincount(part, minlength=10) for part in parts).tolist() == [200] * 10


def test_moons_dirichlet_has_at_least_ten_samples_per_client():
    for seed in range(5):
        sizes = deal("dirichlet:alpha=0.1,min-size=10,self-balancing=true", 10, seed).sizes
        assert sizes.min() >= 10
        assert sizes.sum() == 2000


def feddfs_parts(labels, clients, alpha, rng):
    """FedDF's equal-size Dirichlet, sample by sample, from the description of its code."""
    rows = rng.permutation(len(labels)).tolist()
    line = []
    for group in range(0, clients, 10):
        members = min(10, clients - group)
        here, rows = rows[: len(labels) * members // clients], rows[len(labels) * members // clients :]
        while True:
            hands = [[] for _ in range(members)]
            for label in range(10):
                of_class = [row for row in here if labels[row] == label]
                weights = rng.dirichlet([alpha] * members)
                weights = [0 if len(hand) >= len(here) / members else w for hand, w in zip(hands, weights, strict=True)]
                for i, row in enumerate(of_class):  # the share of the class up to each client, as quantiles
                    upto = np.cumsum(weights) / sum(weights) * len(of_class)
                    hands[min(int(np.searchsorted(upto.astype(int), i, side="right")), members - 1)].append(row)
            if min(map(len, hands)) >= int(len(here) / members / 2):
                break
        line += [row for hand in hands for row in hand]
    size = len(labels) // clients
    return [line[k * size : (k + 1) * size] for k in range(clients)]


@pytest.mark.parametrize(("clients", "alpha"), [(20, 0.3), (13, 1.0)])
def test_equal_sizes_are_divided_as_by_feddf(clients, alpha):
    """The same random law: mean distances and effective numbers of classes of many partitions agree."""
    labels = LABELS[:600]
    found = {"ours": [], "theirs": []}
    for seed in range(20):
        ours = partitioners.assign(f"equal-dirichlet:alpha={alpha}", labels, clients, seed)
        theirs = Partition.of(
            [np.array(part) for part in feddfs_parts(labels, clients, alpha, np.random.default_rng(seed))]
        )
        for name, parts in (("ours", ours), ("theirs", theirs)):
            result = skew.measure(labels, parts, 10, len(labels))
            found[name].append((result.distance, result.classes))
    ours, theirs = (np.mean(found[name], 0) for name in ("ours", "theirs"))
    assert np.abs(ours / theirs - 1).max() < 0.05


def test_equal_shares_of_too_few_classes_are_one_sentence():
    with pytest.raises(UsageError, match="some client had less than half of its equal share; use a larger alpha"):
        partitioners.assign("equal-dirichlet:alpha=1e-9", LABELS % 2, 10, 0)


dealt = st.lists(st.integers(0, 4), min_size=40, max_size=300).map(np.array)


@settings(deadline=None, max_examples=60)
@given(dealt, st.integers(1, 25), st.floats(1, 50), st.integers(0, 10))
def test_equal_dirichlet_gives_every_client_as_many_samples(labels, clients, alpha, seed):
    text = f"equal-dirichlet:alpha={alpha}"
    try:
        parts = partitioners.assign(text, labels, clients, seed)
    except UsageError as error:  # of few samples of few classes
        assert "use a larger alpha" in str(error)  # noqa: PT017
        assert len(labels) // clients < 20
        return
    assert set(parts.sizes) == {len(labels) // clients}
    assert len(np.unique(parts.rows)) == len(parts.rows)
    assert parts.digest() == partitioners.assign(text, labels, clients, seed).digest()


@settings(deadline=None, max_examples=60)
@given(dealt, st.integers(1, 5), st.integers(1, 5), st.integers(1, 8), st.integers(0, 2), st.integers(0, 10))
def test_few_shot_gives_every_client_some_classes_and_as_many_of_each(labels, clients, ways, shots, spread, seed):
    text = f"few-shot:ways={ways},shots={shots},spread={spread}"
    try:
        parts = partitioners.assign(text, labels, clients, seed)
    except UsageError as error:
        assert "too few samples" in str(error) or "classes, and each client" in str(error)  # noqa: PT017
        return
    assert len(np.unique(parts.rows)) == len(parts.rows)
    for table in skew.counts(labels, parts, 5):
        kinds = table[table > 0]
        assert len(set(kinds)) == 1
        assert max(shots - spread, 1) <= kinds[0] <= shots + spread
        assert min(max(ways - spread, 2), ways) <= len(kinds) <= ways + spread
    assert parts.digest() == partitioners.assign(text, labels, clients, seed).digest()


#: DENSE's README, for CIFAR-10, five clients and seed 1; the sizes are sums.
DENSE = """156,709,301,2629,20,651,915,113,180,2133
1771,2695,1251,1407,665,314,1419,3469,0,0
236,15,1715,76,1304,34,1773,75,3289,2360
2809,575,157,853,2555,2557,203,1213,0,0
28,1006,1576,35,456,1444,690,130,1531,507
"""


def counted(tmp_path, text, labels, clients=5, seed=0):
    (tmp_path / "numbers.csv").write_text(text)
    return partitioners.assign(f"counts:file={tmp_path}/numbers.csv", labels, clients, seed)


def test_clients_have_the_numbers_of_the_file(tmp_path):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 5000))
    parts = counted(tmp_path, DENSE, labels)
    found = [",".join(map(str, np.bincount(labels[part], minlength=10))) for part in parts]
    assert "\n".join(found) + "\n" == DENSE
    assert parts.sizes.tolist() == [7807, 12991, 10877, 10922, 7403]
    assert (np.sort(parts.rows) == np.arange(50_000)).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,1\n1,1\n", "makes 2 shares for 3 clients; use --clients 2"),
        ("2,1\n1,1\n1,0\n", "class 0 has 3 samples, and the file has 4"),
        ("1\n1\n1\n", "numbers for 1 classes, and they have 2"),
        ("1,1\n1\n1,1\n", "needs a line for each client with whole numbers, one for each class"),
        ("a,b\n1,1\n1,1\n", "needs a line for each client with whole numbers"),
        ("1,1\n0,0\n1,1\n", "a client without samples"),
        ("1,1\n2,-1\n1,1\n", "below zero"),
        ("", "a client without samples"),
    ],
)
def test_numbers_that_cannot_be_are_one_sentence(tmp_path, text, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        counted(tmp_path, text, np.array([0, 1, 0, 1, 0, 1]), 3)
    assert "\n" not in str(caught.value)


def test_a_file_of_numbers_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"none\.csv cannot be read \(No such file"):
        partitioners.check("counts:file=none.csv")


def test_a_changed_file_of_numbers_is_another_partition(tmp_path):
    """So that a run is not resumed with other clients."""
    found = []
    for numbers in ("1,2,3,4,5,6,7,8,9,9", "2,1,3,4,5,6,7,8,9,9"):
        (tmp_path / "numbers.csv").write_text(f"{numbers}\n" * 3)
        found.append(prepare(tiny(partitioner=f"counts:file={tmp_path}/numbers.csv")).data_hashes)
    (changed,) = {name for name, _ in found[0].items() ^ found[1].items()}
    assert changed == f"--partitioner counts:file={tmp_path}/numbers.csv"


def test_skew_of_known_shares():
    labels = np.array([0, 0, 1, 1])
    alike = skew.measure(labels, Partition.of([np.array([0, 2]), np.array([1, 3])]), 2, 4)
    apart = skew.measure(labels, Partition.of([np.array([0, 1]), np.array([2])]), 2, 4)
    assert (alike.distance, alike.classes, alike.coverage) == (0.0, pytest.approx(2.0), 1.0)
    assert (apart.classes, apart.coverage, apart.smallest, apart.largest) == (pytest.approx(1.0), 0.75, 1, 2)
    assert apart.distance == pytest.approx((1 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "clients", "expected"),
    [
        ("iid", 3000, "3000 clients cannot share 2000 images; use --clients 2000 or fewer"),
        ("dirichlet:alpha=0.001", 200, "cannot assign 2000 samples to 200 clients"),
        ("size:sizes=1+2", 3, "makes 2 shares for 3 clients; use --clients 2"),
        ("natural-id", 3, "use --clients 10"),
        ("exponential", 40, "cannot assign"),
        ("few-shot:shots=300", 20, r"class \d has too few samples for 300 shots; use fewer shots or clients"),
        ("few-shot:ways=13,shots=9", 3, "they have 10 classes, and each client should have 11 or more"),
        ("size:sizes=a", 3, "positive integers separated by"),
    ],
)
def test_an_impossible_partition_is_one_sentence(text, clients, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        deal(text, clients)
    assert "\n" not in str(caught.value)


OWN = """
import numpy as np
from flwr_datasets.partitioner import Partitioner

def every_other(labels, clients, rng, *, step: int = 2):
    return [np.arange(k, len(labels), step * clients) for k in range(clients)]

class EveryOther(Partitioner):
    def __init__(self, num_partitions: int, step: int = 2) -> None:
        super().__init__()
        self._count, self._step = num_partitions, step
    @property
    def num_partitions(self) -> int:
        return self._count
    def load_partition(self, partition_id):
        return self.dataset.select(range(partition_id, len(self.dataset), self._step * self._count))

class Foreign:
    def __init__(self, num_partitions): pass

def overlapping(labels, clients, rng): return [np.arange(10)] * clients
def out_of_range(labels, clients, rng): return [np.array([k, len(labels) + k]) for k in range(clients)]
def negative(labels, clients, rng): return [np.array([-k - 1]) for k in range(clients)]
def too_few(labels, clients, rng): return [np.arange(3)]
def missing(labels, clients, rng): return [np.array([k]) if k else None for k in range(clients)]
def empty(labels, clients, rng): return [np.arange(0)] * clients
def fractions(labels, clients, rng): return [np.array([k + 0.5]) for k in range(clients)]
def nothing(labels, clients, rng): return None
def ragged(labels, clients, rng): return [[[1], [2, 3]]] * clients
def raising(labels, clients, rng): raise KeyError("no such thing")
def greedy(labels, clients, rng):
    labels[:] = 0
    return [np.array([k]) for k in range(clients)]
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize("name", ["every_other", "EveryOther"])
def test_ones_own_function_and_subclass(own, name):
    for step in (2, 4):
        parts = deal(f"{own}:{name}:step={step}")
        assert sum(map(len, parts)) == 2000 // step
        assert parts[1][:2].tolist() == [1, 1 + 5 * step]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("overlapping", "assigned sample 0 more than once"),
        ("out_of_range", "index out of range: there are 2000 samples"),
        ("negative", "index out of range"),
        ("too_few", "returned 1 index arrays for 5 clients"),
        ("missing", "gave client 0"),
        ("empty", "gave client 0 no samples"),
        ("fractions", "not a row of integer indices"),
        ("nothing", "returned NoneType, not a list"),
        ("ragged", "no list of index arrays"),
        ("raising", "KeyError"),
        ("Foreign", "neither a subclass of"),
    ],
)
def test_a_broken_contract_is_named(own, name, expected):
    with pytest.raises(PluginError, match=expected):
        deal(f"{own}:{name}")


def test_one_that_is_installed_has_a_plain_name(own, monkeypatch):
    point = SimpleNamespace(name="every-other", value=f"{own}:every_other")
    monkeypatch.setattr(specs, "entry_points", lambda group: [point] if group == "fedkd.partitioner" else [])
    partitioners.check("every-other:step=4")
    assert sum(map(len, deal("every-other:step=4"))) == 500


def test_a_plug_in_cannot_change_the_labels(own):
    before = LABELS.copy()
    deal(f"{own}:greedy")
    assert np.array_equal(LABELS, before)


OWNERS = np.array([2, 0, 1, 2, 0, 3])
IDS = ("1", "2", "10", "x")


def test_natural_ids_of_a_column():
    parts = partitioners.assign("natural-id:column=writer", LABELS[:6], 4, 0, OWNERS, IDS)
    assert [part.tolist() for part in parts] == [[1, 4], [2], [0, 3], [5]]
    assert parts.ids == IDS
    pairs = partitioners.assign("grouped-natural-id:column=writer,group=3", LABELS[:6], 2, 0, OWNERS, IDS)
    assert [part.tolist() for part in pairs] == [[0, 1, 2, 3, 4], [5]]
    assert pairs.ids == ("1+2+10", "x")
    assert partitioners.assign("natural-id", LABELS, 10, 0, OWNERS, IDS).ids == (), "by label, as ever"


def test_natural_ids_need_as_many_clients_and_samples_of_each():
    with pytest.raises(UsageError, match="makes 4 shares for 5 clients; use --clients 4"):
        partitioners.assign("natural-id:column=writer", LABELS[:6], 5, 0, OWNERS, IDS)
    with pytest.raises(UsageError, match="All samples of client x are in the proxy or validation set; hold fewer out"):
        partitioners.assign("natural-id:column=writer", LABELS[:5], 4, 0, OWNERS[:5], IDS)


def test_columns_that_partitioners_need():
    assert partitioners.column("natural-id:column=writer") == "writer"
    assert partitioners.column("grouped-natural-id:group=3,column=site") == "site"
    for text in ("natural-id", "iid", "own", "./mine.py:split"):
        assert partitioners.column(text) == ""
