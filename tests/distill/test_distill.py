"""Distillation without a federation: layers, loss terms, teachers, and the command."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.algorithms import aggregators
from fedkd.core import cli, specs, tensors
from fedkd.core.errors import DataError, PluginError, RunError, UsageError
from fedkd.distill import check, distill, teacher_names, teachers, train
from fedkd.distill.config import DistillConfig
from fedkd.distill.task import prepare
from fedkd.training import layers, models, optimizers, quality, schedules
from fedkd.training.layers import Outputs, WatchedModel
from fedkd.training.models import checkpoint
from fedkd.training.terms.objective import DistillationObjective, teacher_weights
from tests.conftest import OTHERWISE_IN_TRAINING
from tests.training import replays

TINY = {
    "dataset": "digits",
    "student": "cnn:width=4",
    "teacher": "cnn:width=8",
    "epochs": 1,
    "corrupted_images": 0,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _cache_of_this_file(tmp_path_factory, monkeypatch):
    """A cache of teachers and decoded digits for the tests of this file; latency is measured in few calls."""
    monkeypatch.setattr(quality, "latency", lambda call, _: LATENCY(call, 2))
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path_factory.getbasetemp() / "distill-cache"))


def config(**changes) -> DistillConfig:
    return DistillConfig.parse({**TINY, **changes})


def run_distill(out: Path, **changes) -> dict:
    distill(config(out=str(out), **changes))
    return json.loads((out / "result.json").read_text())


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, 10, "batch")


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
LATENCY = quality.latency


# Layers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8", ["layer1", "layer2", "layer3"]),
        ("vit-tiny", ["norm"]),
        ("row-gru", ["read"]),
        ("torchvision:swin_t", ["features.1", "features.3", "features.5"]),  # [H, W, C]; the last stage is one pixel
        ("torchvision:convnext_tiny", ["features.2.0", "features.4.0", "features.6.0"]),
    ],
)
def test_the_feature_maps_of_a_network(name, expected):
    assert layers.maps(layers.shapes(built(name), IMAGES)) == expected


def test_watched_layers_return_the_outputs_of_these_layers():
    model = built("resnet8").eval()
    outputs = WatchedModel(model, ["layer1", "layer3", layers.EMBEDDING])(IMAGES)
    first = model.layer1(model.stem(IMAGES).relu())
    assert torch.equal(outputs.layers["layer1"], first)
    assert torch.equal(outputs.layers[layers.EMBEDDING], model.layer3(model.layer2(first)).mean((2, 3)))
    assert torch.equal(outputs.logits, model(IMAGES))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_recorded_output_is_not_changed_by_an_in_place_layer():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    outputs = WatchedModel(model, ["0"])(IMAGES)
    assert outputs.layers["0"].min() < 0
    outputs.layers["0"].sum().backward()


def test_maps_with_channels_last_are_permuted():
    inner = torch.randn(2, 4, 4, 7)
    assert torch.equal(layers.as_map(inner), inner.permute(0, 3, 1, 2))
    outer = inner.permute(0, 3, 1, 2)
    assert torch.equal(layers.as_map(outer), outer)
    assert layers.channels((4, 4, 7)) == layers.channels((7, 4, 4)) == layers.channels((16, 7)) == 7


def test_an_unknown_layer_is_reported_with_the_known_ones():
    with pytest.raises(UsageError, match=r"Did you mean 'layer3'\? It has .*layer3 64x8x8.*embedding 64"):
        layers.chosen("layer4", layers.shapes(built("resnet8"), IMAGES), "the student")


def test_tokens_and_vectors_as_maps():
    tokens = torch.randn(2, 16, 5)
    assert torch.equal(layers.as_map(tokens)[1, :, 2, 3], tokens[1, 11])
    assert layers.as_map(torch.randn(2, 7, 5)).shape == (2, 5, 7, 1)
    assert layers.as_map(torch.randn(2, 5)).shape == (2, 5, 1, 1)


# Terms

TERMS = [
    "logits",
    "logits:kind=dkd",
    "logits:kind=logit-mse",
    "logits:kind=logit-mae",
    "features",
    "features:kind=attention",
    "features:kind=nst",
    "features:kind=vid",
    "features:layers=layer1+layer2",
    "relations",
    "relations:kind=similarity",
    "relations:kind=correlation",
    "relations:kind=pkt",
    "graph",
    "contrastive:negatives=8",
]


def objective(
    student: str, teacher_models: list[str], *texts: str, weighting: str = "uniform"
) -> DistillationObjective:
    frozen_teachers = [teachers.frozen(built(name)) for name in teacher_models]
    terms = [specs.call("distillation", text) for text in texts]
    return DistillationObjective(built(student), frozen_teachers, terms, IMAGES, LABELS, weighting)


def loss_of(one: DistillationObjective) -> torch.Tensor:
    return one.loss(one(IMAGES), torch.stack([LABELS, torch.arange(6)], 1))


@pytest.mark.parametrize("text", TERMS)
def test_gradients_flow_to_the_student_only(text):
    one = objective("resnet8:width=8", ["resnet8", "resnet20:width=8"], text, "logits:weight=0,hard=0").train()
    before = [tensors.digest(teacher.model.state_dict()) for teacher in one.teachers]
    loss_of(one).backward()
    gradients = [p.grad for p in one.student.parameters() if p.grad is not None]
    assert gradients
    assert any(grad.abs().max() > 0 for grad in gradients)
    assert all(grad.isfinite().all() for grad in gradients)
    for teacher, digest in zip(one.teachers, before, strict=True):
        assert all(p.grad is None for p in teacher.parameters())
        assert tensors.digest(teacher.model.state_dict()) == digest  # including the running statistics of BatchNorm
    parameters = {id(p) for p in one.parameters()}
    assert not any(id(p) in parameters for teacher in one.teachers for p in teacher.parameters())


@pytest.mark.parametrize("weighting", ["uniform", "entropy", "agreement"])
@pytest.mark.parametrize("text", [*TERMS, "exits", "logits:kind=dist", "logits:kind=standardized"])
def test_a_training_step_can_be_recorded_if_its_terms_say_so(text, weighting):
    """Weights of teachers are one more thing that is computed in it."""
    pair, unlabeled = ["resnet8:width=4", "resnet8:width=8"], "logits:weight=0,hard=0"
    one = objective("resnet8:width=8", pair, text, unlabeled, weighting=weighting).train()
    update, rate = optimizers.sgd(list(one.parameters()), 0.9, 0.0), torch.tensor(0.1, dtype=torch.float64)
    targets = torch.stack([LABELS, torch.arange(6)], 1)

    def step():
        one.loss(one(IMAGES), targets).backward()
        update(rate)

    step()
    replay, is_recordable = replays.Replay(step), all(term.is_always_the_same for term in one.terms)
    assert is_recordable == (not text.startswith("contrastive"))
    with nullcontext() if is_recordable else pytest.raises(AssertionError):
        for _ in range(3):
            replay()


def test_a_loss_of_a_user_is_not_said_to_be_always_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def loss(student_logits, teacher_probs):\n    return student_logits.sum()\n")
    (term,) = objective("cnn:width=4", ["cnn:width=4"], "logits:kind=./mine.py:loss").terms
    assert not term.is_always_the_same


@pytest.mark.parametrize("pair", [("cnn:width=8", "vit-tiny"), ("row-gru", "cnn:width=8"), ("vit-tiny", "row-gru")])
@pytest.mark.parametrize("text", [t for t in TERMS if "layers=" not in t])
def test_any_pair_of_networks_works(pair, text):
    student, teacher = pair
    assert loss_of(objective(student, [teacher], text)).isfinite()


def test_the_loss_equals_its_formula():
    one = objective("cnn:width=4", ["cnn:width=8"], "logits:temperature=3,soft=0.7,hard=0.2").eval()
    student, teacher = one.student.model(IMAGES), one.teachers[0].model(IMAGES)
    soft = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean")
    assert torch.allclose(loss_of(one), 0.2 * F.cross_entropy(student, LABELS) + 0.7 * 9 * soft, atol=1e-6)


def test_loss_terms_are_added():
    texts = ("logits", "relations", "graph")
    one = objective("cnn:width=4", ["cnn:width=8"], *texts).eval()
    outputs = one(IMAGES)
    targets = torch.stack([LABELS, torch.arange(6)], 1)
    whole = one.loss(outputs, targets)
    hard = F.cross_entropy(outputs[0].logits, LABELS)
    parts = []
    for term in one.terms:
        one.terms = nn.ModuleList([term])
        parts.append(one.loss(outputs, targets) - one.label_weight * hard)
    assert torch.allclose(whole, sum(parts) + 0.1 * hard, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "weight"),
    [
        (["logits"], 0.1),
        (["features"], 1.0),
        (["logits:hard=0.5,soft=0.5"], 0.5),
        (["features", "logits:weight=2"], 0.0),
        (["logits", "logits:kind=logit-mse,weight=0"], 0.1),
        (["logits:weight=0.5", "logits:kind=logit-mse,weight=0.5"], 0.0),
        (["logits:hard=0.3", "logits:hard=0.4,kind=logit-mse"], 0.7),
    ],
)
def test_the_weight_of_the_labels(texts, weight):
    assert objective("cnn:width=4", ["cnn:width=8"], *texts).label_weight == pytest.approx(weight)


def test_soft_and_weight_exclude_each_other():
    with pytest.raises(UsageError, match="soft and weight are names of the same option"):
        specs.call("distillation", "logits:soft=0.5,weight=0.5")


def test_the_weights_of_several_teachers():
    """Against the formulas, for each image."""
    outputs = [Outputs(torch.randn(6, 3, generator=torch.Generator().manual_seed(k)), {}) for k in range(3)]
    assert torch.equal(teacher_weights(outputs, LABELS, "uniform"), torch.full((3, 6), 1 / 3))
    by_entropy, by_labels = teacher_weights(outputs, LABELS, "entropy"), teacher_weights(outputs, LABELS, "agreement")
    for row in range(6):
        probs = [each.logits[row].softmax(-1) for each in outputs]
        certain = [torch.exp((p * p.log()).sum()) for p in probs]
        costs = [torch.exp(-p[LABELS[row]].log()) for p in probs]
        for k in range(3):
            assert by_entropy[k, row].item() == pytest.approx((certain[k] / sum(certain)).item(), rel=1e-5)
            assert by_labels[k, row].item() == pytest.approx((1 - costs[k] / sum(costs)).item() / 2, rel=1e-5)


def test_the_loss_with_equal_teachers_is_that_with_one_of_them():
    one, three = (
        objective("cnn:width=4", ["cnn:width=8"] * n, *TERMS[:2], "relations", "graph").eval() for n in (1, 3)
    )
    for term, other in zip(one.terms, three.terms, strict=True):
        if hasattr(term, "adapters"):
            for adapter in other.adapters:
                adapter.load_state_dict(term.adapters[0].state_dict())
    assert torch.allclose(loss_of(one), loss_of(three), atol=1e-4)


def test_the_loss_of_exits_equals_its_formula():
    one = objective("resnet8:width=8", [], "exits:alpha=0.4,feature=0.1,temperature=2").eval()
    model, exits = one.student.model, one.terms[0]
    first = model.layer1(model.stem(IMAGES).relu())
    maps = [first, model.layer2(first)]
    deep, logits = model.layer3(maps[1]).mean((2, 3)), model(IMAGES)
    expected = F.cross_entropy(logits, LABELS)
    for features, neck, head in zip(maps, exits.necks, exits.heads, strict=True):
        embedding = neck(features.mean((2, 3))).relu()
        early = head(embedding)
        soft = F.kl_div((early / 2).log_softmax(-1), (logits / 2).softmax(-1), reduction="batchmean")
        near = ((embedding - deep) ** 2).sum(1).mean()
        expected = expected + 0.6 * F.cross_entropy(early, LABELS) + 0.4 * 4 * soft + 0.1 * near
    assert torch.allclose(loss_of(one), expected, atol=1e-5)


def test_exits_give_no_gradient_to_the_last_classifier():
    one = objective("resnet8:width=8", [], "exits:alpha=1,feature=1", "logits:weight=0,hard=0")
    loss = one.terms[0]
    from fedkd.training.terms.modules import Batch

    outputs = one.student(IMAGES)
    loss(Batch(outputs, [], torch.zeros(0, 6), LABELS, torch.arange(6))).backward()
    assert one.student.model.head.weight.grad is None


# Training


def test_a_term_of_weight_zero_changes_no_bit():
    task, _ = prepare(config())
    digests = []
    for terms in ([], ["logits:weight=0"]):
        module = train.build_untrained(task, config(), "cnn:width=4")
        built_terms = [specs.call("distillation", text) for text in terms]
        frozen_teachers = [teachers.frozen(built("cnn:width=8"))] if terms else []
        list(train.train(module, task, config(), epochs=1, seed=0, terms=built_terms, teachers=frozen_teachers))
        digests.append(tensors.digest(module.state_dict()))
    assert digests[0] == digests[1]


def test_validation_images_are_no_training_images():
    task, _ = prepare(config(validation=100))
    assert (len(task.train), len(task.validation), len(task.test)) == (1338, 100, 359)
    rows = {image.numpy().tobytes() for image in task.train.pixels}
    assert sum(image.numpy().tobytes() in rows for image in task.validation.pixels) < 3  # some digits occur twice


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "logits features relations"},
        {"teacher": "cnn:width=8 vit-tiny:depth=1", "loss": "relations logits", "teacher_weighting": "entropy"},
        {"teacher": "cnn:width=8,row-gru:width=16,cnn:width=8", "teacher_weighting": "agreement"},
        {"teacher": "", "loss": "self:generations=3"},
        {"teacher": "", "loss": "exits:layers=0+3"},
        {"loss": "contrastive:negatives=16,width=8 graph", "seeds": 2},
    ],
    ids=str,
)
def test_all_losses_train_a_student(changes, tmp_path):
    result = run_distill(tmp_path / "run", resize="stretch", **changes)
    assert result["status"] == "ok"
    for run in result["runs"]:
        evaluation = run["evaluation"]
        assert evaluation["student"]["accuracy"] > 0.15
        assert evaluation["student"]["nll"] < 2.5
        assert ("teacher" in evaluation) == (changes.get("loss") != "exits:layers=0+3")
    saved = checkpoint.load(tmp_path / "run")
    assert (saved.model, saved.dataset, saved.resize) == ("cnn:width=4", "digits", "stretch")
    assert len(list((tmp_path / "run").glob("student*.safetensors"))) == len(result["runs"])


def test_the_best_epoch_by_validation_and_the_largest_test_accuracy(tmp_path, monkeypatch, capsys):
    """At a rate that is so high that accuracies go up and down; a shorter run ends with the weights of the best one."""
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    options = {"learning_rate": 0.5, "schedule": "constant", "student": "cnn:width=2", "seed": 1}
    result = run_distill(tmp_path / "run", epochs=5, teacher_epochs=1, **options)["runs"][0]["evaluation"]
    shown, rows = capsys.readouterr().out, [json.loads(line) for line in (tmp_path / "run" / "epochs.jsonl").open()]
    assert "best_epoch" not in result["teacher"]
    for name in ("baseline", "student"):
        own = [row for row in rows if row["network"] == f"{name} seed1"]
        validation, test = ([row[key] for row in own] for key in ("accuracy", "test_accuracy"))
        best = validation.index(max(validation))
        wanted = {"best_epoch": best + 1, "best_validation_accuracy": max(validation), "best_test_accuracy": test[best]}
        wanted["largest_test_accuracy"] = max(test)
        assert {key: result[name][key] for key in wanted} == wanted
        assert result[name]["accuracy"] == test[-1]
        assert f"{100 * test[best]:.1f}%" in shown
    assert best < 4
    short = run_distill(tmp_path / "short", epochs=best + 1, teacher_epochs=1, **options)["runs"][0]["evaluation"]
    assert short["student"]["accuracy"] == result["student"]["best_test_accuracy"]
    again = run_distill(tmp_path / "again", epochs=best + 1, teacher_epochs=1, **options)["runs"][0]["evaluation"]
    assert again["baseline"]["largest_test_accuracy"] is None, "a network from the cache has no epochs"


def test_all_images_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    assert len(prepare(config(validation=0))[0].train) == 1438
    result = run_distill(tmp_path / "run", validation=0)["runs"][0]["evaluation"]["student"]
    row = json.loads((tmp_path / "run" / "epochs.jsonl").read_text().splitlines()[-1])
    assert (row["accuracy"], row["loss"], result["best_epoch"], result["best_test_accuracy"]) == (None,) * 4
    assert result["largest_test_accuracy"] == row["test_accuracy"] == result["accuracy"]
    assert checkpoint.load(tmp_path / "run").held_out == 0
    with pytest.raises(UsageError, match="--validation must be at least 1"):
        check(config(teacher="", teachers_from=str(tmp_path), validation=0))


def test_a_second_run_gives_the_same_and_uses_cached_teachers(tmp_path):
    results = [run_distill(tmp_path / name, teacher="cnn:width=6", loss="logits features") for name in ("a", "b")]
    epochs = [[json.loads(line)["network"] for line in (tmp_path / n / "epochs.jsonl").open()] for n in ("a", "b")]
    assert {"cnn:width=6", "student seed0"} <= {*epochs[0]}
    assert epochs[1] == ["student seed0"]
    weights = [checkpoint.load(tmp_path / name).weights for name in ("a", "b")]
    assert tensors.equal(*weights)
    accuracies = [result["runs"][0]["evaluation"]["student"]["accuracy"] for result in results]
    assert accuracies[0] == accuracies[1]


def test_a_user_defined_network_is_not_cached(tmp_path):
    """Its code may have changed."""
    code = (
        "from torch import nn\ndef Net(*, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))\n"
    )
    (tmp_path / "mine.py").write_text(code)
    spec = f"{tmp_path}/mine.py:Net"
    for name in ("a", "b"):
        run_distill(tmp_path / name, teacher=spec, student=spec)
        networks = [json.loads(line)["network"] for line in (tmp_path / name / "epochs.jsonl").open()]
        assert networks == [spec, "baseline seed0", "student seed0"]


def test_a_distilled_student_agrees_with_its_teacher(tmp_path):
    evaluation = run_distill(tmp_path / "run", epochs=4, teacher_epochs=6, loss="logits:temperature=2,hard=0,soft=1")[
        "runs"
    ][0]["evaluation"]
    assert evaluation["teacher"]["accuracy"] > 0.8
    assert evaluation["student"]["agreement"] > 0.6


def test_teachers_are_ranked(tmp_path):
    task, _ = prepare(config())
    for name, epochs in (("good", 4), ("bad", 0)):
        module = train.build_untrained(task, config(), "cnn:width=8")
        list(train.train(module, task, config(), epochs=epochs, seed=0))
        teachers.student_of(task, config(), "cnn:width=8", module).save(tmp_path / f"{name}.safetensors")
    result = run_distill(tmp_path / "run", teacher="", teachers_from=str(tmp_path))
    assert [Path(row["teacher"]).name for row in result["ranking"]] == ["good.safetensors", "bad.safetensors"]
    assert result["teachers"] == [str(tmp_path / "good.safetensors")]
    first, second = result["ranking"]
    assert first["accuracy"] > second["accuracy"]
    assert first["accuracy_rank"] == 1
    assert first["gap"] == second["gap"]
    assert "mean_rank" not in second
    assert (first["is_competitive"], second["is_competitive"]) == (
        True,
        False,
    )  # though an untrained network is calibrated and has a high entropy


def test_a_teacher_that_may_have_seen_validation_images_is_marked(tmp_path, capsys):
    """Validation samples are the first of a fixed order: a smaller validation set leaves the rest for training."""
    for name, count in (("unseen", 143), ("seen", 20)):
        few = config(validation=count)
        task, _ = prepare(few)
        module = train.build_untrained(task, few, "cnn:width=8")
        teachers.student_of(task, few, "cnn:width=8", module).save(tmp_path / f"{name}.safetensors")
    result = run_distill(tmp_path / "run", teacher="", teachers_from=str(tmp_path), epochs=1)
    assert {Path(row["teacher"]).stem: row["unseen_validation"] for row in result["ranking"]} == {
        "unseen": True,
        "seen": False,
    }
    printed = capsys.readouterr().out
    assert "seen.safetensors*" in printed
    assert "*: may have been trained on the validation images" in printed


def test_ranks_are_computed_among_competitive_teachers(tmp_path):
    """An untrained network does not change the order of the others."""
    task, _ = prepare(config())
    for name, width, epochs in (("a", 8, 4), ("b", 6, 4), ("untrained", 4, 0)):
        module = train.build_untrained(task, config(), f"cnn:width={width}")
        list(train.train(module, task, config(), epochs=epochs, seed=0))
        teachers.student_of(task, config(), f"cnn:width={width}", module).save(tmp_path / f"{name}.safetensors")
    candidates = teachers.obtain(task, config(), [str(p) for p in sorted(tmp_path.glob("*.safetensors"))], print)
    ranking = teachers.rank(task, config(), candidates[:2], 4.0)
    assert [row for row in teachers.rank(task, config(), candidates, 4.0) if row["is_competitive"]] == [
        row for row in ranking if row["is_competitive"]
    ]


def test_a_teacher_of_the_same_model_is_not_the_baseline(tmp_path):
    result = run_distill(tmp_path / "run", teacher="cnn:width=4", epochs=2)
    evaluation = result["runs"][0]["evaluation"]
    assert evaluation["baseline"]["agreement"] < 1
    networks = [json.loads(line)["network"] for line in (tmp_path / "run" / "epochs.jsonl").open()]
    assert {"cnn:width=4", "student seed0"} <= set(networks)


def test_a_teacher_ensemble_has_the_weighted_mean_probabilities():
    """Against the soft labels that the student is compared with."""
    members = [built("cnn:width=4"), models.build("cnn:width=8", 10, "batch")]
    members = [teachers.frozen(member) for member in members]
    outputs = [Outputs(member(IMAGES), {}) for member in members]
    for weighting in ("uniform", "entropy"):
        expected = aggregators.mean_probs(
            torch.stack([one.logits for one in outputs]), teacher_weights(outputs, LABELS, weighting)
        )
        assert torch.allclose(teachers.TeacherEnsemble(members, weighting)(IMAGES).softmax(-1), expected, atol=1e-6)


def test_divergence_is_reported(tmp_path):
    with pytest.raises(RunError, match="diverged in epoch 1; lower --learning-rate"):
        run_distill(tmp_path / "run", learning_rate=1e6)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["code"] == 4


# Teachers from files, and mistakes


def test_a_teacher_from_a_file(tmp_path):
    torch.save(built("cnn:width=8").state_dict(), tmp_path / "a.pth")
    result = run_distill(tmp_path / "run", teacher=f"cnn:width=8,pretrained={tmp_path}/a.pth")
    assert result["status"] == "ok"
    assert not any("cnn:width=8" in line for line in (tmp_path / "run" / "epochs.jsonl").open())
    tensors.save(built("cnn:width=8").state_dict(), tmp_path / "a.safetensors")
    same = run_distill(tmp_path / "same", teacher=f"cnn:width=8,pretrained={tmp_path}/a.safetensors")
    assert (
        same["runs"][0]["evaluation"]["student"]["accuracy"] == result["runs"][0]["evaluation"]["student"]["accuracy"]
    )
    again = run_distill(tmp_path / "again", teacher=str(tmp_path / "run"))
    assert again["teachers"] == [str(tmp_path / "run")]


def test_a_teacher_from_torchvisions_file_with_auxiliary_classifiers(tmp_path):
    from torchvision.models import googlenet

    torch.save(googlenet(weights=None, init_weights=False, num_classes=10).state_dict(), tmp_path / "a.pth")
    text = f"torchvision:googlenet,pretrained={tmp_path}/a.pth"
    module = teachers.untrained(prepare(config())[0], config(), text)
    assert torch.equal(module.state_dict()["fc.bias"], torch.load(tmp_path / "a.pth")["fc.bias"])


def test_another_scaling_is_converted():
    task, _ = prepare(config())
    model = built("cnn:width=4").eval()
    other = type(task.scaling)((10.0, 20.0, 30.0), (40.0, 50.0, 60.0))
    pixels = task.test.pixels[:4]
    expected, names = model(other(pixels)), list(layers.shapes(model, IMAGES))
    teachers.rescale(model, task.scaling, other)
    assert torch.allclose(model(task.scaling(pixels)), expected, atol=1e-5)
    assert list(layers.shapes(model, IMAGES)) == names


class Harm:
    def __reduce__(self):
        return os.system, ("touch harm",)


def fails(capsys, *flags: object) -> tuple[int, str]:
    given = [part for key, value in TINY.items() if f"--{key}" not in flags for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as end:
        cli.run(cli.command(distill, DistillConfig), [*given, *map(str, flags)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return int(end.value.code or 0), lines[-1]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--schedule", "step"], 2, "needs milestones"),
        (["--loss", "features:layers=layer9"], 2, "Unknown layer of the student: 'layer9'"),
        (["--loss", "features:layers=0,teacher=0+3"], 2, "1 layers of the student cannot be compared with 2"),
        (["--loss", "logitz"], 2, "Did you mean 'logits'"),
        (["--loss", "self", "--loss", "logits"], 2, "cannot be combined with other losses"),
        (["--loss", "self"], 2, "uses no teacher"),
        (["--teacher", "resnet21"], 2, "Did you mean"),
        (["--teacher", "missing.safetensors"], 3, "no such run or file"),
        (["--teachers-from", "."], 2, "exclude each other"),
        (["--shifted", "noise:size=20,pixels=16"], 3, "name a data set with the same"),
        (["--dataset", "noise:size=1"], 3, "at least two"),
        (["--student", "vit-tiny:width=100"], 2, "width must be a multiple of 32"),
        (["--student", "resnet8:width=28", "--norm", "group"], 2, "num_channels (28)"),
        (["--batch-size", "1"], 2, "--batch-size cannot be 1 with cnn:width=4, whose BatchNorm layers"),
        (["--student", "{own}:Pair"], 7, "Pair returns a tuple for 2 images in training, not (2, 10)"),
        (["--teacher", "{own}:Wide"], 7, "Wide returns (2, 11) for 2 images in training, not (2, 10)"),
        (
            ["--batch-size", "1", "--norm", "group", "--teacher", "torchvision:resnet18"],
            2,
            "1 with torchvision:resnet18",
        ),
        (["--dataset", "noise:size=2"], 2, "the number of training images cannot be 1 with cnn:width=4"),
        (["--loss", "logits:temperature=0"], 2, "greater than 0"),
        (["--loss", "logits:kind=nothing"], 2, "Unknown loss 'nothing'"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(flags, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OTHERWISE_IN_TRAINING)
    flags = [flag.replace("{own}", f"{tmp_path}/own.py") for flag in flags]
    exit_code, line = fails(capsys, *flags, "--out", tmp_path / "run")
    assert (exit_code, message in line) == (code, True), line
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_image(tmp_path, capsys, monkeypatch):
    """It is merged with the batch before it if the network has BatchNorm layers, and tried before training otherwise.

    The learning rate follows the number of batches: it reaches zero after the last one.
    """
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def spread(student_logits, teacher_probs):\n"
        "    return student_logits.std(0).sum()\n"
        "def pixel(*, classes):\n"
        "    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, classes)]\n"
        "    return nn.Sequential(*layers)\n"
    )
    flags = ["--loss", "logits:kind=./mine.py:spread", "--dataset", "noise:size=72", "--batch-size", "8"]
    code, line = fails(capsys, *flags, "--norm", "group", "--out", tmp_path / "run")
    assert code == 7
    assert "returned nan on a last batch of one image, which another --batch-size avoids" in line
    steps = []
    rates = schedules.rates
    monkeypatch.setattr(schedules, "rates", lambda *given: (steps.append(given[2]), rates(*given))[1])
    networks = {"teacher": "./mine.py:pixel", "student": "./mine.py:pixel"}
    result = run_distill(tmp_path / "merged", dataset="noise:size=72", batch_size=8, **networks)
    assert result["status"] == "ok"
    assert steps == [8] * 3  # of 65 images, for the teacher, the baseline and the student


def test_files_that_are_not_weights_of_the_teacher(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign = models.build("cnn:width=8", 7, "batch").state_dict()
    torch.save(foreign, "classes.pth")
    Path("broken.pth").write_bytes(b"PK no more")
    Path("harm.pth").write_bytes(pickle.dumps(Harm()))
    torch.save({"weight": Harm()}, "harm2.pth")
    for name, message in (
        ("classes.pth", "with 10 classes"),
        ("broken.pth", "damaged"),
        ("harm.pth", "damaged"),
        ("harm2.pth", "more than tensors"),
        ("missing.pth", "no file"),
    ):
        exit_code, line = fails(capsys, "--teacher", f"cnn:width=8,pretrained={name}", "--out", "run")
        assert (exit_code, message in line) == (3, True), line
        assert not Path("run").exists()
    assert not Path("harm").exists()


def test_a_student_of_other_classes_is_refused_as_a_teacher(tmp_path):
    task, _ = prepare(config())
    module = models.build("cnn:width=4", 7, "batch")
    saved = teachers.student_of(task, config(), "cnn:width=4", module)
    import dataclasses

    dataclasses.replace(saved, classes=7).save(tmp_path / "seven.safetensors")
    with pytest.raises(DataError, match="7 classes of 32 pixels, digits has 10"):
        teachers.untrained(task, config(), str(tmp_path / "seven.safetensors"))


def test_a_students_file_in_the_working_directory_is_a_teacher(tmp_path, monkeypatch):
    run_distill(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert run_distill(tmp_path / "next", teacher="student.safetensors")["teachers"] == ["student.safetensors"]
    Path("bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="is not a safetensors file, or is damaged"):
        run_distill(tmp_path / "bad", teacher="bad.safetensors")


def test_a_user_defined_loss(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedkd.training.terms import Term\n"
        "from fedkd.training.terms.modules import TermModule\n"
        "class Near(TermModule):\n"
        "    def forward(self, batch):\n"
        "        return (batch.student.logits - batch.teachers[0].logits).abs().mean()\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Term):\n"
        "    def build(self, pair):\n"
        "        return Near()\n"
        "@dataclass(frozen=True)\n"
        "class Broken(Term):\n"
        "    def build(self, pair):\n"
        "        raise RuntimeError('no')\n"
        "class Tiring(TermModule):\n"
        "    calls = 0\n"
        "    def forward(self, batch):\n"
        "        self.calls += 1\n"
        "        assert self.calls < 3, 'enough'\n"
        "        return batch.student.logits.mean()\n"
        "@dataclass(frozen=True)\n"
        "class Late(Term):\n"
        "    def build(self, pair):\n"
        "        return Tiring()\n"
    )
    assert run_distill(tmp_path / "run", loss=f"{tmp_path}/mine.py:Mine")["status"] == "ok"
    with pytest.raises(PluginError, match=r"mine\.py:Broken cannot be used with these networks .*: no"):
        run_distill(tmp_path / "broken", loss=f"{tmp_path}/mine.py:Broken")
    with pytest.raises(PluginError, match=r"mine\.py:Late failed in training: AssertionError: enough \(mine\.py, line"):
        run_distill(tmp_path / "late", loss=f"{tmp_path}/mine.py:Late")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet8", ("resnet8", None)),
        ("resnet8:pretrained=a.pth", ("resnet8", "a.pth")),
        ("torchvision:resnet50,pretrained=a/b.pth", ("torchvision:resnet50", "a/b.pth")),
        ("resnet8:width=8,pretrained=a.pth,norm=batch", ("resnet8:width=8,norm=batch", "a.pth")),
        ('resnet8:width="8",pretrained="/my a,b=1.pth"', ('resnet8:width="8"', "/my a,b=1.pth")),
    ],
)
def test_pretrained_is_separated_from_the_options_of_the_model(text, expected):
    spec, path = models.pretrained(text)
    assert (spec, None if path is None else str(path)) == expected


def test_a_student_with_pretrained_weights_starts_from_them(tmp_path, capsys):
    """Baseline and student, and the student's file does not name the file."""
    for classes in (10, 7):
        weights = models.build("cnn:width=4", classes, "batch").state_dict()
        tensors.save(weights, tmp_path / f"{classes}.safetensors")
    student = f"cnn:width=4,pretrained={tmp_path}/10.safetensors"
    run_distill(tmp_path / "run", student=student, learning_rate=1e-12, weight_decay=0, teacher="cnn:width=4")
    assert "last layer" not in capsys.readouterr().out
    for name in ("student", "baseline-seed0"):
        saved = checkpoint.load(tmp_path / "run" / f"{name}.safetensors")
        assert saved.model == "cnn:width=4"
        weights = tensors.load(tmp_path / "10.safetensors")
        assert all(
            torch.allclose(saved.weights[key], weights[key]) for key in weights if key.endswith(("weight", "bias"))
        )
    run_distill(tmp_path / "seven", student=student.replace("10.", "7."), teacher="cnn:width=4")
    assert "7.safetensors has 7 classes, not 10, so the last layer" in " ".join(capsys.readouterr().out.split())


