"""The benchmark for graphics cards runs, at tiny sizes and on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "bench_gpu.py"


@pytest.mark.slow
def test_every_step_is_measured_beside_its_bare_loop():
    command = [sys.executable, str(SCRIPT), "--small", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["precision"] == "fp32"
    for step in ("latents", "embedding", "stage1", "finetune", "search"):
        assert found[step]["whole"]["per_second"] > 0
        assert found[step]["bare"]["per_second"] > 0
