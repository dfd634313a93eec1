"""Derivatives beyond a first backward pass: right in the PyTorch scan, right or refused in the Triton kernels."""

import pytest
import torch
from kernel_checks import DEVICE, OPTIONS, make_inputs, needs_triton, seeded
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from mamba_ginr.kernels import add_norm, causal_conv, mamba_inner, mlp, reorder, selective_scan
from mamba_ginr.kernels.selective_scan.reference import reference


def scan(*inputs, bidirectional=False):
    return selective_scan(*inputs, delta_softplus=True, bidirectional=bidirectional, backend="torch")


def truth(*inputs):
    return reference(*inputs, delta_softplus=True)


def largest_error(values, truths) -> float:
    pairs = list(zip(tree_leaves(values), tree_leaves(truths), strict=True))
    assert pairs
    return max((value - true).abs().max().item() for value, true in pairs)


def small_inputs(directions: int, length: int = 3) -> tuple:
    inputs = make_inputs(length, OPTIONS["all"], torch.float64, 1, 1, 2, directions=directions)
    return tuple(inputs.values())


def test_second_derivatives_by_finite_differences():
    # 18 steps: the state passes from chunk to chunk.
    inputs = make_inputs(18, (), torch.float64, 1, 1, 1)
    assert torch.autograd.gradgradcheck(lambda *a: selective_scan(*a, backend="torch"), tuple(inputs.values())[:5])


@pytest.mark.parametrize("directions", [1, 2])
def test_grad_of_grad_is_that_of_the_recurrence(directions):
    # y.sum() is linear in y: what was lost without an error went through the scan's inputs alone.
    results = []
    for function in (lambda *a: scan(*a, bidirectional=directions == 2), truth):
        inputs = small_inputs(directions)
        gradients = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    assert largest_error(*results) < 1e-9


TRANSFORMS = {
    "grad": lambda f, which: torch.func.grad(f, which),
    "jacfwd": lambda f, which: torch.func.jacfwd(f, which),
    "hessian, forward over reverse": lambda f, which: torch.func.hessian(f, which),
    "reverse over reverse": lambda f, which: torch.func.jacrev(torch.func.jacrev(f, which), which),
    "reverse over forward": lambda f, which: torch.func.jacrev(torch.func.jacfwd(f, which), which),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of PyTorch's own
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_through_the_scan(transform):
    inputs = tuple(t.detach() for t in small_inputs(2))
    which = tuple(range(len(inputs)))
    of_scan = TRANSFORMS[transform](lambda *a: scan(*a, bidirectional=True).sin().sum(), which)(*inputs)
    kind = "jacobian" if transform in ("grad", "jacfwd") else "hessian"
    exact = getattr(torch.autograd.functional, kind)(lambda *a: truth(*a).sin().sum(), inputs)
    assert largest_error(of_scan, exact) < 1e-9


def test_forward_mode_and_gradients_of_many_losses_at_once():
    inputs = small_inputs(1)
    assert torch.autograd.gradcheck(scan, inputs, check_forward_ad=True, check_batched_grad=True)


def test_gradients_of_each_sample_by_vmap():
    model = torch.nn.Linear(3, 3, dtype=torch.float64)
    u, A, B = seeded(4, 1, 5, 3), -seeded(3, 2).exp(), seeded(4, 1, 5, 2)

    def loss(parameters, u, B):
        x = torch.func.functional_call(model, parameters, u)
        return scan(x, x, A, B, B, None, None, None).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    together = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, u, B)
    one_by_one = [torch.autograd.grad(loss(dict(model.named_parameters()), *s), model.parameters()) for s in zip(u, B)]
    assert largest_error(list(together.values()), [torch.stack(g) for g in zip(*one_by_one)]) < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule of its own for addcmul_
def test_vmap_over_a_first_backward_pass():
    """Under no_grad, where the backward in chunks is what vmap maps over."""
    inputs = tuple(t.detach() for t in small_inputs(1, length=40))
    us = seeded(3, *inputs[0].shape)
    with torch.no_grad():
        mapped, single = (
            m(lambda u: torch.func.vjp(lambda u: scan(u, *inputs[1:]), u)[1](torch.ones_like(u))[0])(us)
            for m in (torch.vmap, lambda f: lambda us: torch.stack([f(u) for u in us]))
        )
    assert largest_error(mapped, single) < 1e-12


