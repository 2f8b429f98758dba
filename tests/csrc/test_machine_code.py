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
    "row_kernel<AlphaBeta<float>>": [(31.9, 137.0), (25.5, 175.9), (38.0, 149.6), (90.2, 201.6), (66.0, 215.6)],
    "row_kernel<AlphaDivergence<float>>": [(25.9, 130.2), (23.5, 173.9), (38.0, 149.6), (95.2, 206.6), (70.6, 220.5)],
    "row_kernel<AlphaNet<float>>": [
        (30.8, 137.1),
        (23.5, 172.9),
        (38.0, 149.6),
        (36.8, 129.1),
        (86.0, 197.4),
        (86.0, 198.4),
        (95.0, 206.4),
        (70.6, 220.5),
        (36.8, 129.1),
        (86.4, 197.8),
        (86.4, 198.8),
    ],
    "row_kernel<CrossEntropy>": [(21.5, 67.0), (27.5, 116.8)],
    "row_kernel<Mixture<float>>": [(38.9, 141.8), (142.8, 254.1), (129.1, 283.1)],
    "row_kernel<WeightedKL<float>>": [(30.9, 136.4), (26.5, 176.8), (38.0, 149.6), (88.0, 180.4), (66.9, 216.9)],
}


@pytest.fixture(
    scope="module",
    params=["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100"))],
)
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
        /*0020*/              @!P2 BRA `(.L_x_5) ;
        /*0030*/              @!P3 BRA `(.L_x_4) ;
        /*0040*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0050*/                   BRA `(.L_x_5) ;
.L_x_4:
        /*0060*/                   LDS.128 R8, [R5] ;
.L_x_5:
        /*0070*/              @!P1 BRA `(.L_x_2) ;
        /*0080*/                   FADD R8, R8, R9 ;
        /*0090*/                   MUFU.EX2 R8, R8 ;
.L_x_2:
        /*00a0*/                   IADD3 R4, R4, 0x200, RZ ;
        /*00b0*/                   ISETP.GE.AND P0, PT, R4, R7, PT ;
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/                   LDS.128 R12, [R4] ;
        /*00e0*/                   MUFU.EX2 R8, R8 ;
        /*00f0*/                   ISETP.NE.AND P0, PT, R4, 0x90, PT ;
        /*0100*/               @P0 BRA `(.L_x_3) ;
        /*0110*/                   EXIT ;
"""


def test_counts_of_a_small_program():
    # The second loop loads nothing from device memory. The first has a way with a load and an exponential: 10 of 11.
    assert len(Program(CODE).innermost_loops()) == 2
    (loop,) = pack_loops("row_kernel<CrossEntropy>", CODE)
    assert loop.counts == (10 / 8, 11 / 8)
    assert loop.per_logit("MUFU") == 1 / 8
    assert pack_loops("row_kernel<TotalVariation>", CODE) == []  # it would load two rows
