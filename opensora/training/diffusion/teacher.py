"""A trained model whose answers are learnt in place of the clips (distillation).

What a network should say of noisy latents is the mean of all clips that they may have been. A clip is one of those, so
most of a step's gradient is chance; a teacher has learnt the mean, and what it says of the same latents has none. That
helps where a difference between captions is small beside that chance, and it lets one noise process learn from another.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from opensora.checkpoints.source import find_part
from opensora.denoiser import predict
from opensora.diffusion import flow
from opensora.diffusion.process import NoiseProcess, RectifiedFlowProcess
from opensora.errors import OpenSoraError
from opensora.models.schedulers.base import process_of
from opensora.models.text.conditioner import TextConditioner, TextTokens
from opensora.training.diffusion.batch import DiffusionBatch
from opensora.training.parts import META, Origin, build_part


class Teacher:
    """A model of rectified flow that reads the captions as the trained one does.

    Args:
        origin: a model's name, or a pipeline's folder.
        trains_text: whether captions come as tokens, which the teacher's own encoder then reads; states of a frozen
            encoder are read as they are.
        device: where it goes.
        dtype: precision of its weights.

    Attributes:
        networks: its transformer, and its text encoder where that is needed.

    Raises:
        OpenSoraError: a model of another noise process.
    """

    def __init__(self, origin: Origin, *, trains_text: bool, device: str, dtype: torch.dtype) -> None:
        process = process_of(find_part(origin, "scheduler", on_disk=device != META).load_settings())
        if not isinstance(process, RectifiedFlowProcess):
            raise OpenSoraError(
                f"objective.teacher {origin} was trained with IDDPM; a teacher is a model of rectified flow"
            )
        self.process = process
        self.transformer = build_part(origin, "transformer", device, dtype)
        self.networks = nn.ModuleDict({"transformer": self.transformer})
        self.conditioner: TextConditioner | None = None
        if trains_text:
            self.networks["text_encoder"] = build_part(origin, "text_encoder", device, dtype)
            components = {"text_encoder": self.networks["text_encoder"], "tokenizer": None}
            self.conditioner = self.transformer.text_conditioner(components, self.transformer)

    @torch.no_grad()
    def answer(self, noisy: Tensor, process: NoiseProcess, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
        """What noisy latents are of: clean latents and noise whose mixture they are.

        Args:
            noisy: (B, C, T, h, w), corrupted by `process`.
            process: whose latents and times they are. Its path is the teacher's but for a factor: latents of the same
                ratio of signal to noise differ by it alone.
            batch: that they were made of.
        """
        signal, noise = (rate.view(-1, 1, 1, 1, 1) for rate in process.rates(batch.t))
        t = noise / (signal + noise)
        latents = noisy / (signal + noise)
        if batch.frame_mask is not None:  # a flow sees its conditioning frames clean
            latents = torch.where(batch.frame_mask[:, None, :, None, None], latents, batch.clips.latents)
        text = batch.text
        if isinstance(text, TextTokens):
            assert self.conditioner is not None
            text = self.conditioner.encode_tokens(text)
        prediction = predict(
            self.transformer,
            latents,
            t.flatten() * self.process.num_train_timesteps,
            replace(text, dropped=batch.drop_text),
            batch.clips.conditions,
            batch.frame_mask,
            batch.channels,
        )
        velocity = flow.towards_data(prediction[:, : noisy.shape[1]], self.process.velocity)
        return flow.ends_of_line(latents, velocity, t.flatten())
