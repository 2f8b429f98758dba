"""The training methods, one file each: which loss a student's hidden states get.

A method is a class with `needs_teacher` and `loss`; the trainer knows no method by name.
"""

NAMES = ("sft", "ab", "kd")


def find(name: str) -> type:
    """The class of a method named in NAMES."""
    from .kd import WordLevelKD
    from .sft import SupervisedFineTuning

    return {"sft": SupervisedFineTuning, "ab": WordLevelKD, "kd": WordLevelKD}[name]
