"""Python imports this when it starts: programs under `run --exec`, and their children, have true numbers."""

import os

if os.environ.get("CARD_EMULATE") == "1":
    from emulate import Emulate

    Emulate().__enter__()
