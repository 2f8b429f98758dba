"""benchmarks/gpu.sh with a made-up card, and a python, pip and timeout that only note how they were called."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ["build", "check", "products", "rows", "fused", "threads", "steps", "methods", "generation", "tests"]
PARTS += ["memcheck", "racecheck"]
PYTHON = """#!/bin/bash
echo "$PIP_NO_INDEX|$PIP_FIND_LINKS|$*" >>calls
case "$*" in
  *get_device_capability*) echo 90 ;;
  *"pip install"*) [[ ! -f no_network || $* != *datasets* ]] ;;
  *setup.py*) [[ ! -f no_compiler ]] && touch built ;;
  *"import abkd_fast; assert"*) [[ -f built ]] ;;
  *build_backend*) echo nvidia-cuda-nvcc==13.0.* ;;
  *"-m pytest -o addopts= -q -m gpu -k"*) echo "2 skipped in 1 s" ;;
  *"-m pytest"*) echo "3 passed in 1 s" ;;
  *"--only products"*) mkdir -p "${@: -1}" && echo "| a table |" >"${@: -1}/kernels.md" ;;
  *"--only fused"*) echo "no such kernel"; exit 1 ;;
esac
"""
TIMEOUT = """#!/bin/bash
echo $3 >>limits
shift 3
[[ $* != *"--only rows"* ]] || exit 124
exec "$@"
"""
SANITIZER = '#!/bin/bash\nexec "${@:7}"\n'
NVIDIA_SMI = "#!/bin/bash\n[[ $1 == -L ]] && echo GPU 0 || echo A card\n"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def source(tmp_path):
    """A copy of what the script reads."""
    for name in (
        "benchmarks/gpu.sh",
        "pyproject.toml",
        "setup.py",
        "build_backend.py",
        "csrc/row_call.h",
        "abkd_fast/info.py",
        "tests/test_gpu.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "build").mkdir()
    programs = {"nvidia-smi": NVIDIA_SMI, "python": PYTHON, "timeout": TIMEOUT, "compute-sanitizer": SANITIZER}
    for name, text in programs.items():
        write(tmp_path / "bin" / name, text)
    return tmp_path


def run(source, *arguments, **variables):
    for name in ("calls", "limits"):
        (source / name).unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "WHEELS"))}
    path = f"{source / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment |= {"PATH": path, "PYTHON": "python", "VIRTUAL_ENV": "", "CONDA_PREFIX": "", **variables}
    command = ["bash", "benchmarks/gpu.sh", *arguments]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert (source / "calls").exists() or result.returncode == 2, result.stderr
    return result


def outcomes(source):
    lines = (source / "gpu-report" / "report.md").read_text().splitlines()
    return {line[3:].split(":")[0]: line.split(": ")[1].split(",")[0] for line in lines if line.startswith("## ")}


def calls(source):
    return (source / "calls").read_text().splitlines()


def test_it_says_what_is_missing(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    result = subprocess.run(
        [shutil.which("bash"), ROOT / "benchmarks" / "gpu.sh", tmp_path / "report"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["gpu.sh: no nvidia-smi on PATH: this needs an NVIDIA GPU and its driver"]
    assert not (tmp_path / "report").exists()


def test_parts_come_in_order_within_ten_minutes_and_lose_only_themselves(source):
    result = run(source)
    assert result.returncode == 1
    found = outcomes(source)
    assert [*found] == PARTS
    bad = {name: outcome for name, outcome in found.items() if outcome != "passed"}
    assert bad == {"check": "FAILED", "rows": "STOPPED at its limit", "fused": "FAILED"}  # tests only skipped: check
    assert "== 3 failed" in result.stdout
    limits = [int(limit) for limit in (source / "limits").read_text().split()]
    grace = 5  # seconds from the signal that asks a part to end to the one that ends it
    assert len(limits) == len(PARTS)
    assert sum(limits) + grace * len(PARTS) == 600
    report = (source / "gpu-report" / "report.md").read_text()
    assert report.startswith("# abkd_fast on A card\n")
    for text in ("| a table |", "no such kernel", "3 passed"):
        assert text in report
    assert any(call.endswith("-m pytest -o addopts= -q -m gpu tests/test_gpu.py") for call in calls(source))


def test_every_benchmark_gets_options_that_it_knows(source):
    """The fast check; the rehearsal on the imaginary card runs them."""
    run(source)
    timing = [call for call in calls(source) if "benchmarks/timing.py" in call]
    methods = [call.split("--methods ")[1].split(" --")[0] for call in timing]
    assert methods == ["ABKD", "KD AlphaNet GKD DISTILLM MiniLLM"]
    assert all("--minutes 1" in call and "--quick" not in call for call in timing)
    run(source, "--quick")
    assert sum("--scale tiny" in call for call in calls(source)) == 2
    assert sum("--quick" in call for call in calls(source)) == 4  # and the one that is late


def test_a_second_call_does_not_build_again(source):
    run(source, "gpu-report", "generation")
    assert outcomes(source) == {"build": "passed", "generation": "passed"}
    built = [call for call in calls(source) if "setup.py" in call or "nvidia-cuda-nvcc" in call]
    assert [call.split("|")[2].split(" ")[0] for call in built] == ["-m", "setup.py"]  # pip brings an nvcc first
    run(source, "gpu-report", "generation")
    assert not any("setup.py" in call for call in calls(source))
    (source / "csrc" / "row_call.h").write_text("// changed\n")
    run(source, "gpu-report", "generation")
    assert any("setup.py" in call for call in calls(source))


def test_without_a_network_wheels_come_from_a_folder(source):
    (source / "carried").mkdir()
    (source / "no_network").touch()
    result = run(source, "gpu-report", "generation", WHEELS="carried")
    assert result.returncode == 0
    installs = [call for call in calls(source) if "pip install" in call]
    assert all(call.startswith(f"1|{source / 'carried'}|") for call in installs)
    assert "datasets>=4.0" in installs[0]
    assert "rouge-score" in installs[0]
    assert [call.split()[-1] for call in installs[1:3]] == ["torch>=2.10", "transformers>=5.0"]  # one by one
    assert "gpu.sh: datasets>=4.0 can't be had; what needs it will fail" in result.stdout
    result = run(source, WHEELS="absent")
    assert result.returncode == 2
    assert "WHEELS is absent, which is no folder" in result.stderr


def test_nothing_runs_without_kernels(source):
    (source / "no_compiler").touch()
    result = run(source)
    assert result.returncode == 2
    assert "the kernels can't be built" in result.stderr
    assert outcomes(source) == {"build": "FAILED"}
