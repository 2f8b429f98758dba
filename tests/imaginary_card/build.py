"""Builds the imaginary card: `python build.py FOLDER`, with the python of the CUDA build of torch. `run` calls it.

FOLDER gets libcuda.so.1 (the shim and a stub for every other function that PyTorch links), rows_on_card.so (our row
kernels for the host), and resources (static shared memory of the row kernels as they are built).
"""

import importlib.util
import pathlib
import re
import subprocess
import sys

import torch
from emulated_kernel import HEADERS, SOURCES

HERE = pathlib.Path(__file__).parent
LINKED = ("torch_cuda", "c10_cuda", "torch_python", "caffe2_nvrtc", "torch_cuda_linalg")
FUNCTION = re.compile(r"(?!cuFile)(__cuda|cuda[A-Z]|cu[A-Z]|cublas|cudnn)\w+$")
DECLARED = re.compile(r"CUDAAPI\s+(cu[A-Z]\w+)|^#define cu[A-Z]\w+\s+(?:__CUDA_API_PT\w+\()?(cu[A-Z]\w+)", re.MULTILINE)
RESERVED = 1024  # bytes that cuobjdump counts since sm_90, beyond the limit of a block


def symbols(*command: str) -> set[str]:
    """The last words of nm's lines, without versions."""
    lines = subprocess.check_output(["nm", *command], text=True).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip() and not line.endswith(":")}


def stub(name: str) -> str:
    if "Create" in name:
        return f"int {name}(void** handle) {{ static int it; *handle = &it; return 0; }}"
    if re.search(r"gemm|Matmul$|gemv|Gemm", name):
        return f'int {name}() {{ return card_library_call("{name}"); }}'
    return f"int {name}() {{ return {3000 if name.startswith('cudnn') else 0}; }}"  # 3000: not supported


def build_shim(folder: pathlib.Path) -> None:
    libraries = pathlib.Path(torch.__file__).parent / "lib"
    wanted = symbols("-D", "--undefined-only", *(str(libraries / f"lib{name}.so") for name in LINKED))
    declared = DECLARED.findall(pathlib.Path(HEADERS, "cuda.h").read_text())
    wanted |= {name for names in declared for name in names if name}
    compile_c = ["gcc", "-O1", "-g", "-fPIC", "-w", "-isystem", HEADERS]
    objects = []
    for source in sorted((HERE / "shim").glob("*.c")):
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*compile_c, "-c", source, "-o", objects[-1]], check=True)
    stubs = folder / "stubs.c"
    missing = sorted(filter(FUNCTION.match, wanted - symbols("--defined-only", *objects)))
    stubs.write_text("\n".join(["int card_library_call(const char*);", *map(stub, missing)]) + "\n")
    output = folder / "libcuda.so.1"
    link = ["-shared", "-Wl,-soname,libcuda.so.1", *objects, stubs, "-o", output, "-ldl", "-lpthread"]
    subprocess.run([*compile_c, *link], check=True)
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(output.name)  # Triton links against this name


def build_rows(folder: pathlib.Path) -> subprocess.Popen:
    language = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-fno-extern-tls-init"]
    warnings = ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
    source, output = HERE / "rows_on_card.cpp", folder / "rows_on_card.so"
    folders = ["-isystem", HEADERS, "-I", SOURCES]
    return subprocess.Popen(["g++", *language, *warnings, *folders, "-shared", source, "-o", output, "-ldl"])


def read_resources(folder: pathlib.Path) -> None:
    tool = pathlib.Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    kernels = importlib.util.find_spec("abkd_fast.losses._cuda").origin
    lines, arch, name = [], "", ""
    for line in subprocess.check_output([tool, "-res-usage", kernels], text=True).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"SHARED:(\d+)", line):
            static = int(found[1]) - (0 if arch == "sm_80" else RESERVED)
            lines.append(f"{arch} {name} {max(0, static)} \n")  # a kernel without shared memory has none reserved
    (folder / "resources").write_text("".join(dict.fromkeys(lines)))


def main() -> None:
    if HEADERS is None:
        raise SystemExit("no CUDA headers in CUDA_HOME, beside nvcc, or among the nvidia wheels")
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows = build_rows(folder)
    build_shim(folder)
    if rows.wait():
        raise SystemExit("the row kernels were not compiled for the host")
    read_resources(folder)  # last: `run` takes its age for the card's


if __name__ == "__main__":
    main()
