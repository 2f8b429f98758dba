"""A plugin of pytest: tests that need a GPU run on the card, with true numbers."""

import pytest
from emulate import Emulate


@pytest.fixture(autouse=True)
def on_the_card(request):
    if "gpu" not in request.keywords:
        yield
        return
    with Emulate():
        yield