@pytest.mark.parametrize(("batch", "d_state"), [(2, 4), (3, 16)])
def test_lengths_around_a_chunk_in_float64(batch, d_state):
    for length in (1, 16, 17, 32, 33, 70):
        inputs = make_inputs(length, OPTIONS["all"], torch.float64, batch, 5, d_state)
        pairs = []
        for function in (scan, truth):
            y = function(*inputs.values())
            pairs.append((y.detach(), *torch.autograd.grad(y.sin().sum(), list(inputs.values()))))
        assert largest_error(*pairs) < 1e-9


def test_vmap_over_each_input_alone_and_over_all():
    inputs = [torch.stack([t.detach(), 1.1 * t.detach()]) for t in small_inputs(1)]
    for mapped in (*range(len(inputs)), None):
        axes = tuple(0 if mapped in (i, None) else None for i in range(len(inputs)))
        given = [t if axis == 0 else t[0] for t, axis in zip(inputs, axes)]
        expected = [truth(*(t[i] if axis == 0 else t for t, axis in zip(given, axes))) for i in range(2)]
        assert largest_error(torch.vmap(scan, axes)(*given), torch.stack(expected)) < 1e-12


def test_reorder_in_every_mode():
    order, x = torch.tensor([2, 0, 3, 1]), seeded(2, 4, 3).requires_grad_()
    inverse = order.argsort()
    moved = lambda x: reorder(x, order, inverse).sin()  # noqa: E731
    assert torch.autograd.gradcheck(moved, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(moved, x)
    hessian = torch.func.hessian(lambda x: moved(x).sum())(x.detach())
    assert torch.equal(hessian, torch.func.hessian(lambda x: x[:, order].sin().sum())(x.detach()))
    assert torch.equal(torch.vmap(moved)(torch.stack([x, 2 * x])), torch.stack([moved(x), moved(2 * x)]))


def triton_layers() -> dict:
    """Each operator with a Triton kernel as a function of one tensor (1, 4, 2)."""
    one, two = torch.ones(2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    first, second = (torch.nn.Linear(2, 2, device=DEVICE) for _ in range(2))
    norm = torch.nn.LayerNorm(2, device=DEVICE)
    inner = (two, one, torch.ones(5, 2, device=DEVICE), two[:, :1], -two, one, one)

    def in_half(layer):
        def run(x):
            with torch.autocast(DEVICE, torch.float16):
                return layer(x).float()

        return run

    return {
        "selective_scan": lambda x: selective_scan(x, x, -two, x, x, backend="triton"),
        "causal_conv": lambda x: causal_conv(x, two, one, backend="triton"),
        "mamba_inner": lambda x: mamba_inner(torch.cat([x, x], -1), *inner, backend="triton"),
        "mlp": in_half(lambda x: mlp(x, first, second, "gelu")[0]),
        "add_norm": in_half(lambda x: add_norm(x, None, norm)[1]),
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch's own
@needs_triton
@pytest.mark.parametrize("layer", triton_layers())
def test_what_triton_cannot_differentiate_is_refused_and_says_what_can(triton_backend, layer):
    run, x = triton_layers()[layer], seeded(1, 4, 2).float().to(DEVICE).requires_grad_()
    y = run(x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x)  # none of the checks cuts a graph
    assert torch.equal(y, compiled)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, compiled)))
    refused = rf'{layer}: the backend triton has first derivatives .*use_backend\("torch", device\)'
    (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=refused):
        gradient.sum().backward()
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match=refused):
            transform(lambda x: run(x).sum())(x.detach())
    with pytest.raises(RuntimeError, match=refused), forward_ad.dual_level():  # its tangent was lost without an error
        run(forward_ad.make_dual(x.detach(), x.detach()))
    if layer == "selective_scan":
        assert torch.equal(torch.vmap(run)(x.detach()[None])[0], run(x.detach()))
