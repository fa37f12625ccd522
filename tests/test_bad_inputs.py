"""Bad inputs of every command: one sentence, the documented exit code, and nothing that was there is lost.

A row is what a user types, in a folder that holds `FILES` and some runs. ``NAME=VALUE`` in front sets a variable.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fedkd.core import cli
from fedkd.distill import distill
from fedkd.distill.config import DistillConfig
from fedkd.simulate import simulate
from tests.conftest import TINY, tiny

MINE = '''
from dataclasses import dataclass
from fedkd.algorithms.base import Algorithm, Update
from fedkd.core.tensors import put

@dataclass(frozen=True)
class Name(Algorithm):
    """Every client sends the mean of its logits; the server sends nothing."""
    scale: float = 1.0
    fail: str = ""
    metrics = ("scale",)

    @property
    def needs_one_model(self):
        return self.fail == "property" and 1 / 0

    def initial_state(self, setup):
        if self.fail == "initial":
            raise SystemExit(5)
        return {}

    def upload_spec(self, setup, client, number):
        return {"mean": (setup.classes,)}

    def local_update(self, setup, client, request):
        if self.fail == "local":
            raise ZeroDivisionError("a client of mine")
        weights = setup.trainer.train(client, setup.local_weights(client))
        mean = setup.trainer.predict(client.model, weights, setup.proxy.images).mean(0) * self.scale
        return Update({"mean": mean}, len(client.data), {"scale": self.scale}), put("model", weights)

    def aggregate(self, setup, state, updates, seed):
        if self.fail == "aggregate":
            raise ZeroDivisionError("a server of mine")
        if self.fail == "exit":
            raise SystemExit(3)
        return state

class NoAlgorithm:
    pass

class Leaving:
    def __init__(self):
        raise SystemExit(3)

def failing(*, classes: int):
    return 1 / 0

def leaving(*, classes: int):
    raise SystemExit(3)

def narrow(*, classes: int):
    from torch import nn
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))

def lazy(*, classes: int):
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def fixed(*, classes: int):
    from torch import nn
    return nn.Sequential(nn.AdaptiveAvgPool3d((1, 1, classes)), nn.Flatten())

def three():
    return 3

def split(labels, clients, rng, *, how: str = ""):
    if how == "raise":
        raise ZeroDivisionError("mine")
    if how == "exit":
        raise SystemExit(3)
    return {"none": 3, "few": [[0]], "twice": [[0]] * clients, "far": [[10**9]] * clients, "empty": [[]] * clients}[how]

def annotated(logits, weights, *, x: "Nowhere" = 3):
    return logits.mean(0)

value = 3
'''

FILES = {
    "mine.py": MINE,
    "exits.py": "import sys\nsys.exit(3)\n",
    "divides.py": "1 / 0\n",
    "syntax.py": "def (:\n",
    "syntax.toml": "rounds =",
    "twice.toml": "rounds = 1\nrounds = 2\n",
    "both.toml": "local-epochs = 1\nlocal_epochs = 2\n",
    "deep.toml": "rounds = " + "[" * 5000,
    "long.toml": "rounds = " + "9" * 5000,
    "large.toml": "batch-size = 99999999999999999999\n",
    "true.toml": "rounds = true\n",
    "truth.toml": "learning-rate = true\n",
    "word.toml": 'rounds = "many"\n',
    "half.toml": "rounds = 1.5\n",
    "list.toml": "rounds = [1, 2]\n",
    "table.toml": "[rounds]\nnumber = 1\n",
    "numbers.toml": "compare = [1, 2]\n",
    "number.toml": "algorithm = 3\n",
    "date.toml": "dataset = 2026-01-01\n",
    "unknown.toml": "round = 1\n",
    "null.toml": 'student = "a\\u0000b"\n',
    "line.toml": 'student = "a\\nb"\n',
    "nan.toml": "temperature = nan\n",
    "infinite.toml": "learning-rate = inf\n",
    "words.toml": 'algorithm = "fedag"\n',
    "validation.toml": "epoch = 3\n",
    "latin.toml": b'out = "\xe9"\n',
    "thesis/thesis.txt": "three years of work",
    "file": "no directory",
    "flat/train/1.png": b"no class",
    "images/train/cat/1.png": b"no image",
    "images/test/cat/1.png": b"no image",
    "empty/train/cat/note.txt": "no image",
    "data/cifar10/train-00000-of-00002.parquet": b"one of two",
    "bad.safetensors": b"{}" * 50,
    "short.safetensors": b"\x10",
    "model.onnx": b"no model",
    "students/none.txt": "no student",
}

SIMULATE = [
    ("an unknown fault", "--faults drop=0.1", 2, "Did you mean 'dropout'"),
    ("a fault that is no probability", "--faults crash=1.5", 2, "--faults crash=1.5 is not usable"),
    ("faults of more than all", "--faults dropout=0.6,crash=0.6", 2, "sum to more than 1"),
    ("late updates of other samples", "--faults late=use --round-timeout 3 --algorithm scarlet", 2, "use late=drop"),
    ("more clients than there are", "--min-clients 4", 2, "more than the 3 clients of a round"),
    ("nothing is late", "--faults late=use", 2, "needs --round-timeout"),
    ("an accuracy in percent", "--stop-when test_accuracy>=60", 2, "a fraction from 0 to 1"),
    ("patience without validation", "--patience 3", 2, "needs --validation"),
    ("a condition that is none", "--stop-when test_accuracy", 2, "cannot be read"),
    ("a condition on an unknown key", "--stop-when 'accuracy>=0.6'", 2, "Did you mean 'test_accuracy'"),
    ("all samples for validation", "--validation 1396", 2, "need more than the 1,398 private samples"),
    ("no clients", "--clients 0", 2, "--clients 0 is not usable"),
    ("fewer clients", "--clients -5", 2, "--clients -5"),
    ("clients in words", "--clients many", 2, "--clients: 'many' is not an integer"),
    ("half a client", "--clients 1.5", 2, "'1.5' is not an integer"),
    ("an exponent", "--seed 1e3", 2, "'1e3' is not an integer"),
    ("a misspelt option", "--clienst 3", 2, "Did you mean --clients"),
    ("another tool's option", "--lr 0.1", 2, "Did you mean --learning-rate"),
    ("too many clients", "--clients 2000", 2, "2000 clients cannot share 1,?398 images"),
    ("too many threads", "--threads 100000", 2, "less than or equal to 1024"),
    ("too many workers", "--workers 100000", 2, "from 1 to 1024"),
    ("no workers", "--workers 0", 2, "from 1 to 1024"),
    ("workers in words", "--workers all", 2, "auto or an integer"),
    ("65 bits", "--batch-size 99999999999999999999", 2, "--batch-size.* is more than 4294967295"),
    ("5,000 digits", "--rounds " + "9" * 5000, 2, "more than 4294967295"),
    ("too many seeds", "--seeds 1000000000", 2, "less than or equal to 10000"),
    ("a last seed of 33 bits", "--seed 4294967295 --seeds 2", 2, "the last seed is more than"),
    ("no rounds", "--rounds 0", 2, "greater than or equal to 1"),
    ("no participation", "--participation 0", 2, "greater than 0"),
    ("more than all", "--participation 1.5", 2, "less than or equal to 1"),
    ("not a number", "--temperature nan", 2, "it should be a number"),
    ("an infinite rate", "--learning-rate inf", 2, "finite number"),
    ("a momentum of one", "--momentum 1", 2, "less than 1"),
    ("a negative time", "--client-timeout -1", 2, "greater than or equal to 0"),
    ("an unknown norm", "--norm layer", 2, "norm"),
    ("an unknown engine", "--engine spark", 2, "engine"),
    ("a value that is missing", "--rounds", 2, "--rounds requires an argument"),
    ("no method to compare", "--compare", 2, "--compare requires at least 1"),
    ("two files", "true.toml word.toml", 2, "Unused Tokens|unexpected|Unused"),
    ("Ray's cluster", "--ray-address auto", 2, "need --engine ray"),
    ("Ray's CPUs", "--client-cpus 2", 2, "need --engine ray"),
    ("Ray's GPUs", "--client-gpus 0.5", 2, "need --engine ray"),
    ("a GPU that is not there", "--device cuda:99", 2, r"(without CUDA|finds \d+ GPUs?); use cpu or auto"),
    ("a device without values", "--device meta", 2, "--device meta cannot be used here; use cpu or auto"),
    ("an unknown device", "--device abacus", 2, "--device abacus cannot be used here"),
    ("an unknown precision", "--precision fp8", 2, "--precision|precision 'fp8'"),
    ("a precision of GPUs", "--precision tf32 --device cpu", 2, "--precision tf32 cannot be used on cpu: it needs"),
    ("Dirichlet's alpha", "--partitioner dirichlet:alpha=0", 2, "greater than 0"),
    ("a negative alpha", "--partitioner dirichlet:alpha=-1", 2, "greater than 0"),
    ("a component without an option that it needs", "--partitioner size", 2, "'size' needs the option sizes \\(python"),
    ("an option with a hyphen", "--algorithm fedgen:server_step=1", 2, "mean 'server-steps'"),
    ("its value", "--algorithm fedgen:server_steps=x", 2, "fedgen:server-steps=x is not usable"),
    ("a list with commas", "--schedule step:milestones=50,75", 2, r"a list as milestones=50\+75"),
    ("milestones that fall", "--schedule step:milestones=75+50", 2, "each milestone is after the one before it"),
    (
        "a gamma that is no number",
        "--schedule exponential:gamma=nan",
        2,
        "gamma=nan is not usable: it should be a number",
    ),
    ("a norm that is no number", "--clip-norm nan", 2, "--clip-norm nan is not usable: it should be a number"),
    (
        "a model without channels",
        "--model mobilenetv2:width=0.01",
        2,
        "model 'mobilenetv2:width=0.01' cannot be .*width",
    ),
    ("a model without blocks", "--model bottleneck-resnet:blocks=0", 2, "blocks=0' cannot be used: blocks are "),
    ("a model for small images", "--model lenet:pixels=8", 2, "'lenet:pixels=8' cannot be used: pixels=8 is too small"),
    ("an unknown option of a component", "--partitioner dirichlet:beta=1", 2, "Known: alpha"),
    ("more classes than there are", "--partitioner pathological:classes=11", 2, "cannot assign 1398 samples"),
    ("sizes in words", "--partitioner size:sizes=many", 2, "positive integers separated by"),
    ("a deployment's partition", "--partitioner own", 2, "for deployed nodes"),
    ("a key twice", "--algorithm dsfl:temperature=1,temperature=2", 2, "Cannot read 'temperature=2'"),
    ("an empty spec", "--algorithm ''", 2, "Unknown algorithm ''"),
    ("a component's 65 bits", "--model cnn:width=99999999999999999999", 2, "more than 4294967295"),
    ("a proxy of nothing", "--proxy holdout:size=0", 2, "at least 1"),
    ("a proxy of everything", "--proxy holdout:size=5000", 2, "use a smaller size"),
    ("the private data as proxy", "--proxy digits", 2, "use another proxy set"),
    ("an unknown proxy", "--proxy nowhere", 2, "Or holdout, images held out"),
    ("an unknown algorithm", "--algorithm fedag", 2, "Did you mean 'fedavg'"),
    ("an unknown algorithm to compare", "--compare fedag", 2, "Did you mean 'fedavg'"),
    ("an aggregator's temperature", "--aggregator era:temperature=0", 2, "greater than 0"),
    ("an unknown loss", "--loss kk", 2, "Unknown loss 'kk'"),
    ("an unknown codec", "--uplink-codec zip", 2, "Unknown codec 'zip'"),
    ("more logits than classes", "--uplink-codec top:k=10", 2, "with 10 classes, k is at most 9"),
    ("an unknown model", "--model resnet9", 2, "Did you mean 'resnet"),
    ("a model of torchvision", "--model torchvision:resnet1", 2, "Unknown model of torchvision"),
    ("two models for FedAvg", "--algorithm fedavg --model cnn,resnet8", 2, "one model"),
    ("another student for FedAvg", "--compare fedavg --student resnet8", 2, "one model"),
    ("an unknown data set", "--dataset fashion_mnist", 2, "Did you mean"),
    ("a folder that is missing", "--dataset folder:/no/such/place", 3, "There is no folder"),
    ("a folder without a path", "--dataset folder", 2, "folder:PATH"),
    ("a folder without classes", "--dataset folder:flat", 3, "flat"),
    ("a folder without images", "--dataset folder:empty", 3, "empty"),
    ("an image that is none", "--dataset folder:images", 3, "images/train/cat/1.png"),
    ("half of the parquet files", "--dataset cifar10 --data-dir data", 3, "holds 1 of 2 parquet files"),
    ("a file without a component", "--partitioner ./mine.py", 2, "names no component"),
    ("a file that is missing", "--partitioner ./absent.py:Name", 7, "there is no file"),
    ("a module that is missing", "--partitioner no.such:Name", 7, "No module named"),
    ("a module that exits", "--algorithm ./exits.py:Name", 7, "Cannot import algorithm .*SystemExit: 3"),
    ("a module that divides", "--loss ./divides.py:f", 7, "ZeroDivisionError: division by zero"),
    ("a module that is no Python", "--model ./syntax.py:Net", 7, "SyntaxError"),
    ("a name that is no function", "--aggregator ./mine.py:value", 7, "Known: .*three"),
    ("an annotation without a class", "--aggregator ./mine.py:annotated:x=1", 7, "annotation of x in annotated"),
    ("no algorithm", "--algorithm ./mine.py:NoAlgorithm", 7, "not a subclass of fedkd.algorithms.base.Algorithm"),
    ("a misspelt class", "--algorithm ./mine.py:Nmae", 7, "Did you mean 'Name'"),
    ("a class that exits", "--algorithm ./mine.py:Leaving", 7, "cannot be used: SystemExit: 3"),
    ("a property that fails", "--algorithm ./mine.py:Name:fail=property", 7, "failed before the first round: ZeroDiv"),
    ("a first state that exits", "--algorithm ./mine.py:Name:fail=initial", 7, "first round: SystemExit: 5"),
    (
        "a server that fails",
        "--algorithm ./mine.py:Name:fail=aggregate",
        7,
        "on the server: ZeroDivisionError: a",
    ),
    ("a server that exits", "--algorithm ./mine.py:Name:fail=exit", 7, "failed on the server: SystemExit: 3"),
    (
        "clients that fail",
        "--algorithm ./mine.py:Name:fail=local",
        4,
        "none of 3 clients sent a usable update",
    ),
    ("a model that fails", "--model ./mine.py:failing", 7, "failing failed before the first round: ZeroDivisionError"),
    ("a model that exits", "--model cnn:width=8,./mine.py:leaving", 7, "leaving failed .*SystemExit: 3"),
    ("a model of three classes", "--student ./mine.py:narrow", 7, r"returns \(2, 3\) for 2 images"),
    ("a model with a lazy layer", "--model ./mine.py:lazy", 7, "has no shape for 1.weight; give its layer the number"),
    ("a model without parameters", "--model ./mine.py:fixed", 7, "fixed has no parameters to train"),
    ("no codec", "--uplink-codec ./mine.py:three", 7, "not a subclass of fedkd.core.communication.codecs.Codec"),
    ("no data set", "--dataset ./mine.py:three", 7, "is int; a function or class that gives pairs"),
    ("no proxy", "--proxy ./mine.py:three", 7, "is int; a function or class that gives pairs"),
    ("a partitioner that fails", "--partitioner ./mine.py:split:how=raise", 7, "failed: ZeroDivisionError: mine"),
    ("a partitioner that exits", "--partitioner ./mine.py:split:how=exit", 7, "first round: SystemExit: 3"),
    ("no list of samples", "--partitioner ./mine.py:split:how=none", 7, "returned int, not a list"),
    ("too few shares", "--partitioner ./mine.py:split:how=few", 7, "returned 1 index arrays for 3 clients"),
    ("a sample twice", "--partitioner ./mine.py:split:how=twice", 7, "assigned sample 0 more than once"),
    ("a sample that is not there", "--partitioner ./mine.py:split:how=far", 7, "an index out of range"),
    ("a client without samples", "--partitioner ./mine.py:split:how=empty", 7, "gave client 0 no samples"),
    ("a directory in use", "--out thesis", 2, "it is not empty"),
    ("the directory of a run", "--out run", 2, r"it holds a run \(ok\)"),
    ("a file as directory", "--out file", 2, "--out file cannot be created"),
    ("a directory in a file", "--out file/run", 2, "--out file/run cannot be created"),
]

OTHERS = [
    ("no file", "simulate absent.toml", 2, "Cannot read the scenario file absent.toml"),
    ("a directory as file", "simulate thesis", 2, "Cannot read the scenario file thesis"),
    *(
        (f"scenario {name}", f"simulate {name}.toml --out new", 2, words)
        for name, words in {
            "syntax": "syntax.toml is not TOML",
            "twice": "twice.toml is not TOML",
            "both": "both.toml: local_epochs is given twice",
            "deep": "deep.toml is not TOML",
            "long": "long.toml is not TOML",
            "latin": "latin.toml is not TOML",
            "large": "--batch-size .* in large.toml is not usable: .*less than or equal to",
            "true": "--rounds True in true.toml is not usable: it should be a number",
            "truth": "--learning-rate True in truth.toml is not usable: it should be a number",
            "word": "--rounds 'many' in word.toml",
            "half": "--rounds 1.5 in half.toml",
            "list": "--rounds .* in list.toml",
            "table": "--rounds .* in table.toml",
            "numbers": "--compare .* in numbers.toml",
            "number": "--algorithm 3 in number.toml",
            "date": "--dataset .* in date.toml",
            "unknown": "Unknown key in unknown.toml: 'round'. Did you mean 'rounds'",
            "null": "characters that neither a path nor a message can have",
            "line": "characters that neither a path nor a message can have",
            "nan": "it should be a number",
            "infinite": "finite number",
            "words": "Did you mean 'fedavg'",
        }.items()
    ),
    ("a variable", "FEDKD_ROUNDS=0 simulate --out new", 2, "--rounds '0' in FEDKD_ROUNDS is not usable"),
    ("a variable in words", "FEDKD_CLIENTS=few simulate --out new", 2, "in FEDKD_CLIENTS"),
    ("a variable of 65 bits", "FEDKD_SEED=99999999999999999999 simulate", 2, "in FEDKD_SEED"),
    ("a variable's truth", "FEDKD_AUGMENT=perhaps simulate --out new", 2, "in FEDKD_AUGMENT"),
    ("a variable's algorithm", "FEDKD_ALGORITHM=fedag simulate --out new", 2, "Did you mean 'fedavg'"),
    ("nothing to resume", "simulate --resume nowhere", 6, "nowhere is not the directory of a run"),
    ("a file to resume", "simulate --resume file", 6, "file is not the directory of a run"),
    ("another directory to resume", "simulate --resume thesis", 6, "thesis is not the directory of a run"),
    ("a run without a checkpoint", "simulate --resume bare", 6, "bare has no checkpoint"),
    (
        "a distillation to resume",
        "simulate --resume distilled",
        6,
        "distilled/config.toml is not that of a run of this command",
    ),
    (
        "another learning rate",
        "simulate --resume run --learning-rate 0.5",
        6,
        "--learning-rate 0.5 differs from",
    ),
    ("another algorithm", "simulate --resume run --algorithm local", 6, "--algorithm local differs from the run"),
    ("another number of samples for validation", "simulate --resume run --validation 5", 6, "--validation 5 differs"),
    ("other faults", "simulate --resume run --faults dropout=0.1", 6, "--faults dropout=0.1 differs"),
    ("a bad option of a resumed run", "simulate --resume run --rounds 0", 2, "--rounds 0 is not usable"),
    ("a checkpoint of noise", "simulate --resume noisy --rounds 4", 3, "is damaged"),
    ("a checkpoint of another version", "simulate --resume later --rounds 4", 3, "another version of fedkd"),
    ("a checkpoint without memories", "simulate --resume forgetful --rounds 4", 3, "client memories are missing"),
    ("a checkpoint without rows", "simulate --resume rowless --rounds 4", 3, "lacks rounds of fedmd"),
    ("no run to compare", "compare", 2, "Give at least one run directory"),
    ("nowhere to compare", "compare nowhere", 2, "nowhere is not the directory of a run"),
    ("a file to compare", "compare file", 2, "file is not the directory of a run"),
    ("one run twice", "compare run run", 2, "is in two of the runs"),
    ("a run and a distillation", "compare run distilled", 2, "not of both"),
    ("curves over those of a run", "compare run --out bare", 2, "--out bare is a run directory"),
    ("curves of a distillation", "compare distilled --out new", 2, "--out, --by, --name and --target are for runs of"),
    ("a result of noise", "compare garbled", 3, "garbled/result.json is damaged"),
    ("an unknown kind", "list algorithms", 2, "Did you mean 'algorithm'"),
    ("no student", "distill --student resnet9", 2, "Did you mean 'resnet"),
    (
        "a bad student",
        "distill --dataset digits --out new --student lenet:pixels=8",
        2,
        "model 'lenet:pixels=8' cannot be used: pixels=8 is",
    ),
    ("no epochs", "distill --epochs 0", 2, "--epochs 0 is not usable"),
    ("bfloat16 on a CPU", "distill --precision bfloat16 --device cpu", 2, "needs an NVIDIA GPU of 2020 or later"),
    ("half an epoch", "distill --epochs 2.5", 2, "'2.5' is not an integer"),
    ("threads of a distillation", "distill --threads 100000", 2, "less than or equal to 1024"),
    ("65 bits of a distillation", "distill --batch-size 99999999999999999999", 2, "more than 4294967295"),
    ("a scenario of a distillation", "distill validation.toml", 2, "Unknown key in validation.toml: 'epoch'"),
    ("no loss", "distill --loss ''", 2, "--loss is empty"),
    ("an unknown loss term", "distill --loss logit", 2, "Did you mean 'logits'"),
    ("self and another loss", "distill --loss self logits", 2, "cannot be combined"),
    ("a teacher that is not used", "distill --loss self --teacher cnn", 2, "uses no teacher"),
    ("no teacher there", "distill --teacher ./nowhere", 3, "no such run or file"),
    ("teachers of two kinds", "distill --teacher cnn --teachers-from students", 2, "exclude each other"),
    ("a directory without students", "distill --teachers-from students", 2, "contains no student"),
    ("a teacher of noise", "distill --dataset digits --teacher ./bad.safetensors --out new", 3, "bad.safetensors"),
    ("a loss term that exits", "distill --loss ./exits.py:Term", 7, "SystemExit: 3"),
    ("no loss term", "distill --loss ./mine.py:three", 7, "not a subclass of fedkd.training.terms.Term"),
    ("nothing to export", "export nowhere --to onnx", 3, "There is no run or student nowhere"),
    ("no format", "export run", 2, "Name a format"),
    ("an unknown format", "export run --to onx", 2, "Did you mean 'onnx'"),
    ("fewer images", "export run --to onnx --images -1", 2, "--images"),
    ("images in base 16", "export run --to onnx --images 0x10", 2, "'0x10' is not an integer"),
    ("pixels of an export", "export run --to onnx --max-pixels 0", 2, "--max-pixels"),
    ("a directory without a student", "export thesis --to onnx", 3, "thesis is not a run directory"),
    ("a student of noise", "export bad.safetensors --to onnx", 3, "bad.safetensors"),
    ("a student of one byte", "export short.safetensors --to onnx", 3, "short.safetensors"),
    ("threads of a server", "serve model.onnx --threads 100000", 2, "--threads"),
    ("pixels of a server", "serve model.onnx --max-pixels 0", 2, "--max-pixels"),
    ("a port", "serve model.onnx --port 70000", 2, "--port"),
    ("rounds of a benchmark", "bench --rounds 1", 2, "--rounds"),
]
ROWS = [(name, f"simulate {words}", code, expected) for name, words, code, expected in SIMULATE] + OTHERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`FILES`, a run of each kind, and runs with a damaged file."""
    root = tmp_path_factory.mktemp("folder")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    simulate(tiny(algorithm="fedmd", rounds=1, dataset="noise:size=60,pixels=8", out=str(root / "run")))
    short = {"dataset": "digits", "student": "cnn:width=2", "loss": "self:generations=2", "epochs": 1}
    distill(DistillConfig.parse({**short, "batch-size": 512, "corrupted-images": 0, "out": str(root / "distilled")}))
    for name in ("bare", "noisy", "later", "forgetful", "rowless", "garbled"):
        shutil.copytree(root / "run", root / name)
    shutil.rmtree(root / "bare" / "checkpoint")
    (root / "rowless" / "rounds.jsonl").write_text("")
    (root / "garbled" / "result.json").write_text("{")
    for name in ("noisy", "later", "forgetful"):
        (about,) = (root / name).glob("checkpoint/*/checkpoint.json")
        if name == "noisy":
            about.write_text(about.read_text()[:20])
        elif name == "later":
            about.write_text(json.dumps({**json.loads(about.read_text()), "format": 0}))
        else:
            (about.parent / "1").unlink()
    return root


