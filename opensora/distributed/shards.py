"""Tensors that are spread over ranks (DTensor) and those that are not, handled alike."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def own_part(tensor: Tensor) -> Tensor:
    """What this rank keeps of a tensor, sharing its memory: all of it if the tensor is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded; then every rank makes this call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as `like` is: each rank drops the rest, nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(like.device_mesh, like.placements)
