"""Distillation as a tool of its own: layers, terms, teachers, and the command."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd import models
from fedkd.algorithms import aggregators
from fedkd.core import cli, specs, tensors
from fedkd.core.errors import DataError, PluginError, RunError, UsageError
from fedkd.distill import check, distill, teacher_names, teachers, train
from fedkd.distill.config import DistillConfig
from fedkd.distill.task import prepare
from fedkd.models import checkpoint
from fedkd.training import layers
from fedkd.training.layers import Outputs, WatchedModel
from fedkd.training.terms.objective import DistillationObjective, teacher_weights

TINY = {
    "dataset": "digits",
    "student": "cnn:width=4",
    "teacher": "cnn:width=8",
    "epochs": 1,
    "judge": 0,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Teachers are kept for this file, decoded digits too."""
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


# Layers


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet8", ["layer1", "layer2", "layer3"]),
        ("vit-tiny", ["norm"]),
        ("row-gru", ["read"]),
        ("torchvision:swin_t", ["features.1", "features.3", "features.5"]),  # [H, W, C]; the last stage is one pixel
        ("torchvision:convnext_tiny", ["features.2.0", "features.4.0", "features.6.0"]),
    ],
)
def test_the_maps_of_a_network(name, wanted):
    assert layers.maps(layers.shapes(built(name), IMAGES)) == wanted


def test_watched_layers_are_what_they_give():
    model = built("resnet8").eval()
    seen = WatchedModel(model, ["layer1", "layer3", layers.EMBEDDING])(IMAGES)
    first = model.layer1(model.stem(IMAGES).relu())
    assert torch.equal(seen.layers["layer1"], first)
    assert torch.equal(seen.layers[layers.EMBEDDING], model.layer3(model.layer2(first)).mean((2, 3)))
    assert torch.equal(seen.logits, model(IMAGES))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_layer_gave_is_kept_though_the_next_one_works_in_place():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    seen = WatchedModel(model, ["0"])(IMAGES)
    assert seen.layers["0"].min() < 0
    seen.layers["0"].sum().backward()


def test_channels_last_is_read_as_such():
    inner = torch.randn(2, 4, 4, 7)
    assert torch.equal(layers.as_map(inner), inner.permute(0, 3, 1, 2))
    outer = inner.permute(0, 3, 1, 2)
    assert torch.equal(layers.as_map(outer), outer)
    assert layers.channels((4, 4, 7)) == layers.channels((7, 4, 4)) == layers.channels((16, 7)) == 7


def test_a_layer_that_is_not_there():
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


def lesson(student: str, taught_by: list[str], *texts: str, weighting: str = "uniform") -> DistillationObjective:
    known = [teachers.frozen(built(name)) for name in taught_by]
    terms = [specs.call("distillation", text) for text in texts]
    return DistillationObjective(built(student), known, terms, IMAGES, LABELS, weighting)


def loss_of(one: DistillationObjective) -> torch.Tensor:
    return one.loss(one(IMAGES), torch.stack([LABELS, torch.arange(6)], 1))


@pytest.mark.parametrize("text", TERMS)
def test_gradients_flow_to_the_student_only(text):
    one = lesson("resnet8:width=8", ["resnet8", "resnet20:width=8"], text, "logits:weight=0,hard=0").train()
    before = [tensors.digest(teacher.model.state_dict()) for teacher in one.teachers]
    loss_of(one).backward()
    moved = [p.grad for p in one.student.parameters() if p.grad is not None]
    assert moved
    assert any(grad.abs().max() > 0 for grad in moved)
    assert all(grad.isfinite().all() for grad in moved)
    for teacher, digest in zip(one.teachers, before, strict=True):
        assert all(p.grad is None for p in teacher.parameters())
        assert tensors.digest(teacher.model.state_dict()) == digest  # not even what BatchNorm counts
    ours = {id(p) for p in one.parameters()}
    assert not any(id(p) in ours for teacher in one.teachers for p in teacher.parameters())


@pytest.mark.parametrize("pair", [("cnn:width=8", "vit-tiny"), ("row-gru", "cnn:width=8"), ("vit-tiny", "row-gru")])
@pytest.mark.parametrize("text", [t for t in TERMS if "layers=" not in t])
def test_any_pair_of_networks_works(pair, text):
    student, teacher = pair
    assert loss_of(lesson(student, [teacher], text)).isfinite()


