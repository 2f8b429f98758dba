"""What nvcc makes of the CUDA kernels: they compile, spill nothing, and no loop has grown."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
from machine_code import ROWS, Program, compile_kernels, disassemble, find_nvdisasm, pack_loops, short_name

needs_nvdisasm = pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm on PATH, beside nvcc or in triton")

# Instructions per logit of each loop over packs: on the shortest way, and all. `python tests/csrc/machine_code.py`
# prints them. A change that takes fewer lowers its ceiling.
MEASURED_WITH = "release 13.0"
CEILINGS = {
    "row_kernel<__nv_bfloat16, AlphaBeta<float>>": [(37.5, 52.0), (87.1, 106.1), (64.2, 81.4)],
    "row_kernel<__nv_bfloat16, CrossEntropy>": [(2.0, 17.0), (6.1, 28.8)],
    "row_kernel<__nv_bfloat16, Mixture<float>>": [(37.8, 52.2), (16.5, 16.5), (135.6, 153.8), (126.2, 146.2)],
    "row_kernel<__nv_bfloat16, WeightedKL<float>>": [(37.2, 51.8), (85.0, 85.0), (64.1, 81.0)],
    "row_kernel<float, AlphaBeta<float>>": [(41.0, 56.0), (84.8, 103.8), (62.5, 76.5)],
    "row_kernel<float, CrossEntropy>": [(2.0, 17.0), (6.5, 23.5)],
    "row_kernel<float, Mixture<float>>": [(41.5, 56.5), (28.2, 28.2), (133.2, 150.2), (124.2, 142.5)],
    "row_kernel<float, WeightedKL<float>>": [(41.0, 56.0), (83.5, 83.5), (63.0, 77.0)],
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def compiled(request, tmp_path_factory):
    arch = request.param
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    if arch not in subprocess.check_output(["nvcc", "--list-gpu-code"], text=True).split():
        pytest.skip(f"this nvcc does not know {arch}")
    cubin = tmp_path_factory.mktemp(arch) / "rows.cubin"
    return SimpleNamespace(arch=arch, cubin=cubin, usage=compile_kernels(ROWS, arch, cubin))


def test_kernels_compile_without_spilling(compiled):
    assert compiled.usage, "nvcc reported no kernel"
    assert {name: use.spilled_bytes for name, use in compiled.usage.items() if use.spilled_bytes} == {}


@needs_nvdisasm
def test_no_loop_has_grown(compiled):
    if compiled.arch != "sm_90":
        pytest.skip("the ceilings are those of sm_90")
    kernels = {short_name(mangled): loops for mangled, loops in disassemble(compiled.cubin).items()}
    assert kernels.keys() >= CEILINGS.keys()
    same = MEASURED_WITH in subprocess.check_output(["nvcc", "--version"], text=True)
    margin = 1.0 if same else 1.05
    for name, ceilings in CEILINGS.items():
        loops = kernels[name]
        assert len(loops) == len(ceilings), f"{name} has other loops than CEILINGS: {[x.counts for x in loops]}"
        for loop, ceiling in zip(loops, ceilings, strict=True):
            for count, most in zip(loop.counts, ceiling, strict=True):
                assert count <= most * margin + 0.05, (
                    f"{name}: {count:.1f} instructions per logit, the ceiling is {most}"
                )
            assert not any(x.startswith(("LDL", "STL")) for x in loop.shortest), f"{name} uses local memory"


CODE = """
        /*0000*/                   MOV R2, c[0x0][0x210] ;
        /*0010*/                   MOV R4, RZ ;
.L_x_1:
        /*0020*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0030*/                   LDS.128 R12, [R5] ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   FADD R8, R8, R9 ;
        /*0060*/                   MUFU.EX2 R8, R8 ;
.L_x_2:
        /*0070*/                   IADD3 R2, P2, R2, 0x2000, RZ ;
        /*0080*/                   IADD3 R4, R4, 0x200, RZ ;
        /*0090*/                   ISETP.GE.AND P0, PT, R4, R7, PT ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   LDS.128 R12, [R4] ;
        /*00c0*/                   IADD3 R4, R4, 0x20, RZ ;
        /*00d0*/                   ISETP.NE.AND P0, PT, R4, 0x90, PT ;
        /*00e0*/               @P0 BRA `(.L_x_3) ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4) ;
"""


def test_counts_of_a_small_program():
    # Two loops that count: the second goes over warps. One load of the first is of a constant.
    assert len(Program(CODE).innermost_loops()) == 3
    (loop,) = pack_loops("row_kernel<float, CrossEntropy>", CODE)
    assert loop.counts == (7 / 4, 9 / 4)
    assert (loop.logits, dict(loop.loads), loop.per_logit("MUFU")) == (4, {"LDG.E.128": 1}, 0)
