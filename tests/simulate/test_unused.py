"""Notices about options that a run is given and does not use."""

from __future__ import annotations

import pytest

from fedkd.core import notes
from fedkd.core.cli import run
from fedkd.distill.__main__ import app as distill
from fedkd.simulate import unused
from fedkd.simulate.__main__ import app as simulate
from tests.conftest import ROOT, tiny


def said(app, capsys, *words: str) -> list[str]:
    """The notices of a command that ends before it starts anything: its directory is in use."""
    notes.say.cache_clear()  # a notice is printed once in a process
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(app, [*words, "--out", str(ROOT / "tests")])
    *lines, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "is in use" in last
    return [line.removeprefix("fedkd: ") for line in lines]


@pytest.mark.parametrize(
    ("words", "notices"),
    [
        ("--optimizer adam --momentum 0.9", ["--momentum is not used by --optimizer adam."]),
        ("--optimizer adam", []),
        ("--momentum 0.9", []),
        (
            "--algorithm dsfl --temperature 1 --loss kl",
            ["--loss is not used by dsfl.", "--temperature is not used by dsfl."],
        ),
        ("--compare fedavg fd --loss mse", ["--loss is not used by fedavg, fd."]),
        ("--compare fedmd local --patience 2 --validation 9", ["--patience is not used by fedmd, local."]),
        ("--algorithm fedavg --distill-patience 9 --validation 9", ["--distill-patience is not used by fedavg."]),
        ("--algorithm fedavg --compare moon --label-smoothing 0.1", ["--label-smoothing is not used by moon."]),
        ("--algorithm fedavg --uplink-codec uint8", ["--uplink-codec is not used by fedavg."]),
        ("--algorithm fedavg --uplink-codec float16", []),
        ("--downlink-codec float16", ["--downlink-codec is not used by ensemble."]),
        ("--algorithm dsfl --downlink-codec uint8", []),
        ("--algorithm ensemble:downlink=student --downlink-codec float16", []),
        (
            "--algorithm ensemble:downlink=student --downlink-codec uint8",
            ["--downlink-codec is not used by ensemble:downlink=student."],
        ),
        ("--algorithm cfd --uplink-codec float16", ["--uplink-codec is not used by cfd."]),
        ("--algorithm fedmd --temperature 2", ["--temperature is not used by fedmd."]),
        ("--algorithm fedmd --temperature 2 --uplink-codec uint8", []),
        (
            "--algorithm local --temperature 2 --uplink-codec uint8",
            ["--temperature is not used by local.", "--uplink-codec is not used by local."],
        ),
        ("--norm batch --model lenet,vit-tiny", ["--norm is not used by lenet, vit-tiny."]),
        ("--norm batch --model lenet,cnn", []),
        ("--algorithm fml --norm batch --model lenet", []),
        ("--local-epochs 2 --local-steps 9", ["--local-epochs is not used by a run with --local-steps 9."]),
        ("--distill-epochs 2 --distill-steps 9", ["--distill-epochs is not used by a run with --distill-steps 9."]),
    ],
)
def test_an_option_without_effect_is_named_with_what_does_not_use_it(words, notices, capsys):
    assert said(simulate, capsys, *words.split()) == notices


def test_keys_of_a_scenario_file_are_given_too(tmp_path, capsys):
    (tmp_path / "own.toml").write_text('optimizer = "adam"\nmomentum = 0.9\n')
    assert said(simulate, capsys, str(tmp_path / "own.toml")) == ["--momentum is not used by --optimizer adam."]


def test_in_python_an_option_is_given_if_it_is_not_the_default(capsys):
    notes.say.cache_clear()
    unused.say(tiny(algorithm="fedavg", loss="mse", optimizer="adam"))
    assert "--loss is not used by fedavg." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "notices"),
    [
        ("--teacher-epochs 3", []),
        ("--teacher cnn,resnet8 --teacher-epochs 3 --teacher-weighting entropy", []),
        ("--loss self --teacher-epochs 3", ["--teacher-epochs is not used by a run that trains no teacher."]),
        ("--teacher-weighting uniform", ["--teacher-weighting is not used by a run with fewer than two teachers."]),
    ],
)
def test_options_of_teachers_without_effect(words, notices, capsys):
    assert said(distill, capsys, *words.split()) == notices