def test_the_loss_written_out():
    one = lesson("cnn:width=4", ["cnn:width=8"], "logits:temperature=3,soft=0.7,hard=0.2").eval()
    student, teacher = one.student.model(IMAGES), one.teachers[0].model(IMAGES)
    soft = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="batchmean")
    assert torch.allclose(loss_of(one), 0.2 * F.cross_entropy(student, LABELS) + 0.7 * 9 * soft, atol=1e-6)


def test_losses_add_up():
    texts = ("logits", "relations", "graph")
    one = lesson("cnn:width=4", ["cnn:width=8"], *texts).eval()
    seen = one(IMAGES)
    targets = torch.stack([LABELS, torch.arange(6)], 1)
    whole = one.loss(seen, targets)
    hard = F.cross_entropy(seen[0].logits, LABELS)
    parts = []
    for pull in one.terms:
        one.terms = nn.ModuleList([pull])
        parts.append(one.loss(seen, targets) - one.label_weight * hard)
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
def test_what_the_labels_weigh(texts, weight):
    assert lesson("cnn:width=4", ["cnn:width=8"], *texts).label_weight == pytest.approx(weight)


def test_two_names_of_one_weight():
    with pytest.raises(UsageError, match="soft and weight are names of the same option"):
        specs.call("distillation", "logits:soft=0.5,weight=0.5")


def test_what_several_teachers_weigh():
    """Against the formulas, image by image."""
    seen = [Outputs(torch.randn(6, 3, generator=torch.Generator().manual_seed(k)), {}) for k in range(3)]
    assert torch.equal(teacher_weights(seen, LABELS, "uniform"), torch.full((3, 6), 1 / 3))
    by_entropy, by_labels = teacher_weights(seen, LABELS, "entropy"), teacher_weights(seen, LABELS, "agreement")
    for row in range(6):
        probs = [each.logits[row].softmax(-1) for each in seen]
        certain = [torch.exp((p * p.log()).sum()) for p in probs]
        costs = [torch.exp(-p[LABELS[row]].log()) for p in probs]
        for k in range(3):
            assert by_entropy[k, row].item() == pytest.approx((certain[k] / sum(certain)).item(), rel=1e-5)
            assert by_labels[k, row].item() == pytest.approx((1 - costs[k] / sum(costs)).item() / 2, rel=1e-5)


def test_a_mean_of_equal_teachers_is_one_of_them():
    one, three = (lesson("cnn:width=4", ["cnn:width=8"] * n, *TERMS[:2], "relations", "graph").eval() for n in (1, 3))
    for pull, other in zip(one.terms, three.terms, strict=True):
        if hasattr(pull, "adapters"):
            for adapter in other.adapters:
                adapter.load_state_dict(pull.adapters[0].state_dict())
    assert torch.allclose(loss_of(one), loss_of(three), atol=1e-4)


def test_exits_written_out():
    one = lesson("resnet8:width=8", [], "exits:alpha=0.4,feature=0.1,temperature=2").eval()
    model, exits = one.student.model, one.terms[0]
    first = model.layer1(model.stem(IMAGES).relu())
    maps = [first, model.layer2(first)]
    deep, answer = model.layer3(maps[1]).mean((2, 3)), model(IMAGES)
    wanted = F.cross_entropy(answer, LABELS)
    for features, neck, head in zip(maps, exits.necks, exits.heads, strict=True):
        inner = neck(features.mean((2, 3))).relu()
        early = head(inner)
        soft = F.kl_div((early / 2).log_softmax(-1), (answer / 2).softmax(-1), reduction="batchmean")
        near = ((inner - deep) ** 2).sum(1).mean()
        wanted = wanted + 0.6 * F.cross_entropy(early, LABELS) + 0.4 * 4 * soft + 0.1 * near
    assert torch.allclose(loss_of(one), wanted, atol=1e-5)


def test_the_deepest_answer_is_not_pulled_by_its_exits():
    one = lesson("resnet8:width=8", [], "exits:alpha=1,feature=1", "logits:weight=0,hard=0")
    loss = one.terms[0]
    from fedkd.training.terms.modules import Batch

    seen = one.student(IMAGES)
    loss(Batch(seen, [], torch.zeros(0, 6), LABELS, torch.arange(6))).backward()
    assert one.student.model.head.weight.grad is None


# Training


def test_a_term_without_weight_changes_no_bit():
    task, _ = prepare(config())
    found = []
    for terms in ([], ["logits:weight=0"]):
        module = train.fresh(task, config(), "cnn:width=4")
        pulls = [specs.call("distillation", text) for text in terms]
        known = [teachers.frozen(built("cnn:width=8"))] if terms else []
        list(train.train(module, task, config(), epochs=1, seed=0, terms=pulls, teachers=known))
        found.append(tensors.digest(module.state_dict()))
    assert found[0] == found[1]


