"""What every scheduler of this package has in common: a diffusers scheduler that can also say what it is made for.

A scheduler is asked, never looked at: how its models were trained, which channels they are guided on, how else they can
be sampled.

All that a run leaves in a scheduler is assigned anew and never changed in place, so a copy is cheap (it shares the
tables) and independent: a run in one does not disturb a run in the other.
"""

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from opensora.diffusion.process import NoiseProcess
from opensora.errors import OpenSoraError
from opensora.models.schedulers import SAMPLERS
from opensora.settings import expected_one_of


class Scheduler(SchedulerMixin, ConfigMixin):
    """A way to sample the networks of Open-Sora.

    Attributes:
        samplers: names of the ways to sample that this class is, each with the configuration it needs.
        guides_all_channels: whether all channels are guided, whatever the model's other samplers guide.
        num_train_timesteps: N, the length of the schedule that networks are trained on.
    """

    order = 1
    init_noise_sigma = 1.0
    samplers: ClassVar[Mapping[str, dict[str, Any]]] = {}
    guides_all_channels: ClassVar[bool] = False
    num_train_timesteps: int
    _begin_index: int | None = None
    _step_index: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

    def __len__(self) -> int:
        return self.num_train_timesteps

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Classes that take this one's configuration: diffusers' hook, which looks for them in diffusers alone."""
        paths = (path.rsplit(".", 1) for path in cls._compatibles)
        return [getattr(importlib.import_module(module), name) for module, name in paths]

    @property
    def begin_index(self) -> int | None:
        """The step that the run begins with, as :meth:`set_begin_index` said; ``None`` for the first."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The step that comes next; ``None`` before the run's first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say that the run begins later than with the first timestep, as one from a noised video does.

        Args:
            begin_index: of the first timestep that is visited.
        """
        self._begin_index = begin_index

    def _begin_run(self) -> None:
        self._begin_index = self._step_index = None

    def _is_first(self, index: int) -> bool:
        """Whether nothing came before this step of the run."""
        return index == (self._begin_index or 0)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """Return ``sample``: the network takes it as it is."""
        return sample

    def default_cfg_channels(self, latent_channels: int) -> int | None:
        """How many of the first latent channels a model is guided on that does not say; ``None`` for all."""
        return None

    def noise_process(self) -> NoiseProcess:
        """See :func:`process_of`."""
        raise OpenSoraError(
            f"nothing is trained with a {type(self).__name__}; expected a RectifiedFlowScheduler or an IDDPMScheduler"
        )

    def with_sampler(self, name: str) -> "Scheduler":
        """Another way to sample the same model.

        Args:
            name: ``"ancestral"`` (IDDPM), ``"ddim"`` or ``"dpm-solver++"``.

        Raises:
            OpenSoraError: an unknown name, or a model of rectified flow, which has one sampler only.
        """
        if name not in SAMPLERS:
            raise OpenSoraError(f"unknown sampler {name!r}; {expected_one_of(name, SAMPLERS)}")
        for kind in self.compatibles:
            if name in kind.samplers:
                return cast(Scheduler, kind.from_config(self.config, **kind.samplers[name]))
        raise OpenSoraError(
            f"the sampler {name} is for models that predict noise; this one has a {type(self).__name__}"
        )

    def with_time_shift(self, shift: float) -> "Scheduler":
        """The same model sampled with its times shifted.

        Raises:
            OpenSoraError: a model that is none of rectified flow, or a number that shifts nothing.
        """
        raise OpenSoraError(f"a time shift is for models of rectified flow; this one has a {type(self).__name__}")


def check_schedule(
    name: str, schedule: Sequence[float] | torch.Tensor, num_inference_steps: Any, *, expected: str, allowed: bool
) -> None:
    """Refuse a schedule of the caller's own.

    Args:
        name: of the argument.
        schedule: its values.
        num_inference_steps: must be ``None``: a schedule says itself how many steps it has.
        expected: what values it may have, in words.
        allowed: whether it has such values.

    Raises:
        OpenSoraError: values that are not allowed, none, not strictly descending ones, or a number of steps as well.
    """
    values = torch.as_tensor(schedule).double()
    if num_inference_steps is not None:
        raise OpenSoraError(f"got num_inference_steps={num_inference_steps!r} and {name}; give one of them")
    if not (allowed and values.ndim == 1 and len(values) and bool((values.diff() < 0).all())):
        raise OpenSoraError(f"got {name}={values.tolist()}; expected strictly descending {expected}")


def process_of(scheduler: Any) -> NoiseProcess:
    """How the networks that a scheduler samples are trained.

    Raises:
        OpenSoraError: a scheduler that nothing is trained with, or of another library.
    """
    check_scheduler(scheduler)
    return scheduler.noise_process()


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler of another library, which would walk the wrong way or fail in the middle of a run.

    Raises:
        OpenSoraError: not a :class:`Scheduler`.
    """
    if not isinstance(scheduler, Scheduler):
        raise OpenSoraError(
            f"got a {type(scheduler).__name__} as scheduler; expected RectifiedFlowScheduler for networks that predict "
            "the velocity x - e towards the data (diffusers' flow schedulers expect its negative, e - x), "
            "IDDPMScheduler or DPMSolverScheduler for those that predict noise"
        )
