"""A model in parts, one on each rank: torch's FSDP2 (`fully_shard`). One process holds the whole, and nothing here acts.

A rank keeps its rows of every weight, of the gradient and of the moments. The weights of a layer are gathered when it
computes and freed behind it; its gradients are summed over the ranks, and each rank keeps its rows of the sum.

    shard_model   put a model in parts
    part_of       a whole tensor -> the part of it that this rank keeps
    whole         a part -> the whole tensor
    gather        many parts -> whole tensors on rank 0, one at a time
    parameters    what the optimiser changes and a checkpoint holds

`whole` and `gather` are collective: every rank must call them, or the others wait forever.
"""
from functools import cache

import torch
import torch.distributed as dist


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_ranks():
    """Wait for all ranks: a process that leaves early may be aborted while another one still writes."""
    if dist.is_initialized():
        dist.barrier()


@cache  # student, teacher and reference share it
def mesh(device_type, ranks):
    """Shard over `ranks` ranks, which are neighbours; replicate over the rest, if there are more."""
    from torch.distributed.device_mesh import init_device_mesh  # takes a second, which one process does not need
    shape = (world_size() // ranks, ranks) if ranks < world_size() else (ranks,)
    return init_device_mesh(device_type, shape)


def shard_model(model, ranks, device, dtype):
    """Put a Transformer in parts, in place, over `ranks` ranks. One on the meta device has no weights yet.

    dtype: of the gathered weights, thus of all products; gradients are summed in float32 (or float64 in tests)
    """
    if world_size() == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    # Without the last flag, the cosines and sines that a layer is given would be cast too.
    policy = MixedPrecisionPolicy(dtype, torch.promote_types(dtype, torch.float32), cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh(device.type, ranks), mp_policy=policy)
        # By default gradients are averaged, but the loss is divided by the tokens of all ranks already. Neither setting
        # reaches the modules inside, and without the second the sum is a scaled one, which gloo does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The loop calls this, not forward. The root, that is embedding, norm and head, stays gathered behind it, so the
    # chunked head finds `head_weight` whole, and its gradient is summed with the embedding's at the end of backward.
    register_fsdp_forward_method(model, "hidden_states")


def is_sharded(model):
    """Whether `shard_model` has put this model in parts."""
    return hasattr(model, "reshard")


def part_of(tensor, p):
    """This rank's part of a whole tensor, in parts as the parameter p is; the tensor itself if p is whole."""
    if not hasattr(p, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # None: nothing is sent, as every rank has read the tensor. A clone: the part is a view that would keep the whole.
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None).clone()


def whole(tensor):
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(tensors, dtype=None):
    """{name: tensor} as whole tensors in host memory on rank 0, {} on other ranks. A GPU holds one of them at a time.

    dtype: to cast them to
    """
    gathered = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach().to(dtype or tensor.dtype))
        if rank() == 0:
            gathered[name] = tensor.cpu()
    return gathered


def parameters(model):
    """{name: parameter} of the model that trains, with several ranks all in parts."""
    if is_sharded(model):
        model.reshard()  # after a forward pass without gradients the root is still whole, in --dtype
    named = dict(model.named_parameters())
    in_parts = all(hasattr(p, "placements") for p in named.values())
    assert in_parts or world_size() == 1, "a model that is not in parts trains on the gradients of its own rank only"
    return named
