"""The row kernels' launches against the limits of three GPUs."""

import json
import os
import pathlib
import sys

import card
import pytest


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_no_launch_is_refused(sm):
    script = pathlib.Path(__file__).with_name("row_launches.py")
    assert json.loads(card.run_child(sys.executable, str(script), CARD_SM=str(sm))) == {}


def test_the_card_knows_the_kernels_shared_memory():
    """With 0 bytes each, no launch of the test above would be refused."""
    words = pathlib.Path(os.environ["CARD_RESOURCES"]).read_text().split()
    kernels = [word for word in words if "row_kernel" in word]
    assert kernels
    assert all(card.SHIM.card_fixed_shared(kernel.encode()) > 0 for kernel in kernels)
