"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): the reverse KL divergence of whole responses, by policy gradient."""

import itertools
import math
import operator

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..config.schema import Config
from ..data.batches import Batch, shuffled_batches
from ..errors import ConfigError
from ..losses.arguments import LinearHead
from ..losses.divergences import ForwardKL
from ..losses.fused_linear import fused_linear_divergence
from ..losses.policy_gradient import fused_linear_policy_gradient, is_clipped
from .base import OnPolicyMethod
from .rollouts import Rollouts

# Rewards, importance weights and the trained model have to be the very probabilities that are sampled from.
NEEDED = {
    "loss": "rkl",
    "temperature": 1,
    "hard_weight": 0,
    "sampling.temperature": 1,
    "sampling.top_k": 0,
    "sampling.top_p": 1,
}


class MiniLLM(OnPolicyMethod):
    """Rounds of rollouts. Each round is trained on for a few epochs, then discarded.

    The teacher is p, the student q, and the student that wrote the rollouts q_old:

    - Tokens y_t are drawn from the mixture b = (1 - a) q_old + a p.
    - Rewards are r_t = clip((log p - log q_old) / scale, -c, c).
    - Returns are R_t = sum_k>=t gamma^(k-t) r_k, divided by the number of tokens from t on.
    - Advantages A_t are the returns, normalized over a minibatch.
    - A token's loss is max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + KL(q, p). Here rho = w q / q_old with the
      importance weight w = q_old / b, so rho = q / b. The mean over the tokens of a minibatch is taken.

    Two points follow the published code, not the paper's equations: R_t includes the reward of its own token, and
    KL(q, p), the single-step term, has no importance weight. One point differs from the published code: advantages are
    normalized over the tokens alone. The published code also counts the zeros of the padding, so its mean and variance
    depend on the amount of padding.

    The published code trains without dropout, because q_old has none: set student.dropout to 0.
    """

    pretrain_needs_teacher = True
    generators = ("student", "teacher")

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for fewer rollouts than a minibatch, and where another loss or sampling is asked for."""
        self.settings, self.batch_size, self.seed = config.minillm, config.train.batch_size, config.run.seed
        self.max_concurrent_responses = self.settings.rollouts
        if self.settings.rollouts < self.batch_size:
            raise ConfigError(
                f"minillm.rollouts is {self.settings.rollouts}, but a step takes train.batch_size = {self.batch_size} "
                "of them; raise the first or lower the second"
            )
        for key, value in NEEDED.items():
            if (given := operator.attrgetter(key)(config)) != value:
                raise ConfigError(
                    f"{key} is {given}, but minillm needs {value}: it lowers the reverse KL divergence between the "
                    "models' own probabilities"
                )
        self.rollouts: list[dict] = []
        self._clear()

    def _clear(self) -> None:
        self.tokens, self.reward = 0, 0.0
        self.sums = torch.zeros(3, dtype=torch.float64)  # KL(q, p), clipped tokens, all tokens: of finite batches

    def check_rows(self, num_rows: int) -> None:
        """Raises ConfigError where the data have fewer prompts than a round."""
        if num_rows < self.settings.rollouts:
            raise ConfigError(
                f"minillm.rollouts is {self.settings.rollouts}, but data.train has {num_rows} rows that fit; lower it"
            )

    def select_batch(self, step: int, progress: float, samples: list[dict], rollouts: Rollouts) -> list[dict]:
        """The minibatch of a step, with its advantages. The first step of a round generates."""
        minibatches = self.settings.rollouts // self.batch_size
        epoch, place = divmod(step, minibatches)
        turn, inner_epoch = divmod(epoch, self.settings.inner_epochs)
        if inner_epoch == place == 0:
            prompts = rollouts.prompts(self.settings.rollouts, turn)
            written = rollouts.write_mixed(prompts, step, self.settings.teacher_weight)
            self.rollouts = [self._scored(rollout) for rollout in written]
        rows = shuffled_batches(self.settings.rollouts, self.batch_size, self.seed, epoch)[place]
        batch = [self.rollouts[row] for row in rows]
        returns = np.concatenate([sample["returns"] for sample in batch])
        mean, deviation = returns.mean(), math.sqrt(returns.var() + 1e-8)
        for sample in batch:
            sample["advantages"] = ((np.array(sample["returns"]) - mean) / deviation).tolist()
        self.tokens += len(returns)
        self.reward += sum(sample["reward"] for sample in batch)
        return batch

    def _scored(self, rollout: dict) -> dict:
        """A training sample: log b and the return of each token, and the sum of the rewards.

        This runs on the host, where sampling leaves its numbers. It takes milliseconds a round.
        """
        settings = self.settings
        rewards, log_probs = [], []
        for ours, theirs in zip(rollout["student_log_probs"], rollout["teacher_log_probs"], strict=True):
            reward = (theirs - ours) / settings.reward_scale
            rewards.append(max(-settings.clip_reward, min(settings.clip_reward, reward)))
            mixed = (1 - settings.teacher_weight) * math.exp(ours) + settings.teacher_weight * math.exp(theirs)
            log_probs.append(math.log(mixed))
        sums = itertools.accumulate(reversed(rewards), lambda later, reward: reward + settings.gamma * later)
        returns = [total / count for count, total in enumerate(sums, 1)][::-1]
        kept = {name: value for name, value in rollout.items() if not name.endswith("_log_probs")}
        return {**kept, "log_probs": log_probs, "returns": returns, "reward": sum(rewards)}

    def loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        device = student.hidden.device
        advantages, log_probs = (
            _on_device(torch.tensor([x for sample in batch.samples for x in sample[name]], dtype=torch.float64), device)
            for name in ("advantages", "log_probs")
        )  # [N] each
        total, divergences, ratios = fused_linear_policy_gradient(
            **student.arguments("student"),
            **teacher.arguments("teacher"),
            labels=batch.labels,
            advantages=advantages,
            log_probs=log_probs,
            clip_ratio=self.settings.clip_ratio,
            scale=batch.loss_scale,
        )
        clipped = is_clipped(ratios, advantages, self.settings.clip_ratio)
        counted = torch.stack([divergences, clipped, torch.ones_like(ratios)]).sum(1, dtype=torch.float64)
        self.sums = _on_device(self.sums, device) + torch.where(total.detach().isfinite(), counted, 0.0)
        return total

    def pretrain_loss(self, student: LinearHead, batch: Batch, teacher: LinearHead | None) -> Tensor:
        """(1 - text_kd) cross-entropy + text_kd KL(p, q), summed over the labels of plain text."""
        return fused_linear_divergence(
            **student.arguments("student"),
            **teacher.arguments("teacher"),
            divergence=ForwardKL(),
            labels=batch.labels,
            hard_weight=1 - self.settings.text_kd,
            reduction="sum",
            scale=batch.loss_scale,
        )

    def metrics(self) -> dict[str, float]:
        """Means over the tokens trained on since the last call. Collective."""
        sums = distributed.all_reduce_sum(self.sums)
        divergence, clipped, _ = (sums / sums[2].clamp(min=1)).tolist()
        numbers = {"reward": self.reward / self.tokens, "reverse_kl": divergence, "clip_share": clipped}
        self._clear()
        return numbers

    def state_dict(self) -> dict:
        """The round's rollouts and the sums for the log. Collective.

        The teacher's hidden states and the advantages are left out: they are computed again. The position in the round
        and the order of its epochs follow from the step.
        """
        computed = ("hidden_states", "advantages")
        rollouts = [{name: x for name, x in rollout.items() if name not in computed} for rollout in self.rollouts]
        sums = distributed.all_reduce_sum(self.sums.clone()).tolist()
        return {"rollouts": rollouts, "tokens": self.tokens, "reward": self.reward, "sums": sums}

    def load_state_dict(self, state: dict) -> None:
        self.rollouts, self.tokens, self.reward = state["rollouts"], state["tokens"], state["reward"]
        if distributed.is_rank0():  # the saved sums are those of all ranks
            self.sums = torch.tensor(state["sums"], dtype=torch.float64)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A GPU copies from page-locked memory, for which the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
