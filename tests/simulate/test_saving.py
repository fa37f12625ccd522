"""``--save clients``: the files are the models that were evaluated, in every engine, and can be used as students."""

from __future__ import annotations

import json

import pytest
from sklearn.metrics import accuracy_score

import fedkd
from fedkd.core import tensors
from fedkd.core.communication.replies import Expected
from fedkd.core.errors import UsageError
from fedkd.distill import distill
from fedkd.distill.config import DistillConfig
from fedkd.simulate import checks, simulate
from fedkd.simulate.experiment import prepare
from fedkd.simulate.flower import client_app, server_app
from fedkd.simulate.flower.local_grid import LocalGrid
from fedkd.simulate.rounds import Memories
from fedkd.simulate.saving import QUERY
from tests.conftest import tiny
from tests.simulate.test_resume import resume

OPTIONS = {"algorithm": "fedmd", "compare": "local", "model": "cnn:width=4,resnet8:width=4", "clients": 4}
OPTIONS |= {"participation": 0.5, "rounds": 2}
FORGETFUL = """
from fedkd.algorithms.local import Local

class Forgetful(Local):
    def local_update(self, setup, client, message):
        update, memory = super().local_update(setup, client, message)
        return update, {} if client.id == 1 else memory
"""


def models_of(out) -> dict[str, str]:
    """The digest of each model of a client."""
    return {
        str(path.relative_to(out)): tensors.digest(tensors.load(path)) for path in out.glob("clients-*/*.safetensors")
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "run"
    simulate(tiny(**OPTIONS, save="clients", out=str(out)))
    return out


def test_each_file_is_the_model_that_was_evaluated(saved):
    rows = [json.loads(line) for line in (saved / "rounds.jsonl").read_text().splitlines()]
    test = prepare(tiny(**OPTIONS)).test
    for name in ("fedmd", "local"):
        latest = {entry["client"]: entry for row in rows if row["algorithm"] == name for entry in row["clients"]}
        folder = saved / f"clients-{name}-seed0"
        assert {path.name for path in folder.iterdir()} == {f"client-{client}.safetensors" for client in latest}
        for client, entry in latest.items():
            student = fedkd.load_student(folder / f"client-{client}.safetensors")
            assert student.model == ("cnn:width=4", "resnet8:width=4")[client % 2]
            images = student.scaling(test.pixels)
            predicted = student.module()(images).argmax(-1)
            assert accuracy_score(test.labels, predicted) == pytest.approx(entry["accuracy"], abs=2 / 359)
    assert not list(saved.glob("student*")), "neither method has one"


def test_they_have_the_same_bits_with_workers_and_when_they_are_saved_later(saved, tmp_path):
    simulate(tiny(**OPTIONS | {"workers": "2", "checkpoint_every": 0}, save="clients", out=str(tmp_path / "workers")))
    assert models_of(tmp_path / "workers") == models_of(saved)
    simulate(tiny(**OPTIONS, out=str(tmp_path / "later")))
    assert models_of(tmp_path / "later") == {}
    resume(tmp_path / "later", save="clients")
    assert models_of(tmp_path / "later") == models_of(saved) != {}


def test_a_clients_model_is_a_teacher_and_can_be_exported(saved, tmp_path):
    pytest.importorskip("onnxruntime")
    from fedkd.export import export

    file = sorted((saved / "clients-local-seed0").iterdir())[0]
    options = {"dataset": "digits", "student": "cnn:width=4", "epochs": 1, "corrupted_images": 0, "device": "cpu"}
    distill(DistillConfig.parse({**options, "teacher": str(file), "out": str(tmp_path / "distilled")}))
    assert json.loads((tmp_path / "distilled" / "result.json").read_text())["teachers"] == [str(file)]
    export(file, to=["onnx"], out=tmp_path / "exported", check=False)
    assert (tmp_path / "exported" / f"{file.stem}.onnx").exists()


def test_a_client_whose_model_cannot_be_had_is_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FORGETFUL)
    options = {"algorithm": f"{tmp_path / 'mine.py'}:Forgetful", "rounds": 1, "evaluate_every": 1}
    simulate(tiny(**options, save="clients", out=str(tmp_path / "run")))
    assert "models of clients not saved: 1 error (client 1)" in capsys.readouterr().out
    names = {name.rpartition("/")[2] for name in models_of(tmp_path / "run")}
    assert names == {"client-0.safetensors", "client-2.safetensors"}


@pytest.mark.parametrize("changes", [{}, {"save": "clients", "partitioner": "own"}])
def test_a_client_does_not_send_its_model_unasked_or_if_its_data_is_its_own(changes):
    config = tiny(**changes)
    grid = LocalGrid(client_app.app, 3, config.run_config())
    (reply,) = server_app.exchange(
        grid, grid.get_node_ids(), config, Memories("run"), QUERY, 1, {0: {}}, {0: Expected({})}
    )
    assert "This client does not send its model" in reply.failure


def test_models_of_nodes_with_their_own_data_are_not_asked_for():
    with pytest.raises(UsageError, match="--save clients: models that were trained"):
        checks.check(tiny(save="clients", partitioner="own"))
