"""The benchmark. Its bare loop, the arithmetic of a run as a script, is also an oracle."""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedkd.bench import bare, gpu, kernels, report, stacks
from fedkd.bench.__main__ import app, on_gpu, plan, precisions
from fedkd.bench.stacks import Work
from fedkd.core import notes, tensors
from fedkd.core.errors import UsageError
from fedkd.simulate.experiment import prepare
from fedkd.training import graphs, models, optimizers
from fedkd.training.losses.logits import kl
from tests.conftest import simulated, slow, tiny


@pytest.mark.parametrize(
    ("algorithm", "workers"), [("fedavg", 2), ("ensemble", 1), slow("fedavg", 1), slow("ensemble", 2)]
)
def test_a_run_equals_the_bare_loop_to_the_bit(tmp_path, algorithm, workers):
    """Against a loop without messages and algorithms, with torch.optim."""
    changes = {"algorithm": algorithm, "partitioner": "linear", "local_epochs": 2, "augment": True}
    simulated(tmp_path / "run", **changes)
    student, seconds = bare.run(prepare(tiny(**changes)), workers)
    assert tensors.equal(student, tensors.load(tmp_path / "run" / "student.safetensors"))
    assert len(seconds) == 2


def test_a_step_on_cached_soft_labels_is_cheaper_than_one_with_twenty_teachers(experiment):
    """What FedDF's public code does in every step, against what is done here: at least four times the arithmetic."""
    setup = experiment.setup
    student, *teachers = (models.build("cnn", 10, "group").to(memory_format=torch.channels_last) for _ in range(21))
    images = setup.trainer.scaling(experiment.train.pixels[:64])
    cached = torch.stack([teacher(images).detach() for teacher in teachers]).softmax(-1).mean(0)
    step = optimizers.adam(list(student.parameters()))

    def distill(with_teachers: bool) -> int:
        """Floating point operations of a step."""
        with FlopCounterMode(display=False) as counter:
            probs = cached
            if with_teachers:
                with torch.no_grad():
                    probs = torch.stack([teacher(images) for teacher in teachers]).softmax(-1).mean(0)
            kl(student(images), probs).backward()
            step(1e-3)
        return counter.get_total_flops()

    assert distill(True) > 4 * distill(False) > 0


def test_the_workload_has_the_given_sizes():
    work = Work(clients=4, images=8, rounds=2)
    experiment = prepare(work.config())
    assert [len(part) for part in experiment.training_partition] == [8] * 4
    many = prepare(Work(4, 2, 2, registered=1000).config())
    assert many.clients == 1000
    assert many.training_partition.sizes.tolist() == [2] * 1000
    assert many.config.participation * 1000 == 4


