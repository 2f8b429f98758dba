"""The training methods, one file each. `base` says what the trainer asks of them; it knows no method by name."""

from .base import Method
from .distillm import DistiLLM
from .gkd import GKD, ImitKD
from .kd import WordLevelKD
from .minillm import MiniLLM
from .sft import SupervisedFineTuning

METHODS: dict[str, type[Method]] = {
    "sft": SupervisedFineTuning,
    "ab": WordLevelKD,
    "kd": WordLevelKD,  # the same as "ab": which divergence it is, the key `loss` says
    "seqkd": SupervisedFineTuning,  # on what a teacher wrote in an earlier stage: data.train
    "imitkd": ImitKD,
    "gkd": GKD,
    "distillm": DistiLLM,
    "minillm": MiniLLM,
}