def test_validation_rows_are_nobodys():
    task, _ = prepare(config(validation=100))
    assert (len(task.train), len(task.validation), len(task.test)) == (1338, 100, 359)
    rows = {image.numpy().tobytes() for image in task.train.pixels}
    assert sum(image.numpy().tobytes() in rows for image in task.validation.pixels) < 3  # some digits are twice there


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
def test_students_of_all_kinds(changes, tmp_path):
    result = run_distill(tmp_path / "run", **changes)
    assert result["status"] == "ok"
    for run in result["runs"]:
        judged = run["judged"]
        assert judged["student"]["accuracy"] > 0.15
        assert judged["student"]["nll"] < 2.5
        assert ("teacher" in judged) == (changes.get("loss") != "exits:layers=0+3")
    held = checkpoint.load(tmp_path / "run")
    assert (held.model, held.dataset) == ("cnn:width=4", "digits")
    assert len(list((tmp_path / "run").glob("student*.safetensors"))) == result["runs"].__len__()


def test_the_same_again_and_teachers_are_kept(tmp_path):
    results = [run_distill(tmp_path / name, teacher="cnn:width=6", loss="logits features") for name in ("a", "b")]
    epochs = [[json.loads(line)["network"] for line in (tmp_path / n / "epochs.jsonl").open()] for n in ("a", "b")]
    assert {"cnn:width=6", "student seed0"} <= {*epochs[0]}
    assert epochs[1] == ["student seed0"]
    weights = [checkpoint.load(tmp_path / name).weights for name in ("a", "b")]
    assert tensors.equal(*weights)
    accuracies = [result["runs"][0]["judged"]["student"]["accuracy"] for result in results]
    assert accuracies[0] == accuracies[1]


def test_a_network_of_ones_own_is_trained_anew(tmp_path):
    """Its code may have changed."""
    code = (
        "from torch import nn\ndef Net(*, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))\n"
    )
    (tmp_path / "mine.py").write_text(code)
    own = f"{tmp_path}/mine.py:Net"
    for name in ("a", "b"):
        run_distill(tmp_path / name, teacher=own, student=own)
        told = [json.loads(line)["network"] for line in (tmp_path / name / "epochs.jsonl").open()]
        assert told == [own, "baseline seed0", "student seed0"]


def test_a_good_teacher_is_followed(tmp_path):
    """A student taught on few epochs agrees more with its teacher than one that never met it."""
    judged = run_distill(tmp_path / "run", epochs=4, teacher_epochs=6, loss="logits:temperature=2,hard=0,soft=1")[
        "runs"
    ][0]["judged"]
    assert judged["teacher"]["accuracy"] > 0.8
    assert judged["student"]["agreement"] > 0.6


def test_teachers_are_ranked(tmp_path):
    task, _ = prepare(config())
    for name, epochs in (("good", 4), ("bad", 0)):
        module = train.fresh(task, config(), "cnn:width=8")
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
    )  # though ignorance is calibrated, and full of entropy


def test_a_teacher_that_may_know_the_answers_is_marked(tmp_path, capsys):
    """Validation rows are the first of one order: who held fewer of them out has trained on the rest."""
    for name, held in (("fair", 143), ("unfair", 20)):
        few = config(validation=held)
        task, _ = prepare(few)
        module = train.fresh(task, few, "cnn:width=8")
        teachers.student_of(task, few, "cnn:width=8", module).save(tmp_path / f"{name}.safetensors")
    result = run_distill(tmp_path / "run", teacher="", teachers_from=str(tmp_path), epochs=1)
    assert {Path(row["teacher"]).stem: row["unseen_validation"] for row in result["ranking"]} == {
        "fair": True,
        "unfair": False,
    }
    said = capsys.readouterr().out
    assert "unfair.safetensors*" in said
    assert "*: may have been trained on the validation images" in said


def test_places_are_among_those_that_are_good(tmp_path):
    """Whoever knows nothing does not decide between two who know the same."""
    task, _ = prepare(config())
    for name, width, epochs in (("a", 8, 4), ("b", 6, 4), ("ignorant", 4, 0)):
        module = train.fresh(task, config(), f"cnn:width={width}")
        list(train.train(module, task, config(), epochs=epochs, seed=0))
        teachers.student_of(task, config(), f"cnn:width={width}", module).save(tmp_path / f"{name}.safetensors")
    known = teachers.obtain(task, config(), [str(p) for p in sorted(tmp_path.glob("*.safetensors"))], print)
    without = teachers.rank(task, config(), known[:2], 4.0)
    assert [row for row in teachers.rank(task, config(), known, 4.0) if row["is_competitive"]] == [
        row for row in without if row["is_competitive"]
    ]


