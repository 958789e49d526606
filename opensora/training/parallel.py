"""What happens to a network before it is trained: activation checkpointing, compilation, and its share of the ranks.

All of it is done block by block, on whatever a task calls its blocks. A block's `forward` is wrapped, first by
checkpointing, then by compilation; sharding (FSDP) gathers the block's weights around that. The task's losses are
the forward pass of one more module, the root, whose weights are all that are in no block.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from opensora.distributed.mesh import Mesh
from opensora.distributed.shards import whole
from opensora.models.int8 import Int8Linear
from opensora.training.task import TrainingSetup

aten = torch.ops.aten
KEPT_RESULTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_to_all_single.default,  # of ranks that share clips: what was sent is not sent again
}
"""Operations whose results selective checkpointing keeps: they cost far more than the rest of a block."""


def keep_costly(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing's answer to each operation."""
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_RESULTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(block: nn.Module, what: Literal["full", "selective"]) -> None:
    """Computes a block again in the backward pass: all of it, or what is cheap."""
    forward = block.forward
    contexts = {}
    if what == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, keep_costly)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    block.forward = recomputed


def wrap_blocks(blocks: Iterable[nn.Module], recompute: Literal["none", "full", "selective"], compiled: bool) -> None:
    """Checkpoints and compiles each block, as the settings say."""
    for block in blocks:
        if recompute != "none":
            checkpoint_activations(block, recompute)
        if compiled:
            block.forward = torch.compile(block.forward)


class Root(nn.Module):
    """A task's losses as a forward pass, so that the weights outside its blocks are gathered for them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, losses: Callable[..., dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        return losses(*args)


def shard(setup: TrainingSetup, mesh: Mesh, precision: Literal["fp32", "bf16"]) -> Root:
    """Gives each rank its share of the module's weights.

    Weights, gradients' sums and optimiser state stay float32; with "bf16" they are gathered in bfloat16, which halves
    what is sent. Weights in eight bits are gathered as they are, and every rank has all their scales.
    """
    assert mesh.weights is not None
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = Root(setup.task.module)
    scales = {m.weight_scale for m in root.modules() if isinstance(m, Int8Linear)}  # few, and would be rounded
    for part in (*setup.partition.gathered, root):
        # A critic's losses use the module without a backward pass, after which the root's weights would stay gathered.
        stay_gathered = part is root and setup.critic is None
        fully_shard(
            part,
            mesh=mesh.weights,
            mp_policy=policy,
            reshard_after_forward=not stay_gathered,
            ignored_params=scales,
        )
    return root


class Parallel:
    """A module among the ranks of a run: its losses, its gradients, and all of it in one piece.

    Args:
        setup: what is trained.
        mesh: the ranks.
        sharding: "full" gives each rank a share of the weights, "none" all of them.
        precision: of the computation.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        mesh: Mesh,
        sharding: Literal["full", "none"],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.mesh = mesh
        self.root = shard(setup, mesh, precision) if sharding == "full" and mesh.num_ranks > 1 else None

    def losses(self, losses: Callable[..., dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        """`losses(*args)`, which may use the module."""
        return losses(*args) if self.root is None else self.root(losses, *args)

    def reduce_next(self, reduce: bool) -> None:
        """Whether gradients of the next backward pass complete the step's, or more are to be added first."""
        if isinstance(self.root, FSDPModule):
            self.root.set_requires_gradient_sync(reduce)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Gradients become their mean over the ranks; sharded ones are already."""
        if self.root is None:
            average_gradients(parameters, self.mesh)


def average_gradients(parameters: list[nn.Parameter], mesh: Mesh, numbers_at_once: int = 2**24) -> None:
    """Replaces gradients of weights that every rank has by their mean over the ranks."""
    if mesh.num_ranks == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # here, but perhaps not on every rank
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    while gradients:
        sizes, taken = [], 0
        for gradient in gradients:
            if taken and taken + gradient.numel() > numbers_at_once:
                break
            taken += gradient.numel()
            sizes.append(gradient.numel())
        some, gradients = gradients[: len(sizes)], gradients[len(sizes) :]
        together = torch.cat([gradient.flatten() for gradient in some])
        dist.all_reduce(together)
        parts = together.div_(mesh.num_ranks).split(sizes)
        torch._foreach_copy_(some, [part.view_as(gradient) for part, gradient in zip(parts, some, strict=True)])


def without_data(module: nn.Module) -> nn.Module:
    """A copy of a module that is not yet wrapped, split or sharded; its parameters have no data."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, empty)


def whole_copy(meta: nn.Module, module: nn.Module, weights: Mapping[str, Tensor], mesh: Mesh) -> nn.Module | None:
    """A module in one piece, in evaluation mode, on the first rank; None on the others. Called by all ranks.

    Args:
        meta: the module before it was wrapped, see `without_data`.
        module: the module, sharded or not, compiled or not.
        weights: to take the place of its trained parameters, by name; shards are gathered.
        mesh: the ranks.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    made = copy.deepcopy(meta) if mesh.is_first else None
    filled: dict[nn.Parameter, nn.Parameter] = {}  # some stand in several places
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter not in filled:
            gathered = whole(weights.get(name, parameter).detach())
            filled[parameter] = nn.Parameter(gathered, parameter.requires_grad) if made is not None else parameter
        if made is not None:
            owner, leaf = _owner(made, name)
            owner._parameters[leaf] = filled[parameter]
    if made is None:
        return None
    for name, buffer in module.named_buffers():
        owner, leaf = _owner(made, name)
        owner._buffers[leaf] = buffer.detach().clone()
    return made.eval()


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part that holds a tensor, and its name there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
