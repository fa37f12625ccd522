"""The how-to of a deployment, word for word; and the same bits as in a simulation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedkd.core import tensors
from tests.conftest import ROOT, simulated

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)
NEEDED = ("openssl", "ssh-keygen", "curl", "ps")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("deployment"),
    pytest.mark.timeout(500),
    pytest.mark.skipif(any(shutil.which(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"),
]

DEALT = "dataset='digits' clients=3 rounds=2 proxy='holdout:size=40' model='cnn:width=8' partitioner='iid'"
OPTIONS = "evaluate-every=2 local-epochs=1 batch-size=64 learning-rate=0.01 distill-epochs=1 device='cpu'"
OPTIONS += " algorithm='ensemble:downlink=labels'"


def test_the_how_to_word_for_word(tmp_path):
    """Its blocks in one shell, on loopback with TLS; before the end, a second run with samples that are assigned.

    The process of the second run is killed after its first round, and the run is resumed.
    """
    again = f"""
flwr run . fedkd --run-config "{DEALT} {OPTIONS} out='$WORK/dealt'"
until ls $WORK/dealt/checkpoint/*/checkpoint.json 2>/dev/null; do sleep 0.2; done
kill -9 $(sed 's/process \\([0-9]*\\) on .*/\\1/' $WORK/dealt/lock)
flwr run . fedkd --stream --run-config "{DEALT} {OPTIONS} resume='$WORK/dealt'"
"""
    *steps, end = BLOCKS
    # Whatever fails, the end is reached and nothing stays behind.
    script = "\n".join([f"end() {{\nset +e\n{end}}}", "trap end EXIT", "set -e", *steps, again])
    (tmp_path / "script.sh").write_text(script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "FEDKD_DATA"} | {
        "WORK": str(tmp_path / "work"),
        "PATH": path,
    }
    done = subprocess.run(
        ["bash", str(tmp_path / "script.sh")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    shown = done.stdout[-3000:] + done.stderr[-3000:]
    work = tmp_path / "work"
    own = json.loads((work / "result" / "result.json").read_text())
    assert own["status"] == "ok", shown
    assert own["runs"][0]["test_accuracy"] > 0.15
    assert (own["runs"][0]["rounds"], own["runs"][0]["failures"]) == (3, 0), "it was extended"
    assert tensors.numel(tensors.load(work / "result" / "student.safetensors")) == 66_730

    rows = simulated(tmp_path / "local", clients=3, algorithm="ensemble:downlink=labels", evaluate_every=2)
    deployed = [json.loads(line) for line in (work / "dealt" / "rounds.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if "seconds" not in k} for row in deployed] == rows, shown
    students = [tensors.load(path / "student.safetensors") for path in (work / "dealt", tmp_path / "local")]
    assert tensors.equal(*students)

    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(work) not in listed, "no process is left"