def test_a_teacher_is_no_student_under_another_name(tmp_path):
    result = run_distill(tmp_path / "run", teacher="cnn:width=4", epochs=2)
    judged = result["runs"][0]["judged"]
    assert judged["baseline"]["agreement"] < 1
    told = [json.loads(line)["network"] for line in (tmp_path / "run" / "epochs.jsonl").open()]
    assert {"cnn:width=4", "student seed0"} <= set(told)


def test_a_committee_is_the_mean_that_teaches():
    """Against what the lesson compares the student with, for equal votes and for certainty."""
    members = [built("cnn:width=4"), models.build("cnn:width=8", 10, "batch")]
    members = [teachers.frozen(member) for member in members]
    seen = [Outputs(member(IMAGES), {}) for member in members]
    for weighting in ("uniform", "entropy"):
        wanted = aggregators.mean_probs(
            torch.stack([one.logits for one in seen]), teacher_weights(seen, LABELS, weighting)
        )
        assert torch.allclose(teachers.TeacherEnsemble(members, weighting)(IMAGES).softmax(-1), wanted, atol=1e-6)


def test_diverging_is_told(tmp_path):
    with pytest.raises(RunError, match="diverged in epoch 1; lower --learning-rate"):
        run_distill(tmp_path / "run", learning_rate=1e6)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["code"] == 4


# Teachers from elsewhere, and mistakes


def test_a_teacher_out_of_a_file(tmp_path):
    torch.save(built("cnn:width=8").state_dict(), tmp_path / "a.pth")
    result = run_distill(tmp_path / "run", teacher=f"cnn:width=8,pretrained={tmp_path}/a.pth")
    assert result["status"] == "ok"
    assert not any("cnn:width=8" in line for line in (tmp_path / "run" / "epochs.jsonl").open())
    tensors.save(built("cnn:width=8").state_dict(), tmp_path / "a.safetensors")
    same = run_distill(tmp_path / "same", teacher=f"cnn:width=8,pretrained={tmp_path}/a.safetensors")
    assert same["runs"][0]["judged"]["student"]["accuracy"] == result["runs"][0]["judged"]["student"]["accuracy"]
    again = run_distill(tmp_path / "again", teacher=str(tmp_path / "run"))
    assert again["teachers"] == [str(tmp_path / "run")]


def test_another_scaling_is_undone():
    task, _ = prepare(config())
    model = built("cnn:width=4").eval()
    other = type(task.scaling)((10.0, 20.0, 30.0), (40.0, 50.0, 60.0))
    pixels = task.test.pixels[:4]
    wanted, names = model(other(pixels)), list(layers.shapes(model, IMAGES))
    teachers.rescale(model, task.scaling, other)
    assert torch.allclose(model(task.scaling(pixels)), wanted, atol=1e-5)
    assert list(layers.shapes(model, IMAGES)) == names


class Harm:
    def __reduce__(self):
        return os.system, ("touch harm",)


