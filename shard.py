"""A model sharded over several ranks by torch's FSDP2 (`fully_shard`). With one process, nothing here changes anything.

A rank keeps some rows of every weight, of its gradient and of the optimiser's moments. The weights of a layer are
gathered while it computes; gradients are summed over the ranks, and each rank keeps its rows of the sum. Forward and
backward passes and `whole` are collective: all ranks must call them in the same order, or the others wait forever.
"""
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


def shard_model(model, mesh, dtype):
    """Shard a Transformer in place. If it is on the meta device, without weights, no rank ever holds them all.

    mesh: the DeviceMesh of all ranks, [ranks of a copy], or [copies, ranks of a copy]
    dtype: of gathered weights, so of all products; gradients are summed in float32 (in float64 in tests)
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    # By default the cosines and sines that go into a layer would be cast too.
    policy = MixedPrecisionPolicy(dtype, torch.promote_types(dtype, torch.float32), cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # By default FSDP averages gradients, but the loss is already divided by the tokens of all ranks.
        module.set_gradient_divide_factor(1.0)  # of this module, not of its submodules
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    # The loops call this, not forward. The root (embedding, norm and head) stays gathered after it: `head_weight` is
    # then a whole tensor, as the chunked head needs it, and its gradient is summed with the embedding's.
    register_fsdp_forward_method(model, "hidden_states")


def part_of(tensor, p):
    """This rank's part of a whole tensor, if the parameter p is sharded; otherwise the tensor itself."""
    if not hasattr(p, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow to import, so not for one process
    # src_data_rank None: each rank has the tensor, so nothing is sent. The part is a copy: the tensor can be freed.
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def whole(tensor):
    """The whole tensor, on every rank, of a sharded one; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parameters(model):
    """{name: parameter} of the model being trained, which must be sharded if there are several ranks."""
    if hasattr(model, "reshard"):
        model.reshard()  # a forward pass without gradients leaves the root gathered, in --dtype
    named = dict(model.named_parameters())
    sharded = all(hasattr(p, "placements") for p in named.values())
    assert sharded or world_size() == 1, "a model that is not sharded"
    return named
