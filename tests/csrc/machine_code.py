"""Compiles the CUDA kernels and counts the instructions of their loops: `python tests/csrc/machine_code.py [sm_90]`.

A loop over packs is an innermost loop that loads 16 bytes at a time from device memory, and makes exponentials. It has
two counts: the shortest way around with a load of each row, and all its instructions. Where threads differ, a warp
takes both sides of a branch, so a GPU's time may be above the first. What serves other types of logits, labels or caps
is jumped over by all. Counts are per logit, that is per token of the vocabulary, for loops over one row or both.
"""

import importlib.util
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

ROWS = pathlib.Path(__file__).parents[2] / "csrc" / "cuda" / "rows.cu"

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"(?:!?(U?P\d), )?`\((\.L_x_\d+)\)")  # of a jump, after a second condition
PACK = 8  # logits of a turn: kPack in packs.cuh


def find_nvdisasm() -> str | None:
    """On PATH, beside nvcc, or inside the triton wheel."""
    found = [shutil.which("nvdisasm")]
    if nvcc := shutil.which("nvcc"):
        found.append(shutil.which("nvdisasm", path=pathlib.Path(nvcc).resolve().parent))
    if triton := importlib.util.find_spec("triton"):
        found.append(shutil.which("nvdisasm", path=pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return next(filter(None, found), None)


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor, as the compiler reports it."""

    registers: int
    spilled_bytes: int


class Instruction(NamedTuple):
    name: str
    operands: str
    condition: str | None  # a predicate
    target: str | None  # a label


class Loop(NamedTuple):
    first: int
    body: set[int]
    ends: set[int]  # the jumps back


@dataclass
class PackLoop:
    """A loop over packs of one kernel."""

    shortest: list[str]  # the names of the instructions on the shortest way around
    size: int  # of all instructions

    def per_logit(self, pattern: str) -> float:
        return sum(bool(re.match(pattern, name)) for name in self.shortest) / PACK

    @property
    def counts(self) -> tuple[float, float]:
        """Instructions per logit: on the shortest way, and all."""
        return len(self.shortest) / PACK, self.size / PACK


def compile_kernels(source: pathlib.Path, arch: str, cubin: pathlib.Path) -> dict[str, Usage]:
    """Compiles to `cubin`. Returns what each kernel uses, by its mangled name."""
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-cubin", "--resource-usage"]
    result = subprocess.run(["nvcc", *flags, "-o", cubin, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usage = {}
    for part in (result.stdout + result.stderr).split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        usage[part.split("'")[0]] = Usage(int(re.search(r"Used (\d+) registers", part)[1]), sum(map(int, spilled)))
    return usage


def disassemble(cubin: pathlib.Path) -> dict[str, list[PackLoop]]:
    """The loops over packs of each kernel, by its mangled name."""
    text = subprocess.run([find_nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = iter(re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)[1:])
    return {name: pack_loops(short_name(name), code) for name, code in zip(parts, parts, strict=True)}


def short_name(mangled: str) -> str:
    """A kernel's name, such as `row_kernel<AlphaBeta<float>>`."""
    name = subprocess.check_output(["c++filt", mangled], text=True).strip()
    name = re.sub(r"\(abkd::.*", "", name).removeprefix("void ")
    return re.sub(r"abkd::(cuda::)?", "", name).replace("> >", ">>")


class Program:
    """The instructions of a kernel, and which may follow each."""

    def __init__(self, text: str) -> None:
        self.code: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(self.code)
            elif found := INSTRUCTION.match(line):
                condition, name, operands = found.groups()
                second, target = TARGET.search(operands).groups() if "`(.L" in operands else (None, None)
                self.code.append(Instruction(name, operands, condition or second, target))
        self.after = [self._following(place, labels) for place in range(len(self.code))]
        self.before: list[list[int]] = [[] for _ in self.code]
        for place, following in enumerate(self.after):
            for other in following:
                self.before[other].append(place)

    def _following(self, place: int, labels: dict[str, int]) -> list[int]:
        name, _, condition, target = self.code[place]
        jumps = name.startswith(("BRA", "JMP")) and target in labels
        ends = jumps or name.startswith(("EXIT", "RET", "BRX"))
        falls = [place + 1] if place + 1 < len(self.code) and (condition or not ends) else []
        return [labels[target], *falls] if jumps else falls

    def innermost_loops(self) -> list[Loop]:
        jumps = [(first, place) for place, after in enumerate(self.after) for first in after if first <= place]
        loops = []
        for first, group in itertools.groupby(sorted(jumps), key=lambda jump: jump[0]):
            ends = {place for _, place in group}
            body, waiting = {first}, list(ends)
            while waiting:
                place = waiting.pop()
                if place not in body:
                    body.add(place)
                    waiting += self.before[place]
            loops.append(Loop(first, body, ends))
        return [loop for loop in loops if not any(loop.body > other.body for other in loops)]

    def shortest_way(self, loop: Loop, loads: int) -> list[Instruction]:
        """Around the loop, with so many loads of 16 bytes from device memory and an exponential, or empty.

        A turn that loads nothing is the last one, and one that computes nothing the first.
        """
        start = self._passed(loop.first, (0, False), loads)
        came_from, reached = {start: start}, [start]
        for state in reached:  # grows
            place, *passed = state
            if place in loop.ends and passed == [loads, True]:
                break
            for other in self.after[place]:
                following = self._passed(other, (passed[0], passed[1]), loads)
                if other in loop.body and other != loop.first and following not in came_from:
                    came_from[following] = state
                    reached.append(following)
        else:
            return []
        way = [state]
        while state != start:
            state = came_from[state]
            way.append(state)
        return [self.code[place] for place, *_ in reversed(way)]

    def _passed(self, place: int, before: tuple[int, bool], loads: int) -> tuple[int, int, bool]:
        name = self.code[place].name
        loaded = before[0] + bool(re.match(r"LDG?\.(?:\w+\.)*128", name))
        return place, min(loaded, loads), before[1] or name.startswith("MUFU.EX2")


def pack_loops(name: str, text: str) -> list[PackLoop]:
    """The loops over packs in the order of their code. `name` is the kernel's short name."""
    program, rows = Program(text), 1 if "CrossEntropy" in name else 2
    ways = ((program.shortest_way(loop, rows), loop) for loop in program.innermost_loops())
    return [PackLoop([x.name for x in way], len(loop.body)) for way, loop in ways if way]


def main() -> None:
    arch = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    if not find_nvdisasm():
        raise SystemExit("no nvdisasm on PATH, beside nvcc or in an installed triton: pip install triton")
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "rows.cubin")
        usage = compile_kernels(ROWS, arch, cubin)
        kernels = disassemble(cubin)
    print(f"{arch}: instructions per logit of every loop over packs, on the shortest way and all\n")
    for mangled, loops in sorted(kernels.items(), key=lambda item: short_name(item[0])):
        counts = ", ".join(f"({loop.counts[0]:.1f}, {loop.counts[1]:.1f})" for loop in loops)
        print(f'"{short_name(mangled)}": [{counts}],')
        print(f"    # {usage[mangled].registers} registers, {usage[mangled].spilled_bytes} bytes spilled")
        for loop in loops:
            print(f"    # MUFU {loop.per_logit('MUFU'):.1f}, float32 {loop.per_logit('F[A-KM-Z]'):.1f}")


if __name__ == "__main__":
    main()
