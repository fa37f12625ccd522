"""The server on Flower's engines: random node ids, nodes that are late or gone, or have the same number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from PIL import Image

from fedkd.core import run_directory, tensors
from fedkd.core.communication.replies import Expected
from fedkd.core.errors import DataError, RunError
from fedkd.data import loading
from fedkd.simulate import experiment
from fedkd.simulate.flower import client_app, node_data, server_app
from fedkd.simulate.flower.local_grid import LocalGrid
from fedkd.simulate.flower.local_update import ClientRunner, failure
from fedkd.simulate.rounds import Memories
from tests.conftest import tiny

EXPECTED = dict.fromkeys(range(3), Expected({"logits": 4 * 40 * 10}))
IDS = [71, -5, 40]  # of clients 0, 1 and 2, as an engine of Flower might number them


class Foreign(LocalGrid):
    """The local grid with random node ids, as Flower has them, and nodes that connect one at a time."""

    def __init__(self, *args, late: int = 0, lost: tuple[int, ...] = (), numbers: dict | None = None, **more) -> None:
        super().__init__(*args, **more)
        self.late, self.lost, self.numbers = late, lost, numbers or {}
        run = self._runner.run

        def named(message: Message, client: int) -> Message:
            reply = run(message, client)
            if not reply.has_error() and message.metadata.message_type == "query":
                reply.content["metrics"] = MetricRecord({"client": self.numbers.get(client, client)})
            return reply

        object.__setattr__(self._runner, "run", named)

    def get_node_ids(self):
        self.late -= 1
        return sorted(IDS)[: 3 if self.late < 0 else 1]

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return super().create_message(content, message_type, IDS.index(dst_node_id) + 1, group_id, ttl)

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        return [None if m.metadata.dst_node_id - 1 in self.lost else i for m, i in zip(messages, ids, strict=True)]


def foreign(config, **more) -> Foreign:
    return Foreign(client_app.app, config.clients, config.run_config(), **more)


def test_nodes_are_found_by_the_number_they_give():
    config = tiny()
    assert server_app.client_nodes(foreign(config, late=3), config) == IDS
    assert server_app.client_nodes(LocalGrid(client_app.app, 10**6, {}), config) == range(1, 10**6 + 1), (
        "nodes of the local grid are not queried"
    )


def test_a_run_over_foreign_nodes_gives_the_bits_of_ours(tmp_path):
    config = tiny(partitioner="linear", algorithm="ensemble:downlink=labels")
    students = []
    for name, grid in (("foreign", foreign(config)), ("ours", LocalGrid(client_app.app, 3, config.run_config()))):
        server_app.run_on(
            grid,
            run_directory.begin(tiny(partitioner="linear", algorithm=config.algorithm, out=str(tmp_path / name)), "x"),
        )
        students.append(tensors.load(tmp_path / name / "student.safetensors"))
    assert tensors.equal(*students)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"late": 10**9}, "3 nodes are needed and 1 are connected"),
        ({"numbers": {2: 0}}, r"have the client numbers \[0, 1\]"),
        ({"numbers": {2: 7}}, r"have the client numbers \[0, 1, 7\]"),
        ({"lost": (1,)}, r"have the client numbers \[0, 2\]"),
    ],
)
def test_nodes_that_are_not_those_wanted_end_the_run(more, expected, monkeypatch):
    if "late" in more:  # they never come
        monkeypatch.setattr(server_app, "START", 0.3)
    config = tiny()
    with pytest.raises(RunError, match=expected):
        server_app.client_nodes(foreign(config, **more), config)


def test_a_node_without_a_number_is_an_error_with_the_remedy():
    def bare(message: Message, context) -> Message:
        del context.node_config["partition-id"]
        return client_app.app(message, context)

    app = ClientApp()
    app.query()(bare)
    config = tiny()
    grid = foreign(config)
    object.__setattr__(grid._runner, "app", app)
    with pytest.raises(RunError, match="This node has no number; start it with --node-config"):
        server_app.client_nodes(grid, config)


def test_a_round_continues_without_clients_that_never_reply():
    config = tiny()
    nodes, asked = [IDS[client] for client in range(3)], {client: {"round": torch.tensor(1)} for client in range(3)}
    replies = list(
        server_app.exchange(foreign(config, lost=(1,)), nodes, config, Memories("run"), "train", 1, asked, EXPECTED)
    )
    assert {reply.client: reply.failure for reply in replies} == {0: "", 1: "no reply", 2: ""}
    assert len({reply.serialized.downlink_arrays for reply in replies}) == 1  # a message without a reply was sent, too


def test_a_failed_local_update_leaves_the_old_memory(tmp_path, monkeypatch):
    """On Flower's engines too, where the context is kept even if the app raises."""
    config = tiny(algorithm="local", compare="fedmd")
    runner = ClientRunner(client_app.app, 3, config.run_config(), tmp_path)
    grid = LocalGrid(client_app.app, 3, config.run_config())

    def message_for(algorithm: str) -> Message:
        run = {"run": "", "algorithm": algorithm, "seed": 0, "dataset": "digits"}
        record = ConfigRecord({"round": 1, "memory": 0, "keep": 0, **run})
        return grid.create_message(
            RecordDict({"arrays": server_app.to_record({"round": torch.tensor(1)}), "config": record}), "train", 1, "1"
        )

    runner.run(message_for("local"), 0)
    before = (tmp_path / "1").read_bytes()
    monkeypatch.setattr(experiment.prepared(config.run("fedmd", 0, "digits")).algorithm.__class__, "local_update", None)
    assert runner.run(message_for("fedmd"), 0).has_error()
    assert (tmp_path / "1").read_bytes() == before
    assert not (tmp_path / "1.new").exists()


