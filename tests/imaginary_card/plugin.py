"""A plugin of pytest. Tests that need a GPU run on the card. `-m "card or gpu"` selects them and the tests here."""

import pathlib

import pytest
from emulate import Emulate


def pytest_configure(config):
    config.addinivalue_line("markers", "card: uses the imaginary card by itself")


def pytest_itemcollected(item):
    # The gate of machine code needs a disassembler, which comes with the CUDA build of torch.
    if item.path.parent == pathlib.Path(__file__).parent or item.path.name == "test_machine_code.py":
        item.add_marker("card")


@pytest.fixture(autouse=True)
def on_the_card(request):
    if "gpu" not in request.keywords:
        yield
        return
    with Emulate():
        yield