def test_teachers_are_separated_by_commas_or_spaces():
    text = "resnet20,torchvision:resnet18,pretrained=a.pth vit-tiny"
    assert teacher_names.named(config(teacher=text)) == [
        "resnet20",
        "torchvision:resnet18,pretrained=a.pth",
        "vit-tiny",
    ]


@pytest.mark.parametrize("name", ["d1", "my run", "a,b", "lr=0.1", "run 1/student.safetensors"])
def test_a_path_is_no_model_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    (path.parent if path.suffix == ".safetensors" else path).mkdir()
    if path.suffix == ".safetensors":
        path.touch()
    chosen = config(teacher=name)
    assert teacher_names.named(chosen) == [name]
    assert teacher_names.is_path(name)
    assert check(chosen)


def test_paths_in_quotes_are_among_several_teachers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my run", "a,b=1"):
        Path(name).mkdir()
    chosen = config(teacher=('"my run"', "resnet8", '"a,b=1",cnn:width=8,pretrained="my run/a b.pth"'))
    names = teacher_names.named(chosen)
    assert names == ["my run", "resnet8", "a,b=1", 'cnn:width=8,pretrained="my run/a b.pth"']
    assert [teacher_names.is_path(name) for name in names] == [True, False, True, False]
    assert not teacher_names.is_path('"./my models/net.py":Net')
    with pytest.raises(DataError, match="a path with a space or a comma stands in double quotes"):
        check(config(teacher=("./my run/x", "resnet8")))


