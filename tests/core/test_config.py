from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from fedkd.algorithms.base import Client, Update
from fedkd.core import cli, run_directory, variables
from fedkd.core.config import Config
from fedkd.core.errors import UsageError
from fedkd.core.options import from_file
from fedkd.distill.config import DistillConfig
from fedkd.simulate import simulate


def test_flowers_config_block_is_the_defaults():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == Config().run_config()


def test_run_config_and_back():
    config = Config.parse({"clients": 3, "compare": ["fedavg", "local"], "partitioner": "iid"})
    assert Config.parse(config.run_config()) == config
    assert all(isinstance(value, str | int | float | bool) for value in config.run_config().values())


def test_members_pair_methods_within_a_seed():
    config = Config.parse({"algorithm": "fedmd", "compare": "fedavg fedmd", "seed": 4, "seeds": 2})
    assert [(m.algorithm, m.seed) for m in config.runs("digits")] == [
        ("fedmd", 4),
        ("fedavg", 4),
        ("fedmd", 5),
        ("fedavg", 5),
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"clients": 0},
        {"clients": -3},
        {"clients": "many"},
        {"participation": 0},
        {"participation": 1.01},
        {"participation": "nan"},
        {"rounds": 0},
        {"learning_rate": "inf"},
        {"temperature": 0},
        {"momentum": 1},
        {"seed": -1},
        {"norm": "layer"},
        {"threads": 100_000},
        {"workers": "100000"},
        {"workers": "9" * 5000},
        {"seeds": 10**9},
        {"rounds": True},
        {"participation": True},
        {"client_gpus": False},
        {"workers": True},
        {"compare": [1, True]},
        {"out": "a\0b"},
        {"out": "a\nb"},
        {"dataset": "folder:\udcff"},
    ],
)
def test_values_out_of_range_are_named(values):
    with pytest.raises(UsageError, match=next(iter(values)).replace("_", "-")):
        Config.parse(values)


@pytest.mark.parametrize("options", [Config, DistillConfig])
def test_every_integer_fits_64_bits_and_none_is_true(options):
    """Whatever ends in PyTorch or Flower; the limit is named."""
    names = [name for name, kind in get_type_hints(options).items() if kind is int]
    assert len(names) > 5
    for name in names:
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 9+.* less than or equal to [0-9]+"):
            options.parse({name: 99999999999999999999})
        for value in (True, False):
            with pytest.raises(UsageError, match="should be a number"):
                options.parse({name: value})
    largest = options.parse({"seed": 2**32 - 10_000, "seeds": 10_000})
    assert dataclasses.replace(largest, seed=largest.seed + largest.seeds - 1, seeds=1).seeds == 1
    with pytest.raises(UsageError, match="--seed 4294967295 is not usable: the last seed is more than 4294967295"):
        options.parse({"seed": 2**32 - 1, "seeds": 2})


def test_a_message_says_where_a_value_was_read(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.toml"
    file.write_text("rounds = true\n")
    monkeypatch.setenv("FEDKD_CLIENTS", "0")

    def message(*words: str) -> str:
        with pytest.raises(SystemExit):
            cli.run(cli.command(simulate, Config), [*words])
        return capsys.readouterr().err

    assert (
        message(str(file), "--clients", "1")
        == f"fedkd: --rounds True in {file} is not usable: it should be a number.\n"
    )
    assert message().startswith("fedkd: --clients '0' in FEDKD_CLIENTS is not usable: ")
    assert message("--clients", "-1").startswith("fedkd: --clients -1 is not usable: ")
    file.write_text("round = 1\n")
    assert message(str(file)).startswith(f"fedkd: Unknown key in {file}: 'round'. Did you mean 'rounds'?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local-epochs = 1\nlocal_epochs = 2\n", "local_epochs is given twice, once as local-epochs"),
        ("rounds = " + "[" * 5000, "is not TOML"),
        ("rounds = 99" + "9" * 5000, "is not TOML"),
    ],
    ids=["twice", "nested", "long"],
)
def test_a_scenario_file_that_cannot_be_used(tmp_path, text, expected):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UsageError, match=expected):
        from_file(tmp_path / "a.toml")


def test_an_unknown_key_gets_the_nearest_as_a_hint():
    with pytest.raises(UsageError, match="Did you mean 'local-epochs'"):
        Config.parse({"local-epoch": 1})


def test_every_option_is_grouped_and_explained():
    for field in dataclasses.fields(Config):
        assert field.default.description.endswith(".")
        assert field.default.json_schema_extra["group"]


def test_environment_and_file(tmp_path):
    assert variables.read({"FEDKD_LOCAL_EPOCHS": "3", "FEDKD_DATA": "d", "FEDKD_CACHE": "x", "HOME": "y"}, Config) == {
        "local_epochs": "3",
        "data_dir": "d",
    }
    path = tmp_path / "scenario.toml"
    path.write_text('local-epochs = 3\ncompare = ["fedavg"]\n')
    assert from_file(path) == {"local_epochs": 3, "compare": ["fedavg"]}
    path.write_text("local-epochs =")
    for bad in (path, tmp_path / "absent.toml", tmp_path):
        with pytest.raises(UsageError):
            from_file(bad)


def test_numbers_of_workers_may_be_numbers():
    assert Config.parse({"workers": 2}).workers == "2"


def test_a_path_beyond_ascii_is_written_as_toml(tmp_path):
    config = Config.parse({"data-dir": "/data/😀", "partitioner": "iid"})
    run_directory.write(tmp_path / "a.toml", run_directory.toml(config))
    assert Config.parse(from_file(tmp_path / "a.toml")) == config


def test_json_is_wanted_by_flag_variable_or_file(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text("json = true\n")
    monkeypatch.delenv("FEDKD_JSON", raising=False)
    assert cli._wants_json(["--json"])
    assert cli._wants_json([str(tmp_path / "a.toml"), "--seed", "1"])
    assert not cli._wants_json(["--seed", "1"])
    monkeypatch.setenv("FEDKD_JSON", "true")
    assert cli._wants_json(["--seed", "1"])


@pytest.mark.parametrize("config", [Config, DistillConfig])
def test_a_wrong_argument_in_python_is_one_sentence(config):
    with pytest.raises(UsageError, match=r"^Unknown key: 'datset'. Did you mean 'dataset'\?") as raised:
        config(datset="digits")
    assert isinstance(raised.value, ValueError)
    with pytest.raises(UsageError, match=r"^--batch-size 0 is not usable: input should be greater than or equal to 1"):
        config(batch_size=0)


def test_what_a_notebook_prints_fits_on_a_screen(experiment):
    setup = experiment.setup
    client = Client(1, 2, "cnn", experiment.train, {f"weight {number}": torch.zeros(3, 4) for number in range(50)})
    for value in (Config(), DistillConfig(), setup, setup.proxy, setup.trainer, client, experiment, experiment.train):
        assert len(repr(value)) < 24 * 100
        assert "\n" not in repr(value)
    assert repr(Config(clients=7, augment=False)) == "Config(clients=7, augment=False)"
    assert "memory={weight 0: float32[3, 4], weight 1: float32[3, 4]," in repr(client)
    assert (
        repr(Update({"logits": torch.zeros(2, 3)}, 4))
        == "Update(tensors={logits: float32[2, 3]}, examples=4, metrics={})"
    )
