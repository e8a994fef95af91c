"""The output head in chunks of positions: losses with their gradients, log-probs and top-k.

A row of logits has 151,936 numbers, so 4,096 positions would take 2.5 GB, and the loss several times that. Departure
from the released code: only one chunk of logits exists at a time, and prompt positions never reach the head.

Shapes: N counted positions, C of them in a chunk, H hidden size, V ids.
"""
import torch

from data.groups import attention_mask

CHUNK = 256  # positions at a time
GPU_CHUNK = 2048  # fewer products, each large enough for a GPU; 1.2 GB of float32 logits
WEIGHT_BLOCK = 4096  # rows of the head in one product of its gradient, which then fits the processor's cache


class WithGradients(torch.autograd.Function):
    """Hands autograd the gradients of a total that `head_loss` has computed already."""

    @staticmethod
    def forward(ctx, total, hidden, weight, *gradients):
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_weight = ctx.saved_tensors
        if d_total.is_cuda or d_total != 1:  # it is 1 as a rule; on a CPU, a copy of d_weight takes long
            d_hidden, d_weight = d_hidden * d_total, d_weight * d_total
        return None, d_hidden, d_weight, None, None  # one for each argument of `forward`


def head_loss(hidden, weight, token_weights, loss, *tensors,
              vocab_size=None, chunk=None, dtype=None):
    """Apply the output head and a loss without ever holding all logits.

    hidden: [N, H]
    weight: [rows, H], the output head; rows >= V
    token_weights: [N], the factor of each position's loss
    loss: a function (logits [C, V], *slices [C, ...]) -> (losses [C], {name: [C]}) of a chunk of positions
    tensors: [N, ...] each, or None; the loss is given the chunk's slice of every one
    vocab_size: V, the ids to use; default: all rows. (The backward pass of a slice would copy the whole gradient.)
    chunk: positions at a time; default: CHUNK or GPU_CHUNK
    dtype: of the matrix products; default: hidden's

    Returns (sum of token_weights x losses, {name: sum over positions}).

    >>> hidden = torch.ones(3, 2)
    >>> weight = torch.tensor([[1., 0], [0, 1], [1, 1]])
    >>> nll = lambda logits, target: (logits.logsumexp(-1) - logits.gather(-1, target[:, None])[:, 0], {})
    >>> head_loss(hidden, weight, torch.full((3,), 1 / 3), nll, torch.tensor([2, 2, 2]), chunk=2)[0]
    tensor(0.5514)
    """
    dtype = dtype or hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)  # logits and sums: float32, or float64 in tests
    x = hidden.detach().to(dtype)  # [N, H]
    w = weight.detach()[:vocab_size].to(dtype)  # [V, H]
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if needs_grad:
        d_hidden = torch.zeros_like(hidden, dtype=wide)  # [N, H]
        d_weight = torch.zeros_like(weight, dtype=wide)  # [rows, H]; 0 from row V on
    total = torch.zeros((), dtype=wide, device=hidden.device)
    sums = {}
    weight_block = len(w) if w.is_cuda else WEIGHT_BLOCK
    for rows, logits in logits_in_chunks(x, w, chunk):
        logits.requires_grad_(needs_grad)  # [C, V]
        slices = [None if tensor is None else tensor[rows] for tensor in tensors]  # [C, ...] each
        losses, stats = loss(logits, *slices)  # [C], {name: [C]}
        total += losses.detach() @ token_weights[rows]
        for name, values in stats.items():
            sums[name] = sums.get(name, 0) + values.detach().sum()
        if needs_grad:
            [d_logits] = torch.autograd.grad(losses, logits, token_weights[rows])  # [C, V]
            del logits, losses, stats  # the logits and their log-probs, [C, V] each
            d_logits = d_logits.to(dtype)
            d_hidden[rows] = d_logits @ w
            for d_block, part in zip(d_weight[:len(w)].split(weight_block), d_logits.split(weight_block, dim=1)):
                if dtype == wide:
                    d_block.addmm_(part.T, x[rows])  # [block, H]; adds within the product
                else:
                    d_block += part.T @ x[rows]
    if needs_grad:
        gradients = d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)
        total = WithGradients.apply(total, hidden, weight, *gradients)
    return total, sums


def logits_in_chunks(hidden, weight, chunk=None):
    """Yield (rows, logits [C, V] of these rows) of hidden [N, H] x weight^T; in float32, or in tests float64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    chunk = chunk or (GPU_CHUNK if hidden.is_cuda else CHUNK)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        yield rows, (hidden[rows] @ weight.T).to(wide)


@torch.no_grad()
def topk_log_probs(hidden, weight, k, uniform=None, chunk=None):  # [N, H], [V, H]
    """The k most likely tokens at each position: ids [N, k] int64, log-probs [N, k] float32 of the softmax over all V,
    in descending order.

    uniform: [N, k] random numbers in [0, 1): draw k tokens by these instead, with replacement; the values are then
        log(times drawn / k)
    """
    parts = []
    for rows, logits in logits_in_chunks(hidden, weight, chunk):
        log_probs = logits.float().log_softmax(-1)  # [C, V]
        del logits  # on a GPU, 1.2 GB
        if uniform is None:
            values, tokens = log_probs.topk(k, dim=-1)  # [C, k]
        else:
            tokens, _ = inverse_transform(log_probs.exp(), uniform[rows])  # [C, k]
            ones = torch.ones_like(tokens, dtype=log_probs.dtype)
            counts = torch.zeros_like(log_probs).scatter_add(-1, tokens, ones)  # [C, V]
            values = (counts.gather(-1, tokens) / k).log()  # [C, k]
        parts.append((tokens, values))
    return tuple(map(torch.cat, zip(*parts)))  # ids, log-probs


def inverse_transform(probs, uniform):  # [R, V], [R, n] -> ids [R, n], whole mass [R, 1]
    """Inverse transform sampling: the first id whose cumulative mass exceeds uniform (in [0, 1)) x the whole mass."""
    wide = torch.float32 if probs.device.type == "mps" else torch.float64  # mps has no float64
    mass = probs.cumsum(-1, dtype=wide)  # [R, V]
    total = mass[:, -1:]  # [R, 1]
    ids = torch.searchsorted(mass, uniform.to(wide) * total, right=True)  # [R, n]
    return ids.clamp(max=probs.shape[-1] - 1), total  # in float32, rounding may lead past the last id


@torch.no_grad()
def entropy(log_p):
    """Entropy in nats: log-probs [C, V] -> [C]."""
    return -log_p.exp().mul_(log_p).sum(-1)


def counted_states(model, packed, dtype):
    """The hidden states [N, H] that predict a packed batch's counted tokens; matrix products in `dtype`."""
    device = packed["targets"].device
    mask = attention_mask(packed, blocks=model.model.compiled)  # compiled layers use flex_attention
    with torch.autocast(device.type, dtype, enabled=dtype.itemsize < 4):  # not for float32, or float64 in tests
        hidden = model.hidden_states(packed["input_ids"], packed["positions"], mask)  # [B, T, H]
    return hidden.flatten(0, 1).index_select(0, packed["logit_positions"])  # [N, H]