@pytest.mark.slow
def test_stacks_are_run_and_reported():
    """Fedkd and the bare loop, as the command runs them."""
    work = Work(clients=2, images=16, rounds=2, model="cnn:width=8")
    measured = {
        "bare loop, 1 process": stacks.bare(work, 1),
        "fedkd, 1 worker": stacks.fedkd(work, workers="1"),
    }
    for timing in measured.values():
        assert len(timing.rounds) == 2
        assert min(timing.rounds) > 0
        assert timing.seconds_outside_rounds > 0
    ours = measured["fedkd, 1 worker"]
    assert ours.messages == 2
    results = {
        "work": {"clients": 2, "images": 16},
        "fedavg": {
            name: {
                "reference": "bare loop, 1 process" if "fedkd" in name else "",
                "megabytes": 9.0,
                "megabytes_without_images": None,
                "bytes": timing.bytes,
                "messages": timing.messages,
                "runs": [
                    {
                        "rounds": timing.rounds,
                        "seconds_outside_rounds": timing.seconds_outside_rounds,
                        "seconds_to_first_client": timing.seconds_to_first_client,
                    }
                ],
            }
            for name, timing in measured.items()
        },
    }
    table = report.table("fedavg", json.loads(json.dumps(results)))
    assert table.row_count == 2
    parts = plan(work, 2, ["float32"])
    assert set(parts) == {"fedavg", "ensemble", "checkpoints", "idle", "many", "gpu"}
    assert all(stack.reference in part or not stack.reference for part in parts.values() for stack in part.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_part_is_left_out_and_said_to_be(tmp_path, capsys, monkeypatch):
    notes.say.cache_clear()
    monkeypatch.setattr(stacks, "peak", lambda threads: {})
    app(["--parts", "gpu", "peak", "--repeats", "1", "--out", str(tmp_path / "bench")])
    assert "gpu is left out" in capsys.readouterr().err
    with pytest.raises(UsageError, match="nothing to measure"):
        app(["--parts", "gpu", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


_ray = [pytest.mark.slow, pytest.mark.xdist_group("engines")]


@pytest.mark.parametrize("name", ["fedkd", "pfl-research", pytest.param("Flower", marks=_ray)])
def test_the_stacks_of_the_part_gpu_compute_on_the_device_of_the_work(name, monkeypatch):
    """Here on a CPU. Flower would wait for the share of a GPU, which is passed on (see below)."""
    work, own = Work(clients=2, images=16, rounds=2, model="cnn:width=8"), stacks.flower
    monkeypatch.setattr(stacks, "flower", lambda work, cpus, gpus, **more: own(work, cpus, **more))
    runs = [stack.run for each, stack in on_gpu(work, 4, precisions("cpu")).items() if each.startswith(name)]
    if not runs:
        pytest.skip("not installed")
    assert len(runs[0]().rounds) == 2


def test_other_simulators_are_told_the_device_and_the_share_of_the_gpu(monkeypatch):
    commands = []
    monkeypatch.setattr(stacks, "_foreign", lambda arguments, with_memory: commands.append(" ".join(arguments)))
    for name, stack in plan(Work(), 16, ["tf32"])["gpu"].items():
        if name != "fedkd, tf32":
            stack.run()
    assert all("--device cuda" in command for command in commands)
    shares = [command.split()[-1] for command in commands if "flower_stock" in command]
    assert not shares or shares == ["0.25", "0.0625"]
    assert Work(device="cuda").config().device == "cuda"


@pytest.mark.parametrize("name", ["bench", "idle-many"])
def test_the_published_results_have_the_keys_of_the_report(name):
    results = json.loads((Path(__file__).parents[2] / "simulations" / "bench" / f"{name}.json").read_text())
    parts = report.TITLES.keys() & results.keys()
    assert parts
    for part in parts:
        assert report.table(part, results).row_count == len(results[part])


def test_images_mapped_from_the_cache_are_measured_separately(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path))
    (tmp_path / "images").write_bytes(bytes(50_000_000))
    before, none = stacks.megabytes_of(os.getpid())
    with (tmp_path / "images").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as images:
        assert sum(images[:: mmap.PAGESIZE]) == 0
        total, mapped = stacks.megabytes_of(os.getpid())
    assert none == 0
    assert mapped == pytest.approx(50, rel=0.01)
    assert total - mapped == pytest.approx(before, rel=0.1)


def test_an_idle_client_reports_when_it_started():
    timing = stacks.fedkd(Work(2, 2, 2, "cnn:width=8", "fedkd.bench.idle:Idle"))
    assert timing.seconds_to_first_client is not None
    assert 0 < timing.seconds_to_first_client < 120
    assert timing.bytes == 0


class _NoCopyToHost(TorchDispatchMode):
    """Refuses what cannot be captured in a CUDA graph: a copy of a number to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", [name for name in gpu.IMPLEMENTATIONS if "bfloat16" not in name])
def test_the_implementations_for_a_gpu_have_the_weights_of_the_plain_loop(monkeypatch, implementation):
    """Steps are recorded that copy nothing to the host; here a replay does what the step did."""

    def record(step, device):
        def replay():
            with _NoCopyToHost():
                step()

        return replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "recorder", lambda device: lambda step: record(step, device))
    work = gpu.Work.of("cnn:width=8", clients=2, images=96, shared=4, device="cpu")
    separate, made = gpu.Plain(work).train(), gpu.IMPLEMENTATIONS[implementation](work)
    for _ in range(2):
        weights = made.train()
        for name, start in work.module.state_dict().items():
            assert torch.allclose(weights[name], separate[name], rtol=1e-4, atol=1e-5), name
            assert not torch.allclose(separate[name][0], start, rtol=1e-4, atol=1e-5)
    made.predict()


def test_one_command_measures_all_that_is_required_of_a_gpu(capsys):
    """Here on a CPU, where a run trains as the plain loop does."""
    work = ["--clients", "2", "--images", "32", "--shared", "4", "--repeats", "1", "--rounds", "3"]
    work += ["--run-images", "48"]
    gpu.app(["--device", "cpu", "--model", "cnn:width=8", "cnn:width=4", *work])
    about, plain, stacked, run, *other = map(json.loads, capsys.readouterr().out.splitlines())
    assert [about["model"], other[0]["model"]] == ["cnn:width=8", "cnn:width=4"]
    assert len(other) == 4
    assert plain["difference"] == 0
    assert 0 < stacked["difference"] < 1e-5
    assert stacked["times_the_plain_loop"] == pytest.approx(
        stacked["images_per_second"] / plain["images_per_second"], abs=0.1
    )
    alone = 2 * 48 * gpu.EPOCHS / plain["images_per_second"]
    assert run["seconds_of_training_alone"] == pytest.approx(alone, abs=1e-4)
    assert run["share_outside_training"] == pytest.approx(1 - alone / run["seconds_of_later_rounds"], abs=0.02)
    assert run["share_outside_training"] < run["share_outside_training_with_evaluation"] < 1


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [name for name in gpu.IMPLEMENTATIONS if "bfloat16" not in name])
def test_every_implementation_on_a_gpu_has_the_weights_of_the_plain_loop(implementation):
    work = gpu.Work.of("cnn:width=8", clients=3, images=96, shared=4, device="cuda")
    separate, made = gpu.Plain(work).train(), gpu.IMPLEMENTATIONS[implementation](work)
    for _ in range(2):
        weights = made.train()
        for name in separate:
            assert torch.allclose(weights[name], separate[name], rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("model", ["resnet8", "resnet20", "cnn"])
def test_the_layers_whose_kernels_are_measured_are_those_of_the_models(model):
    found = Counter()

    def count(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            found[
                layer.in_channels, layer.out_channels, inputs[0].shape[-1], layer.kernel_size[0], layer.stride[0]
            ] += 1

    with torch.device("meta"), nn.modules.module.register_module_forward_hook(count):
        models.build(model, 10, "group")(torch.empty(1, 3, 32, 32))
    assert found == {layer: counts[model] for layer, counts in kernels.LAYERS.items() if model in counts}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_are_measured_on_a_gpu_only():
    with pytest.raises(UsageError, match="finds none"):
        kernels.measure()
