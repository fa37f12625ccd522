"""No test image and no private image is in the proxy set; a partition is that of its own labels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.core import seeds
from fedkd.core.errors import UsageError
from fedkd.data import partitioners, proxies, readers, skew, sources
from fedkd.data.partition import Partition
from fedkd.data.readers import Images
from fedkd.simulate.experiment import prepare
from tests.conftest import tiny

SIDE = 16


def pictures(count: int, seed: int) -> torch.Tensor:
    """Distinct random images [N, 16, 16, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def images(pixels: torch.Tensor) -> Images:
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), 10)


def raw(pixels: torch.Tensor) -> list[bytes]:
    """The bytes of each image, for sets and comparisons."""
    return [image.tobytes() for image in pixels.cpu().numpy()]


# A proxy set taken from another data set.


PUBLIC = pictures(60, seed=1)
TRAIN, TEST = (
    images(torch.cat([PUBLIC[:10], pictures(7, seed=2)])),
    images(torch.cat([pictures(5, seed=3), PUBLIC[45:]])),
)


@pytest.mark.parametrize("known", [[TRAIN, TEST], [TEST, TRAIN]], ids=["train, test", "test, train"])
def test_an_external_proxy_leaves_out_the_images_of_every_known_set(known):
    drawn = proxies.draw(images(PUBLIC), None, known, 0, "public")
    assert torch.equal(drawn, PUBLIC[10:45]), "all others, each once, in their order"
    assert torch.equal(proxies.draw(images(PUBLIC), 35, known, 0, "public"), drawn)
    with pytest.raises(UsageError, match="only 35 of its 60 images are neither private nor test images"):
        proxies.draw(images(PUBLIC), 36, known, 0, "public")


def test_an_external_proxy_of_a_given_size_is_drawn_by_the_seed_from_the_images_left():
    allowed = {image: row for row, image in enumerate(raw(PUBLIC)) if 10 <= row < 45}
    chosen = {}
    for seed in range(40):
        rows = [allowed[image] for image in raw(proxies.draw(images(PUBLIC), 12, [TRAIN, TEST], seed, "public"))]
        assert len(set(rows)) == 12
        assert rows == sorted(seeds.rng(seed, "proxy").permutation(np.arange(10, 45))[:12].tolist())
        chosen[seed] = tuple(rows)
    assert len(set(chosen.values())) == 40
    assert {row for rows in chosen.values() for row in rows} == set(range(10, 45)), "every one of them can be drawn"


def test_an_image_that_differs_in_one_number_is_another_image():
    near = PUBLIC[:3].clone()
    near[:, -1, -1, -1] += 1  # wraps around
    near[1, 0, 0, 0] += 1
    assert torch.equal(proxies.draw(images(near), None, [images(PUBLIC)], 0, "near"), near)
    keys = images(PUBLIC).keys
    assert len(set(keys.tolist())) == 60
    assert not set(images(near).keys.tolist()) & set(keys.tolist())


