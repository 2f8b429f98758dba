"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): the reverse KL divergence of whole responses, by policy gradient."""

from __future__ import annotations

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
from .rollouts import Rollouts

# Rewards, importance weights and what is trained are the same probabilities, those that are sampled from.
NEEDED = {
    "loss": "rkl",
    "temperature": 1,
    "hard_weight": 0,
    "sampling.temperature": 1,
    "sampling.top_k": 0,
    "sampling.top_p": 1,
}


class MiniLLM:
    """Rounds of rollouts, each trained on for a few epochs and then discarded.

    With teacher p, student q, and q_old the student that wrote: tokens y_t come from b = (1 - a) q_old + a p. Their
    rewards are r_t = clip((log p - log q_old) / scale, -c, c), their returns R_t = sum_k>=t gamma^(k-t) r_k over the
    number of tokens from t on, and a minibatch normalizes those to advantages A_t. A token's loss is
    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + KL(q, p), rho = w q / q_old with the importance weight w = q_old / b:
    rho = q / b. The mean over the tokens of a minibatch is taken.

    As in the published code, and unlike the paper's equations, R_t has the reward of its own token, and KL(q, p), the
    single-step term, no importance weight. Unlike there, advantages are normalized over the tokens alone: the published
    code counts the zeros of the padding too, so that mean and variance depend on how much of that there is.

    The published code trains without dropout, as q_old has none: set student.dropout to 0.
    """

    needs_teacher = True
    off_policy_fraction = 0.0
    generators = ("student", "teacher")

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for rollouts that give no minibatch, and where another loss or sampling is asked for."""
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
        self.sums = torch.zeros(3, dtype=torch.float64)  # of KL(q, p), clipped tokens and all tokens, where finite

    def check_rows(self, rows: int) -> None:
        """Raises ConfigError where the data have fewer prompts than a round."""
        if rows < self.settings.rollouts:
            raise ConfigError(
                f"minillm.rollouts is {self.settings.rollouts}, but data.train has {rows} rows that fit; lower it"
            )

    def select_batch(self, step: int, progress: float, samples: list[dict], rollouts: Rollouts) -> list[dict]:
        """The minibatch of a step, counted from 0, with its advantages; the first of a round generates."""
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
        """A training sample: log b and return of each token, and the sum of the rewards.

        On the host, where sampling leaves its numbers: that takes milliseconds a round.
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

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, teacher: LinearHead) -> Tensor:
        """The summed loss of the response tokens, from their hidden states [N, H]."""
        advantages, log_probs = (
            torch.tensor([x for sample in batch.samples for x in sample[name]], dtype=torch.float64).to(
                hidden.device, non_blocking=True
            )
            for name in ("advantages", "log_probs")
        )  # [N] each
        total, divergences, ratios = fused_linear_policy_gradient(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            batch.labels,
            advantages,
            log_probs,
            self.settings.clip_ratio,
            student_bias=bias,
            teacher_bias=teacher.bias,
        )
        clipped = is_clipped(ratios, advantages, self.settings.clip_ratio)
        counted = torch.stack([divergences, clipped, torch.ones_like(ratios)]).sum(1, dtype=torch.float64)
        self.sums = self.sums.to(hidden.device) + torch.where(total.detach().isfinite(), counted, 0.0)
        return total

    def pretrain_loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, teacher: LinearHead
    ) -> Tensor:
        """(1 - text_kd) cross-entropy + text_kd KL(p, q), summed over the labels of plain text."""
        return fused_linear_divergence(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            ForwardKL(),
            batch.labels,
            student_bias=bias,
            teacher_bias=teacher.bias,
            hard_weight=1 - self.settings.text_kd,
            reduction="sum",
        )

    def on_eval(self, dev_loss: float) -> None:
        """Nothing depends on it here."""

    def metrics(self) -> dict[str, float]:
        """Means over the tokens trained on since the last call."""
        sums = distributed.all_reduce_sum(self.sums)
        divergence, clipped, _ = (sums / sums[2].clamp(min=1)).tolist()
        numbers = {"reward": self.reward / self.tokens, "reverse_kl": divergence, "clip_share": clipped}
        self._clear()
        return numbers

    def state_dict(self) -> dict:
        """The rollouts of the round without the teacher's states, which are computed again, and the sums of a window.

        Where the round stands, and the order of its epochs, follow from the step.
        """
        made_again = ("states", "advantages")
        rollouts = [{name: x for name, x in rollout.items() if name not in made_again} for rollout in self.rollouts]
        sums = distributed.all_reduce_sum(self.sums.clone()).tolist()
        return {"rollouts": rollouts, "tokens": self.tokens, "reward": self.reward, "sums": sums}

    def load_state_dict(self, state: dict) -> None:
        self.rollouts, self.tokens, self.reward = state["rollouts"], state["tokens"], state["reward"]
        if distributed.is_rank0():  # they are those of all ranks
            self.sums = torch.tensor(state["sums"], dtype=torch.float64)
