import json
import os
import pathlib
import struct

import numpy as np
import pytest

# Two threads that spin for each other crawl when tests share the machine; sleeping threads do not. OpenMP reads this
# when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub

import datasets
import torch

pytest.register_assert_rewrite("runs")  # failing assertions in it are explained, as in tests

# A folder with real data and tokenizers beside the checkout. Tests that need it are skipped without it.
SHARED = pathlib.Path(os.environ.get("ABKD_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared"))


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is counted by /proc")


def anonymous_bytes():
    """Bytes of this process's memory that belong to no file."""
    fields = pathlib.Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("RssAnon:") + 1])


# Files that take longest. A worker takes whole files: if one of these came last, the other workers would wait.
FIRST = "test_machine_code.py", "test_distributed.py", "test_pipeline.py", "test_loss_study.py", "test_resume.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """The account of tests/chaos: a row for each kind, then what repeats each failure."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = (value for report in reports for value in getattr(report, "user_properties", ()))
    kept = {value[0]: value for name, value in properties if name == "chaos"}
    if kept:
        terminalreporter.write_line("\n| kind | tries | held |\n|---|---|---|")
    for kind, tries, failed in kept.values():
        terminalreporter.write_line(f"| {kind} | {tries} | {tries - len(failed)} |")
    for how in (line for _, _, failed in kept.values() for line in failed):
        terminalreporter.write_line(f"failed: {how}")


@pytest.fixture
def shared():
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no data folder at {SHARED}; set ABKD_TEST_DATA to one")
    return SHARED


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, tmp_path_factory, monkeypatch):
    """No test finds or leaves hidden states of a teacher or tokenized data in the user's folders."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setenv("ABKD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def shared_caches(tmp_path_factory):
    """Nor does a fixture that several tests share, or a process that one starts."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("ABKD_CACHE", str(folder / "states"))
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A small run that nothing has interrupted."""
    from runs import Run

    run = Run(tmp_path_factory.mktemp("undisturbed"))
    assert run() == 0
    return run


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def write_indexed(tmp_path):
    """Writes Megatron's binary format, by its description. Returns the path of the .bin file."""
    codes = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8, "uint32": 9}

    def write(items, name="train_0", dtype="uint16"):
        path = tmp_path / name
        arrays = [np.array(item, dtype=np.int64).astype(dtype) for item in items]
        path.with_suffix(".bin").write_bytes(b"".join(array.tobytes() for array in arrays))
        header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", codes[dtype])
        counts = struct.pack("<QQ", len(arrays), 1)
        sizes = [len(array) for array in arrays]
        places = [sum(array.nbytes for array in arrays[:number]) for number in range(len(arrays))]
        index = struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(places)}q", *places)
        path.with_suffix(".idx").write_bytes(header + counts + index + struct.pack("<q", 0))
        return str(path.with_suffix(".bin"))

    return write


GPT2 = {"model_type": "gpt2", "vocab_size": 211, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