def test_the_name_of_a_model_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cnn", "cnn:width=4"):
        (tmp_path / name).mkdir()
        assert not teacher_names.is_path(name)
    assert teacher_names.is_path("./cnn")
    assert teacher_names.named(config(teacher="cnn resnet8")) == ["cnn", "resnet8"]
    assert teacher_names.named(config(teacher="")) == []


def test_documented_commands_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("path.pth").touch()
    for changes in (
        {"teacher": "resnet56", "student": "cnn", "loss": "logits:temperature=4,weight=0.9"},
        {"teacher": "torchvision:resnet50,pretrained=path.pth", "student": "cnn", "loss": "features"},
        {"teacher": "resnet20,resnet32,vit-tiny", "student": "resnet8", "loss": "relations"},
        {"teacher": "", "student": "resnet20", "loss": "self:generations=3"},
        {"loss": ["logits:weight=0.9", "features:layers=layer2+layer3"]},
    ):
        assert check(config(**changes))


def test_a_model_card_describes_the_distillation(tmp_path):
    from fedkd.export import card

    result = run_distill(tmp_path / "run", seed=3, seeds=2, loss=["logits", "graph"])
    for name, text in (
        ("student.safetensors", "Trained by fedkd by `logits graph` from cnn:width=8, 1 epochs, seed 3."),
        ("student-seed4.safetensors", "seed 4."),
        ("baseline-seed4.safetensors", "on labels only, 1 epochs, seed 4."),
    ):
        model, seed = name.removesuffix(".safetensors").split("-seed") if "-" in name else ("student", "3")
        accuracy = next(run for run in result["runs"] if run["seed"] == int(seed))["evaluation"][model]["accuracy"]
        first, second = card.trained(tmp_path / "run" / name)
        assert text in first
        assert f"{100 * accuracy:.2f}%" in second
