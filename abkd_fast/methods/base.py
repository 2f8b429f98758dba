"""The protocol between trainer and methods. The defaults are those of distillation on the data's own responses."""

from torch import Tensor

from ..config.schema import Config
from ..data.batches import Batch
from ..losses.arguments import LinearHead
from ..losses.fused_linear import fused_linear_cross_entropy
from ..teacher.top_k import TopKTargets
from .rollouts import Rollouts


def cross_entropy(student: LinearHead, batch: Batch, teacher: LinearHead | None = None) -> Tensor:
    """The cross-entropy of a batch's labels, summed, times its scale. The teacher plays no part."""
    options = {"reduction": "sum", "scale": batch.loss_scale}
    return fused_linear_cross_entropy(**student.arguments("student"), labels=batch.labels, **options)


class Method:
    """A loss for the student's hidden states. A subclass overrides what differs from the defaults."""

    needs_teacher = True  # its weights, or its hidden states
    top_k: TopKTargets | None = None  # a served teacher's tokens, which take their place; see `Config.served_teacher`
    pretrain_needs_teacher = False  # on-policy methods only: the teacher reads the plain text, too
    off_policy_fraction = 1.0  # about the share of the steps that trains on the data's own responses

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for settings that don't fit the method."""

    def loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        """The loss of the response tokens, summed over the batch, times its `loss_scale`: a scalar.

        Args:
            student: the N hidden states of the batch that predict a response token, and the output projection.
            teacher: the teacher's for the same tokens; None where the method needs none.
        """
        raise NotImplementedError

    def pretrain_loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        """The loss of plain text, summed likewise; `teacher` is None unless `pretrain_needs_teacher`."""
        return cross_entropy(student, batch)

    def check_rows(self, num_rows: int) -> None:
        """Raises ConfigError where the data have too few rows for the method."""

    def on_eval(self, dev_loss: float) -> None:
        """Is called after every measurement of the dev loss, the one before the first step included."""

    def metrics(self) -> dict[str, float]:
        """Values for the log, over the steps since the last call. Collective."""
        return {}

    def state_dict(self) -> dict:
        """The values that a checkpoint has to keep, for JSON. Collective."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""


class OnPolicyMethod(Method):
    """A method that also trains on responses that a model writes during the run."""

    off_policy_fraction = 0.0
    generators: tuple[str, ...] = ("student",)  # the models that write: "student", or "student" and "teacher"
    max_concurrent_responses: int  # at most so many responses are written at once

    def select_batch(self, step: int, progress: float, samples: list[dict], rollouts: Rollouts) -> list[dict]:
        """The samples that a step trains on.

        Args:
            step: counts from 0.
            progress: the share of all steps that is done after this one, in (0, 1].
            samples: the step's samples of the data.
        """
        raise NotImplementedError
