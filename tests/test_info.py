import platform
import re
import subprocess
import sys
import types

import torch
import transformers

from abkd_fast.info import main
from abkd_fast.losses import row_ops
from abkd_fast.models import attention


def lines(capsys):
    assert main([]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_report_has_build_devices_and_versions(capsys):
    found = lines(capsys)
    assert [*found] == ["abkd_fast", "kernels", "torch", "CPU", "attention", "packages", "system"]
    assert str(row_ops.build_info()["simd"]) in found["kernels"] or "missing" in row_ops.build_info()
    assert found["torch"].startswith(f"{torch.__version__}, CUDA ")
    assert f"{torch.get_num_threads()} thread" in found["CPU"]
    assert found["attention"] == attention.backend(torch.device("cpu"))
    assert f"transformers {transformers.__version__}, " in found["packages"]
    assert re.search(r"flash-attn \S", found["packages"])
    assert platform.python_version() in found["system"]


def test_a_report_names_every_gpu(capsys, monkeypatch):
    card = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(
        row_ops,
        "build_info",
        lambda: {"cuda": "13.0", "cuda_archs": ["80", "90"], "simd": "avx2", "compiler": "g++ 12"},
    )
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "kernels     CUDA 13.0 for sm_80, sm_90; CPU avx2; built by g++ 12\n" in out
    for number in range(2):
        assert f"GPU {number}       NVIDIA H100, sm_90, 80.0 GiB\n" in out
    assert f"attention   {attention.backend(torch.device('cuda'))}\n" in out


def test_a_report_without_the_extension_or_transformers(capsys, monkeypatch):
    reason = "/home/anna/env/lib/_C.so: undefined symbol: x"
    monkeypatch.setattr(row_ops, "build_info", lambda: {"missing": reason})
    monkeypatch.delitem(sys.modules, "abkd_fast.models.attention")
    monkeypatch.delattr("abkd_fast.models.attention")
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    found = lines(capsys)
    assert found["kernels"] == "none, the extension can't be imported: _C.so: undefined symbol: x"
    assert found["attention"].startswith("can't be imported: cannot import name 'AttentionInterface'")


def test_a_report_names_no_folder():
    text = subprocess.check_output([sys.executable, "-m", "abkd_fast.info"], text=True)
    assert "/" not in text
    assert text.startswith("abkd_fast ")
