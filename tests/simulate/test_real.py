"""On real CIFAR-10, where FEDKD_DATA points to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import run


@pytest.mark.real
def test_real_cifar10(data_dir, tmp_path):
    """Two clients on a small share of CIFAR-10, with CIFAR-100 as the proxy where it is."""
    proxy = "cifar100:size=200" if (Path(data_dir) / "cifar100").is_dir() else "holdout:size=200"
    flags = ["--clients", 3, "--partitioner", "size:sizes=600+600+600", "--rounds", 1, "--local-epochs", 1]
    process = run(
        "--dataset", "cifar10", "--proxy", proxy, *flags, "--json", "--out", tmp_path / "r", FEDKD_DATA=data_dir
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["dataset"] == "cifar10"
    assert result["runs"][0]["teacher_accuracy"] > 0.12
