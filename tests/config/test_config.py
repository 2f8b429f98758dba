import subprocess
import sys
import time

import pytest


def test_help_is_fast_and_complete():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "abkd_fast.train", "--help"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0
    for key in ("run.name", "student.path", "teacher.config", "data.max_length", "optim.lr", "train.batch_size",
                "eval.every_steps", "log.every_steps", "method", "loss"):  # fmt: skip
        assert f"  {key} " in text
    assert "teacher.lora" not in text, "the teacher is not trained"
    assert "student.lora.rank" in text


@pytest.mark.parametrize("command", ["generate", "evaluate", "report"])
def test_help_of_other_commands_loads_no_pytorch(command):
    code = f"""
import sys
from abkd_fast import {command}
try:
    {command}.main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