def hashes(root: Path) -> dict[str, str]:
    """Every file below a folder, with the hash of its content."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def typed(text: str) -> tuple[dict[str, str], str, list[str]]:
    """The variables, the command and the arguments of a row; a small run unless the row has its own options."""
    words = shlex.split(text)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    command, *arguments = words[len(variables) :]
    return variables, command, arguments


def test_there_are_a_hundred_rows_and_their_names_differ():
    assert len(ROWS) >= 100
    assert len({name for name, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("name", "text", "code", "expected"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_bad_input_is_one_sentence_and_loses_nothing(name, text, code, expected, folder, monkeypatch, capsys):
    variables, command, arguments = typed(text)
    if any(row[0] == name for row in SIMULATE):
        given = {**TINY, "out": "new"}
        arguments += [
            part for key, value in given.items() if f"--{key}" not in arguments for part in (f"--{key}", value)
        ]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # every file that is new is one that fedkd wrote
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    module, _, attribute = cli.COMMANDS[command][0].partition(":")
    before = hashes(folder)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(getattr(import_module(module), attribute), list(map(str, arguments)))
        after = hashes(folder)
        assert code != 4 or "Traceback" in (folder / "new" / "errors.jsonl").read_text()
    finally:
        shutil.rmtree(folder / "new", ignore_errors=True)
    shown = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == code, shown
    assert len(shown) == 1, shown
    assert shown[0].startswith("fedkd: ")
    assert re.search(expected, shown[0]), shown[0]
    assert before.items() <= after.items()
    assert code == 4 or before == after, "a name is taken only by a run that started"
