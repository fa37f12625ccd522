"""Signals whose exception is lost: C++ code of PyTorch replaces it, or a client fails by it."""

from __future__ import annotations

import json
import signal

import pytest

from fedkd.core import cli, run_directory, tensors
from fedkd.distill.__main__ import app as distill
from fedkd.simulate.__main__ import app as simulate
from fedkd.training import loop
from tests.conftest import FLAGS

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def lost(monkeypatch, module, name, number, when):
    """A function in whose call of this number a signal arrives, and is replaced by another error."""
    original, calls = getattr(module, name), []

    def replaced(*arguments, **options):
        calls.append(name)
        if len(calls) != when:
            return original(*arguments, **options)
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ValueError("of C++") from None

    monkeypatch.setattr(module, name, replaced)


def ended(app, arguments):
    with pytest.raises(SystemExit) as raised:
        cli.run(app, list(map(str, arguments)))
    return raised.value.code


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize(
    ("module", "name", "when"),
    [(tensors, "load", 2), (loop, "train", 6)],
    ids=["while a checkpoint is written", "in the training of a client"],
)
def test_a_run_is_interrupted_all_the_same(tmp_path, monkeypatch, number, code, module, name, when):
    out = tmp_path / "run"
    lost(monkeypatch, module, name, number, when)
    assert ended(simulate, [*FLAGS, "--out", out]) == code
    assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
    assert len(run_directory.rows(out / "rounds.jsonl")) >= 1


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_distillation_is_interrupted_all_the_same(tmp_path, monkeypatch, number, code):
    out = tmp_path / "run"
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))  # no network is there yet
    lost(monkeypatch, loop, "train", number, 2)
    words = ["--dataset", "digits", "--student", "cnn:width=4", "--teacher", "cnn:width=4", "--epochs", 1]
    assert ended(distill, [*words, "--out", out]) == code
    assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
