"""`python -m abkd_fast.info`: what a report of a bug has to say about the machine. It names no user, host or folder."""

import argparse
import importlib.metadata
import platform
import re
from collections.abc import Iterator

from .cli import leave, run
from .errors import reading
from .output import check_printed

PACKAGES = "transformers", "tokenizers", "datasets", "peft", "flash-attn", "triton", "pyarrow", "safetensors", "numpy"


def main(arguments: list[str] | None = None) -> int:
    """Prints the description; returns the exit status."""
    return run("info", _parser, _print, arguments)


def _print(options: argparse.Namespace) -> None:
    print(*describe(), sep="\n")
    check_printed()


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description="Print what a report of a bug has to say: the build, devices, attention, and versions.",
    )


def describe() -> Iterator[str]:
    """The lines of the description."""
    import torch  # not before the options are checked: this takes a second

    from .device import cpu_name
    from .losses import row_ops

    with reading("the losses have no kernels to use"):
        build = row_ops.build_info()
    yield f"abkd_fast   {_version('abkd_fast')}"
    if "missing" in build:
        yield f"kernels     none, the extension can't be imported: {_without_folders(build['missing'])}"
    else:
        cuda = f"CUDA {build['cuda']} for sm_{', sm_'.join(build['cuda_archs'])}" if build["cuda"] else "no CUDA"
        yield f"kernels     {cuda}; CPU {build['simd']}; built by {build['compiler']}"
    yield f"torch       {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield f"GPU {number}       {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.1f} GiB"
    yield f"CPU         {cpu_name()}, {(count := torch.get_num_threads())} thread{'s' * (count > 1)}"
    yield f"attention   {_attention(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}"
    yield f"packages    {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}"
    yield f"system      Python {platform.python_version()}, {platform.platform()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _attention(device: object) -> str:
    try:
        from .models import attention
    except ImportError as error:  # of transformers, which the packages below name
        return f"can't be imported: {_without_folders(str(error))}"
    return attention.describe(device)


def _without_folders(text: str) -> str:
    """A library's message names files by their whole path, and a path often names a person."""
    return re.sub(r"[^\s'\"(]*[/\\]", "", text)


if __name__ == "__main__":
    leave(main())
