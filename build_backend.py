"""A PEP 517 backend: setuptools, building against the torch that will load the result.

An isolated build can't import the packages of the environment it installs into, and a torch of its own would be a
second download of gigabytes and perhaps another version. The interpreter still knows where those packages are, so a
torch that is there is used, and only if there is none does the build ask for one.
"""

import importlib.util
import sys
import sysconfig

from setuptools.build_meta import *  # noqa: F403 - the hooks that need no change

if importlib.util.find_spec("torch") is None:
    sys.path += {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [] if importlib.util.find_spec("torch") else ["torch>=2.10"]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
