"""The training methods, one file each: which loss a student's hidden states get, and on which sequences.

A method is a class with `needs_teacher`, `loss`, and `data_share`: about the share of its steps that trains on the
data's own responses. Below 1 it is on-policy, and has what GKD in student_text.py has: `sequences` gives the samples
that a step trains on, `evaluated` hears of the dev loss, `numbers` go to the log, and `state_dict` into checkpoints, as
JSON. `check_rows`, if a method has it, refuses data of too few rows, and `text_loss`, like `loss`, replaces the
cross-entropy of plain text. The trainer knows no method by name.
"""

NAMES = ("sft", "ab", "kd", "imitkd", "gkd", "minillm")


def find(name: str) -> type:
    """The class of a method named in NAMES."""
    from .kd import WordLevelKD
    from .minillm import MiniLLM
    from .sft import SupervisedFineTuning
    from .student_text import GKD, ImitKD

    methods = {
        "sft": SupervisedFineTuning,
        "ab": WordLevelKD,
        "kd": WordLevelKD,
        "imitkd": ImitKD,
        "gkd": GKD,
        "minillm": MiniLLM,
    }
    return methods[name]
