"""Divergences between a teacher and a student, with their gradients, from logits or from hidden states.

The modules import torch and each other, nothing else of abkd_fast. This file imports nothing at all: checks of a
configuration read `divergences` before torch is loaded.
"""
