"""Python imports this when it starts: programs under `run --exec`, and their children, have true numbers."""

import os
import sys

if os.environ.get("CARD_EMULATE") == "1":
    sys.path.append(os.path.join(os.path.dirname(__file__), os.pardir))
    from emulate import Emulate

    Emulate().__enter__()