@pytest.mark.parametrize(("fresh", "expected"), [(proxies.DEFAULT_SIZE + 1, proxies.DEFAULT_SIZE), (70, 70)])
def test_an_external_proxy_has_5000_images_unless_there_are_fewer_or_a_size_is_given(fresh, expected):
    public = torch.randint(256, (fresh + 3, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    assert proxies.DEFAULT_SIZE == 5000
    assert len(proxies.draw(images(public), None, [images(public[:1]), images(public[1:3])], 0, "public")) == expected


def write(root, split: str, classes: dict[str, torch.Tensor]) -> None:
    """A folder of images per class."""
    for name, pixels in classes.items():
        (root / split / name).mkdir(parents=True)
        for number, image in enumerate(pixels.numpy()):
            Image.fromarray(image).save(root / split / name / f"{number:03}.png")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A data set and a proxy set as folders: 5 proxy images are training images, 4 are test images, 9 neither."""
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    train, test, fresh = pictures(24, seed=11), pictures(12, seed=12), pictures(9, seed=13)
    write(tmp_path / "set", "train", {"a": train[:12], "b": train[12:]})
    write(tmp_path / "set", "test", {"a": test[:6], "b": test[6:]})
    write(
        tmp_path / "public",
        "train",
        {"x": torch.cat([train[10:15], fresh[:4]]), "y": torch.cat([test[4:8], fresh[4:]])},
    )
    options = {"dataset": f"folder:{tmp_path / 'set'},pixels={SIDE}", "proxy": f"folder:{tmp_path / 'public'}"}
    return options, train, test, fresh


def test_no_test_image_and_no_private_image_is_in_the_proxy_folder_of_a_run(folders):
    options, train, test, fresh = folders
    experiment = prepare(tiny(**options))
    assert torch.equal(experiment.setup.proxy.images, fresh), (
        "at the size of the data set's images, not at the default size"
    )
    assert torch.equal(experiment.train.pixels, train)
    assert torch.equal(experiment.test.pixels, test)
    assert experiment.proxy_rows is None
    assert sorted(experiment.partition.rows.tolist()) == list(range(24)), "all training images are private"
    seen = set()
    for seed in range(5):
        few = prepare(tiny(**{**options, "proxy": f"{options['proxy']},size=4"}, seed=seed)).setup.proxy.images
        assert len(few) == 4
        assert set(raw(few)) < set(raw(fresh))
        seen.add(tuple(raw(few)))
    assert len(seen) > 1
    with pytest.raises(UsageError, match="only 9 of its 18 images"):
        prepare(tiny(**{**options, "proxy": f"{options['proxy']},size=10"}))


def test_with_data_on_the_nodes_the_proxy_leaves_out_the_test_images(folders):
    options, train, test, fresh = folders
    experiment = prepare(tiny(**options, partitioner="own"))
    assert set(raw(experiment.setup.proxy.images)) == set(raw(train[10:15])) | set(raw(fresh))
    assert not set(raw(experiment.setup.proxy.images)) & set(raw(test))
    assert len(experiment.train) == 0


# A proxy set held out of the training set.


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet:alpha=0.5"])
def test_clients_proxy_and_test_set_share_no_image(partitioner):
    train, test = (readers.read(sources.digits(), split) for split in ("train", "test"))
    everything = set(raw(train.pixels))
    assert len(everything) == len(train) == 1438
    assert prepare(tiny(seed=6)).proxy_rows.tolist() == proxies.hold_out(40, 1438, 6)[0].tolist()
    for seed, size in ((0, 1), (1, 40), (2, 700), (3, 1400)):
        experiment = prepare(tiny(partitioner=partitioner, proxy=f"holdout:size={size}", seed=seed))
        proxy, partition = experiment.proxy_rows, experiment.partition
        assert len(set(proxy.tolist())) == len(experiment.setup.proxy.images) == size
        assert not set(proxy.tolist()) & set(partition.rows.tolist())
        assert sorted([*proxy.tolist(), *partition.rows.tolist()]) == list(range(len(train))), (
            "each sample is in one of them"
        )
        assert torch.equal(experiment.setup.proxy.images, train.pixels[torch.from_numpy(proxy)])
        assert torch.equal(experiment.test.pixels, test.pixels)
        public, tested = set(raw(experiment.setup.proxy.images)), set(raw(experiment.test.pixels))
        assert not public & tested
        private = []
        for client in range(experiment.clients):
            data, rows = experiment.client(client, 1, {}).data, torch.from_numpy(partition[client])
            assert torch.equal(data.pixels, train.pixels[rows])
            assert torch.equal(data.labels, train.labels[rows])
            assert not set(raw(data.pixels)) & (public | tested)
            private += raw(data.pixels)
        assert len(set(private)) == len(private) == 1438 - size


def test_samples_are_assigned_by_the_labels_of_the_private_images():
    """Not by other labels, as if positions among the private images were indices in the training set."""
    experiment = prepare(tiny(partitioner="natural-id", clients=10, proxy="holdout:size=300", seed=5))
    kinds = [set(experiment.train.labels[torch.from_numpy(rows)].tolist()) for rows in experiment.partition]
    assert sorted(kinds, key=min) == [{label} for label in range(10)]


@pytest.mark.parametrize(
    ("rows", "count"), [(5, 1), (9, 1), (10, 2), (24_994, 4998), (24_999, 4999), (25_000, 5000), (60_000, 5000)]
)
def test_a_fifth_is_held_out_by_default_but_5000_at_most(rows, count):
    proxy, private = proxies.hold_out(None, rows, seed=1)
    assert len(proxy) == count
    assert sorted([*proxy.tolist(), *private.tolist()]) == list(range(rows))
    assert (np.diff(proxy) > 0).all()
    assert (np.diff(private) > 0).all()


def test_the_held_out_samples_depend_on_the_seed_and_can_be_any():
    drawn = [proxies.hold_out(30, 100, seed)[0] for seed in range(40)]
    assert len({tuple(rows.tolist()) for rows in drawn}) == 40
    assert set(np.concatenate(drawn).tolist()) == set(range(100))
    assert drawn[7].tolist() == sorted(seeds.rng(7, "proxy").permutation(100)[:30].tolist())
    assert [len(part) for part in proxies.hold_out(99, 100, 0)] == [99, 1]
    for size, rows in ((100, 100), (None, 4), (0, 100)):
        with pytest.raises(UsageError, match="leaves no private samples"):
            proxies.hold_out(size, rows, 0)


# Partitions and their cache.


LABELS = np.random.default_rng(3).integers(0, 10, 600)
VARIANTS = {
    "base": ("dirichlet:alpha=0.5", LABELS, 5, 0),
    "labels": ("dirichlet:alpha=0.5", np.roll(LABELS, 1), 5, 0),  # as many of each class
    "renamed": ("dirichlet:alpha=0.5", 9 - LABELS, 5, 0),
    "fewer labels": ("dirichlet:alpha=0.5", LABELS[:-1], 5, 0),
    "seed": ("dirichlet:alpha=0.5", LABELS, 5, 1),
    "clients": ("dirichlet:alpha=0.5", LABELS, 4, 0),
    "option": ("dirichlet:alpha=0.6", LABELS, 5, 0),
    "kind": ("inner-dirichlet:alpha=0.5", LABELS, 5, 0),
}


@pytest.fixture
def assignments(tmp_path, monkeypatch):
    """The calls of the partitioner, without those that are read from the cache."""
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    calls, real = [], partitioners._by_flower

    def by_flower(recipe, text, labels, clients, seed):
        calls.append((text, clients, seed))
        return real(recipe, text, labels, clients, seed)

    monkeypatch.setattr(partitioners, "_by_flower", by_flower)
    return calls


def test_partitions_in_a_shared_cache_are_those_of_separate_caches(tmp_path, monkeypatch, assignments):
    shared = {name: partitioners.assign(*variant) for name, variant in VARIANTS.items()}
    assert len(assignments) == len(VARIANTS), "every one is computed"
    assert len({partition.digest() for partition in shared.values()}) == len(VARIANTS)
    assert shared["seed"].sizes.tolist() != shared["base"].sizes.tolist(), (
        "the seed changes more than the order of samples"
    )
    again = {name: partitioners.assign(*variant) for name, variant in VARIANTS.items()}
    assert len(assignments) == len(VARIANTS), "afterwards it is read from the cache"
    for name, variant in VARIANTS.items():
        monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / name))
        fresh = partitioners.assign(*variant)
        for other in (shared[name], again[name]):
            assert other.digest() == fresh.digest()
            assert np.array_equal(other.rows, fresh.rows)
            assert np.array_equal(other.ends, fresh.ends)
            assert (other.rows.dtype, other.ends.dtype) == (fresh.rows.dtype, fresh.ends.dtype)
    assert len(assignments) == 2 * len(VARIANTS)


@pytest.mark.parametrize("changed", ["flwr-datasets", "numpy"])
def test_another_version_of_a_library_assigns_anew(monkeypatch, assignments, changed):
    parts = [np.arange(k, 600, 5) for k in range(5)]
    monkeypatch.setattr(partitioners, "_by_flower", lambda *given: assignments.append(given) or parts)
    for calls in (1, 1):
        partitioners.assign(*VARIANTS["base"])
        assert len(assignments) == calls
    if changed == "numpy":
        monkeypatch.setattr(np, "__version__", "0.0")
    else:
        monkeypatch.setattr(partitioners, "version", lambda name: f"0.0 of {name}")
    partitioners.assign(*VARIANTS["base"])
    assert len(assignments) == 2


def test_two_data_sets_of_one_size_get_partitions_of_their_own_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    pixels, kinds = pictures(30, seed=21), {}
    for name, rows in (("one", torch.arange(30)), ("two", torch.arange(30).flip(0))):
        sizes = (20, 10) if name == "one" else (10, 20)
        write(tmp_path / name, "train", dict(zip("ab", torch.split(pixels[rows], sizes), strict=True)))
        write(tmp_path / name, "test", {"a": pictures(2, seed=22), "b": pictures(2, seed=23)})
        options = {"dataset": f"folder:{tmp_path / name},pixels={SIDE}", "proxy": "noise:size=8"}
        experiment = prepare(tiny(**options, partitioner="natural-id", clients=2))
        kinds[name] = [experiment.client(client, 1, {}).data.labels.tolist() for client in range(2)]
    assert sorted(kinds["one"]) == [[0] * 20, [1] * 10]
    assert sorted(kinds["two"]) == [[0] * 10, [1] * 20]


def test_a_shuffled_order_depends_on_the_seed_without_a_cache():
    labels = np.zeros(50, dtype=np.int64)
    first, other = (partitioners.assign("iid", labels, 4, seed) for seed in (0, 1))
    assert first.digest() != other.digest()
    order = seeds.rng(0, "partition", "order").permutation(50)
    assert [part.tolist() for part in first] == [sorted(part.tolist()) for part in np.split(order, [13, 26, 38])]


# The digest and the skew of a partition.


def test_the_digest_of_a_partition_depends_on_the_samples_of_every_client():
    one, two, three = np.array([0, 4]), np.array([1, 3]), np.array([2])
    partitions = [[one, two, three], [two, one, three], [one, three, two], [np.array([0]), np.array([4, 1, 3]), three]]
    partitions += [[one, two], [one, two, three, np.array([], dtype=np.int64)], [np.array([0, 5]), two, three]]
    digests = [Partition.of(parts).digest() for parts in partitions]
    assert len(set(digests)) == len(digests)
    assert Partition.of([one.copy(), two, three]).digest() == digests[0]
    assert Partition.of([one[::-1], two, three]).sorted().digest() == digests[0]


def test_skew_of_unequal_shares_by_hand():
    """Clients hold classes (2, 1, 1), (0, 6, 0) and (1, 0, 1) of 3: pooled 3/12, 7/12, 2/12."""
    labels = np.array([0, 0, 1, 2] + [1] * 6 + [0, 2] + [2] * 4)
    partition = Partition.of([np.arange(4), np.arange(4, 10), np.array([10, 11])])
    result = skew.measure(labels, partition, 3, 16)
    assert skew.counts(labels, partition, 3).tolist() == [[2, 1, 1], [0, 6, 0], [1, 0, 1]]
    assert (result.smallest, result.median, result.largest) == (2, 4, 6)
    distances = [(3 + 4 + 1) / 24, (3 + 5 + 2) / 24, (3 + 7 + 4) / 24]  # half of the sums, in twelfths
    assert result.distance == pytest.approx(sum(distances) / 3)
    assert result.classes == pytest.approx((2**1.5 + 1 + 2) / 3)  # entropies of 1.5, 0 and 1 bits
    assert result.coverage == 12 / 16


def test_skew_does_not_depend_on_the_order_of_clients_or_on_classes_without_samples():
    labels = np.array([0, 0, 1, 1, 1, 2])
    parts = [np.array([0, 2]), np.array([1, 3, 4]), np.array([5])]

    def measured(parts, classes):
        return dataclasses.astuple(skew.measure(labels, Partition.of(parts), classes, 6))

    assert measured(parts[::-1], 3) == pytest.approx(measured(parts, 3))
    assert measured(parts, 7) == pytest.approx(measured(parts, 3))
