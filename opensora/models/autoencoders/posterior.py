"""What an encoder predicts: a diagonal Gaussian over latents of any rank, with the terms its training needs.

Letters: mu mean, s2 variance, z latent, all (B, C, ...).
"""

import math
from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]  # one for all, or one per clip


class Posterior:
    """A Gaussian per latent value.

    Args:
        mean: mu, (B, C, ...).
        logvar: log s2, same shape; held within [-30, 20] so that neither its exponential nor its inverse overflows.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """Splits a network's output (B, 2C, ...) into mean and log-variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    @classmethod
    def cat(cls, parts: Sequence["Posterior"], dim: int) -> "Posterior":
        """Those of pieces, in turn along a dimension, as one."""
        if len(parts) == 1:
            return parts[0]
        mean = torch.cat([part.mean for part in parts], dim=dim)
        if all(isinstance(part, Certain) for part in parts):
            return Certain(mean)
        return cls(mean, torch.cat([part.logvar for part in parts], dim=dim))

    def float(self) -> "Posterior":
        """The same in float32."""
        return Posterior(self.mean.float(), self.logvar.float())

    @property
    def var(self) -> Tensor:
        """Variance, same shape as the mean."""
        return torch.exp(self.logvar)

    @property
    def std(self) -> Tensor:
        """Standard deviation, same shape as the mean."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, generator: Generators | None = None, *, noise: Tensor | None = None) -> Tensor:
        """mu + s * noise, with standard normal `noise` of the mean's shape, drawn from `generator` unless given."""
        if noise is None:
            noise = randn_tensor(self.mean.shape, generator, self.mean.device, self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Divergence from the standard normal, 0.5 * sum(mu^2 + s2 - 1 - log s2), in nats: (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)

    def nll(self, z: Tensor) -> Tensor:
        """Negative log-likelihood of `z` under this Gaussian, summed over all but the batch, in nats: (B,)."""
        terms = math.log(2.0 * math.pi) + self.logvar + (z - self.mean).square() * torch.exp(-self.logvar)
        return 0.5 * terms.flatten(1).sum(dim=1)


class Certain(Posterior):
    """What an encoder without uncertainty predicts: every draw is the mean.

    Args:
        mean: mu, (B, C, ...).
    """

    def __init__(self, mean: Tensor) -> None:
        super().__init__(mean, torch.full_like(mean, -math.inf))

    @property
    def var(self) -> Tensor:
        """0, same shape as the mean."""
        return torch.zeros_like(self.mean)

    @property
    def std(self) -> Tensor:
        """0, same shape as the mean."""
        return torch.zeros_like(self.mean)

    def sample(self, generator: Generators | None = None, *, noise: Tensor | None = None) -> Tensor:
        """The mean, whatever is drawn from."""
        return self.mean

    def kl(self) -> Tensor:
        """0 for every sample, as in diffusers: there is nothing to hold to a standard normal."""
        return self.mean.new_zeros(len(self.mean))
