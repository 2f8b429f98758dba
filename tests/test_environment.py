"""Variables of the environment that mean nothing are refused with one line."""

import pytest

import abkd_fast
from abkd_fast import __main__
from abkd_fast.losses import row_ops
from runs import Run

DIGITS = "9" * 5000
CASES = {
    "instruction set": ({"ABKD_SIMD": "zzz"}, 'ABKD_SIMD is "zzz", expected avx512, avx2 or baseline'),
    "rank missing": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, without RANK, MASTER_ADDR, MASTER_PORT"),
    "rank without others": ({"RANK": "1"}, "RANK is 1 in the environment, but WORLD_SIZE is 1"),
    "no processes": ({"WORLD_SIZE": "0"}, "RANK is 0 in the environment, but WORLD_SIZE is 0"),
    "word": ({"WORLD_SIZE": "two"}, 'WORLD_SIZE is "two" in the environment, expected a number'),
    "digits": ({"WORLD_SIZE": DIGITS}, 'WORLD_SIZE is "999'),
    "digits of a rank": ({"RANK": DIGITS}, 'RANK is "999'),
    "place on the machine": ({"LOCAL_RANK": "first"}, 'LOCAL_RANK is "first" in the environment, expected a number'),
    "restarts": ({"TORCHELASTIC_RESTART_COUNT": "-1"}, 'TORCHELASTIC_RESTART_COUNT is "-1" in the environment'),
}


@pytest.fixture
def is_compiled():
    if "missing" in abkd_fast.build_info():
        pytest.skip("the extension is missing")


@pytest.mark.parametrize("name", CASES)
def test_a_variable_that_means_nothing_is_one_line(tmp_path, monkeypatch, capsys, is_compiled, name):
    variables, words = CASES[name]
    run = Run(tmp_path)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert run() == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert not run.folder.exists()


def test_the_instruction_set_of_a_caller(monkeypatch, capsys, is_compiled):
    for name in ("baseline", ""):
        monkeypatch.setenv("ABKD_SIMD", name)
        assert row_ops.build_info()["simd"] in ("baseline", "avx2", "avx512")
    monkeypatch.setenv("ABKD_SIMD", "AVX2")
    with pytest.raises(ValueError, match=r'^ABKD_SIMD is "AVX2", expected avx512, avx2 or baseline$'):
        row_ops.build_info()
    assert __main__.main(["info"]) == 2
    assert 'ABKD_SIMD is "AVX2"' in capsys.readouterr().err
