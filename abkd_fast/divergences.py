"""The divergences under their public name, `abkd_fast.divergences`."""

from .losses.divergences import *  # noqa: F403