def ends(capsys, *flags: object) -> tuple[int, str]:
    given = [part for key, value in TINY.items() if f"--{key}" not in flags for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as end:
        cli.run(cli.command(distill, DistillConfig), [*given, *map(str, flags)])
    said = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(said)
    return int(end.value.code or 0), said[-1]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--loss", "features:layers=layer9"], 2, "Unknown layer of the student: 'layer9'"),
        (["--loss", "features:layers=0,teacher=0+3"], 2, "1 layers of the student cannot be compared with 2"),
        (["--loss", "logitz"], 2, "Did you mean 'logits'"),
        (["--loss", "self", "--loss", "logits"], 2, "no other loss"),
        (["--loss", "self"], 2, "needs no teacher"),
        (["--teacher", "resnet21"], 2, "Did you mean"),
        (["--teacher", "missing.safetensors"], 3, "no such run or file"),
        (["--teachers-from", "."], 2, "exclude each other"),
        (["--shifted", "noise:size=20,pixels=16"], 3, "name a set of the same"),
        (["--dataset", "noise:size=1"], 3, "two at least"),
        (["--student", "vit-tiny:width=100"], 2, "width must be a multiple of 32"),
        (["--student", "resnet8:width=28", "--norm", "group"], 2, "num_channels (28)"),
        (["--student", "torchvision:googlenet"], 2, "cannot be used with these networks"),
        (
            ["--student", "torchvision:shufflenet_v2_x0_5", "--dataset", "noise:size=72", "--batch-size", "8"],
            2,
            "on a last batch of one image, which another --batch-size avoids",
        ),
        (["--loss", "logits:temperature=0"], 2, "greater than 0"),
        (["--loss", "logits:kind=nothing"], 2, "Unknown loss 'nothing'"),
    ],
)
def test_mistakes_are_answered_by_a_sentence(flags, code, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, said = ends(capsys, *flags, "--out", tmp_path / "run")
    assert (found, says in said) == (code, True), said
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_teach(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign = models.build("cnn:width=8", 7, "batch").state_dict()
    torch.save(foreign, "classes.pth")
    Path("broken.pth").write_bytes(b"PK no more")
    Path("harm.pth").write_bytes(pickle.dumps(Harm()))
    torch.save({"weight": Harm()}, "harm2.pth")
    for name, says in (
        ("classes.pth", "tells 10 classes apart"),
        ("broken.pth", "damaged"),
        ("harm.pth", "damaged"),
        ("harm2.pth", "more than tensors"),
        ("missing.pth", "no file"),
    ):
        found, said = ends(capsys, "--teacher", f"cnn:width=8,pretrained={name}", "--out", "run")
        assert (found, says in said) == (3, True), said
        assert not Path("run").exists()
    assert not Path("harm").exists()


def test_a_student_of_other_classes_cannot_teach(tmp_path):
    task, _ = prepare(config())
    module = models.build("cnn:width=4", 7, "batch")
    held = teachers.student_of(task, config(), "cnn:width=4", module)
    import dataclasses

    dataclasses.replace(held, classes=7).save(tmp_path / "seven.safetensors")
    with pytest.raises(DataError, match="7 classes of 32 pixels, digits has 10"):
        teachers.untrained(task, config(), str(tmp_path / "seven.safetensors"))


def test_a_students_file_in_the_working_directory_teaches(tmp_path, monkeypatch):
    run_distill(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert run_distill(tmp_path / "next", teacher="student.safetensors")["teachers"] == ["student.safetensors"]
    Path("bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="no safetensors file, or a damaged one"):
        run_distill(tmp_path / "bad", teacher="bad.safetensors")


def test_a_loss_of_ones_own(tmp_path):
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
    ("text", "wanted"),
    [
        ("resnet8", ("resnet8", None)),
        ("resnet8:pretrained=a.pth", ("resnet8", "a.pth")),
        ("torchvision:resnet50,pretrained=a/b.pth", ("torchvision:resnet50", "a/b.pth")),
        ("resnet8:width=8,pretrained=a.pth,norm=batch", ("resnet8:width=8,norm=batch", "a.pth")),
    ],
)
def test_pretrained_is_told_from_the_models_options(text, wanted):
    spec, path = teacher_names.pretrained(text)
    assert (spec, None if path is None else str(path)) == wanted


def test_a_comma_list_and_several_flags_name_teachers():
    text = "resnet20,torchvision:resnet18,pretrained=a.pth vit-tiny"
    assert teacher_names.named(config(teacher=text)) == [
        "resnet20",
        "torchvision:resnet18,pretrained=a.pth",
        "vit-tiny",
    ]


def test_the_issues_own_commands_are_understood():
    for changes in (
        {"teacher": "resnet56", "student": "cnn", "loss": "logits:temperature=4,weight=0.9"},
        {"teacher": "torchvision:resnet50,pretrained=path.pth", "student": "cnn", "loss": "features"},
        {"teacher": "resnet20,resnet32,vit-tiny", "student": "resnet8", "loss": "relations"},
        {"teacher": "", "student": "resnet20", "loss": "self:generations=3"},
        {"loss": ["logits:weight=0.9", "features:layers=layer2+layer3"]},
    ):
        assert check(config(**changes))


def test_a_model_card_says_how_a_student_was_distilled(tmp_path):
    from fedkd.export import card

    result = run_distill(tmp_path / "run", seed=3, seeds=2, loss=["logits", "graph"])
    for name, says in (
        ("student.safetensors", "Trained by fedkd by `logits graph` from cnn:width=8, 1 epochs, seed 3."),
        ("student-seed4.safetensors", "seed 4."),
        ("baseline-seed4.safetensors", "on labels alone, 1 epochs, seed 4."),
    ):
        who, seed = name.removesuffix(".safetensors").split("-seed") if "-" in name else ("student", "3")
        accuracy = next(run for run in result["runs"] if run["seed"] == int(seed))["judged"][who]["accuracy"]
        first, second = card.trained(tmp_path / "run" / name)
        assert says in first
        assert f"{100 * accuracy:.2f}%" in second
