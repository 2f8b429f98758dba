"""The training methods, one file each: which loss a student's hidden states get, and on which sequences.

A method is a class with `needs_teacher`, `loss`, and `off_policy_fraction`: about the share of its steps that trains
on the data's own responses. An on-policy one has, besides, what GKD in gkd.py has:

- `select_batch(step, progress, samples, rollouts)`: the samples that a step trains on, given those of the data. `step`
  counts from 0; `progress` is the share of all steps that is done after this one.
- `generators`: the models that write, "student" or also "teacher"; `max_concurrent_responses`: how many at most.
- `on_eval` hears of every dev loss, that before the first step included.
- `metrics` go to the log, and `state_dict`, which JSON can hold, into checkpoints.

It may have `check_rows`, which refuses data of too few rows, and `pretrain_loss`, which is like `loss` and replaces the
cross-entropy of plain text. The trainer knows no method by name.
"""

NAMES = ("sft", "ab", "kd", "seqkd", "imitkd", "gkd", "distillm", "minillm")
WITHOUT_TEACHER = ("sft", "seqkd")


def find(name: str) -> type:
    """The class of a method named in NAMES."""
    from .distillm import DistiLLM
    from .gkd import GKD, ImitKD
    from .kd import WordLevelKD
    from .minillm import MiniLLM
    from .sft import SupervisedFineTuning

    methods = {
        "sft": SupervisedFineTuning,
        "ab": WordLevelKD,
        "kd": WordLevelKD,
        "seqkd": SupervisedFineTuning,  # on what a teacher has written: data.train
        "imitkd": ImitKD,
        "gkd": GKD,
        "distillm": DistiLLM,
        "minillm": MiniLLM,
    }
    return methods[name]
