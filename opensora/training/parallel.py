"""What happens to a network before it is trained: activation checkpointing, compilation, and its share of the ranks.

All of it is done block by block, on whatever an objective calls its blocks. A block's `forward` is wrapped, first by
checkpointing, then by compilation; sharding (FSDP) gathers the block's weights around that. The objective's losses are
the forward pass of one more module, the root, whose weights are all that are in no block.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from opensora.distributed.mesh import Mesh
from opensora.distributed.shards import whole
from opensora.training.task import TrainingTask

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
    """An objective's losses as a forward pass, so that the weights outside its blocks are gathered for them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, losses: Callable[..., dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
        return losses(*args)


OWN_ATTRIBUTES = "_attributes_before_sharding"  # of a sharded module: the names of all others that it had


def shard(objective: TrainingTask, mesh: Mesh, precision: Literal["fp32", "bf16"]) -> Root:
    """Gives each rank its share of the module's weights.

    Weights, gradients' sums and optimiser state stay float32; with "bf16" they are gathered in bfloat16, which halves
    what is sent.
    """
    assert mesh.weights is not None
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = Root(objective.module)
    for part in (*objective.sharded_parts(), root):
        attributes = frozenset(part.__dict__)
        # A critic's losses use the module without a backward pass, after which the root's weights would stay gathered.
        stay_gathered = part is root and objective.critic is None
        fully_shard(part, mesh=mesh.weights, mp_policy=policy, reshard_after_forward=not stay_gathered)
        part.__dict__[OWN_ATTRIBUTES] = attributes
    return root


class Parallel:
    """A module among the ranks of a run: its losses, its gradients, and all of it in one piece.

    Args:
        objective: what is trained.
        mesh: the ranks.
        sharding: "full" gives each rank a share of the weights, "none" all of them.
        precision: of the computation.
    """

    def __init__(
        self,
        objective: TrainingTask,
        mesh: Mesh,
        sharding: Literal["full", "none"],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.mesh = mesh
        self.root = shard(objective, mesh, precision) if sharding == "full" and mesh.num_ranks > 1 else None

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


@contextlib.contextmanager
def in_one_piece(module: nn.Module, weights: Mapping[str, Tensor], mesh: Mesh) -> Iterator[bool]:
    """Within it the module is an ordinary one with other weights, on the first rank; called by all ranks.

    Args:
        module: sharded or not, compiled or not.
        weights: of its trained parameters, by name; shards are gathered.
        mesh: the ranks.

    Yields:
        Whether this is the rank on which the module may be used.
    """
    with contextlib.ExitStack() as restored:
        restored.callback(mesh.wait)
        for part in module.modules():
            restored.enter_context(as_it_was_built(part))
        replaced: dict[nn.Parameter, nn.Parameter] = {}  # some stand in several places
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            if parameter not in replaced:
                gathered = whole(weights.get(name, parameter).detach())
                replaced[parameter] = nn.Parameter(gathered, parameter.requires_grad) if mesh.is_first else parameter
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            restored.callback(owner._parameters.__setitem__, leaf, parameter)
            owner._parameters[leaf] = replaced[parameter]
        yield mesh.is_first


@contextlib.contextmanager
def as_it_was_built(part: nn.Module) -> Iterator[None]:
    """Within it a module is not sharded, compiled or checkpointed, and can be copied; its parameters stay."""
    kind, attributes = part.__class__, dict(part.__dict__)
    if isinstance(part, FSDPModule):
        part.reshard()
        for name in attributes.keys() - attributes[OWN_ATTRIBUTES]:
            del part.__dict__[name]
        part.__dict__.update(_forward_pre_hooks={}, _forward_hooks={})
        part.__class__ = kind.__bases__[1]  # pyright: ignore[reportAttributeAccessIssue]
    part.__dict__.pop("forward", None)
    try:
        yield
    finally:
        part.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]
        part.__dict__.update({name: value for name, value in attributes.items() if name != "training"})