def deployed(folder: Path | None, config) -> Callable[[Message, int], Message]:
    """Clients of nodes that were started just now, with a folder for their memories, or without."""

    def run(message: Message, client: int) -> Message:
        node = {"partition-id": client} | ({"memory": str(folder / f"node{client}")} if folder else {})
        try:
            return client_app.app(message, Context(1, client, node, RecordDict(), config.run_config()))
        except Exception as error:  # as an engine of Flower does
            return failure(message, repr(error))

    return run


@pytest.mark.parametrize("method", ["fedmd", "scarlet", "fedavg"])
def test_nodes_with_a_memory_folder_go_on_after_a_restart(tmp_path, method):
    """Each message reaches a node that has just been started, and the run itself is resumed after each round."""
    config = tiny(algorithm=method, rounds=3, uplink_codec="float16:delta=true", out=str(tmp_path / "whole"))
    server_app.run_on(foreign(config), run_directory.begin(config, method))
    for number in (1, 2, 3):
        grid = foreign(config)
        object.__setattr__(grid._runner, "run", deployed(tmp_path / "nodes", config))
        again = {"resume": str(tmp_path / "parts")} if number > 1 else {}
        given = {**config.run_config(), "out": str(tmp_path / "parts"), "rounds": number, **again}
        server_app.app(grid, Context(1, 0, {}, RecordDict(), given))
    rows = [
        [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in file.read_text().splitlines()]
        for file in (tmp_path / "whole" / "rounds.jsonl", tmp_path / "parts" / "rounds.jsonl")
    ]
    assert rows[0] == rows[1]
    if method != "fedmd":
        students = [tensors.load(tmp_path / name / "student.safetensors") for name in ("whole", "parts")]
        assert tensors.equal(*students)


def test_a_node_that_lost_its_memory_fails_once_and_begins_anew(tmp_path):
    config = tiny(algorithm="fedmd", rounds=4, out=str(tmp_path / "run"))
    grid = foreign(config)
    kept, asked = grid._runner.run, deployed(None, config)

    def run(message: Message, client: int) -> Message:
        forgets = client == 1 and message.metadata.group_id.endswith("/2")
        return asked(message, client) if forgets else kept(message, client)

    object.__setattr__(grid._runner, "run", run)
    server_app.run_on(grid, run_directory.begin(config, "x"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [[(f["client"], f["cause"]) for f in row["failures"]] for row in rows] == [[], [(1, "lost memory")], [], []]
    assert "lost its memory of round 1; it begins anew" in rows[1]["failures"][0]["reason"]


def test_a_node_trains_on_its_own_images(tmp_path):
    """Rows that lie in folders of its own count; images that are public are refused, and so is nothing at all."""
    config = tiny(partitioner="own", clients=1)
    public = experiment.prepared(tiny(clients=1))
    assert len(experiment.prepared(config).training_partition[0]) == 0
    for row in public.training_partition[0][:30]:
        folder = tmp_path / "mine" / str(int(public.train.labels[row]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(public.train.pixels[row].numpy()).save(folder / f"{row}.png")
    images = node_data.node_data(str(tmp_path / "mine"), config)
    assert len(images) == 30
    assert sorted(images.labels.tolist()) == sorted(public.train.labels[public.training_partition[0][:30]].tolist())

    def reply_of(**node_config) -> Message:
        def placed(message: Message, context) -> Message:
            context.node_config.update(node_config)
            return client_app.app(message, context)

        app = ClientApp()
        app.train()(placed)
        grid = LocalGrid(app, 1, config.run_config())
        return next(
            iter(
                server_app.exchange(
                    grid,
                    grid.get_node_ids(),
                    config,
                    Memories("run"),
                    "train",
                    1,
                    {0: {"round": torch.tensor(1)}},
                    EXPECTED,
                )
            )
        )

    reply = reply_of(data=str(tmp_path / "mine"))
    assert reply.failure == ""
    assert reply.update.examples == 30
    assert "This node has no data" in reply_of().failure
    Image.fromarray(public.setup.proxy.images[0].numpy()).save(tmp_path / "mine" / "0" / "public.png")
    node_data.node_data.cache_clear()
    loading.read.cache_clear()
    with pytest.raises(DataError, match=r"1 of the 31 images in .* are in the proxy or the test set"):
        node_data.node_data(str(tmp_path / "mine"), config)


def test_an_actor_of_ray_that_died_is_a_process_that_died():
    """Ray's text has the number of the actor, and so would differ from run to run."""

    def run(message: Message, client: int) -> Message:
        kind = ("Died", "Unavailable")[client % 2]
        return failure(message, f"<class 'ray.exceptions.Actor{kind}Error'>:<'4d23 is gone'>")

    config = tiny()
    grid = foreign(config)
    object.__setattr__(grid._runner, "run", run)
    asked = {client: {"round": torch.tensor(1)} for client in range(3)}
    replies = list(server_app.exchange(grid, IDS, config, Memories("run"), "train", 1, asked, EXPECTED))
    assert {(reply.cause, reply.failure) for reply in replies} == {("died", "the process of this client died, twice")}
