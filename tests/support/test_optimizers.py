"""Muon against a plain float64 version and PyTorch's own, in float32; what is left out; clipping that adapts."""

import math

import pytest
import torch

from mamba_ginr.optimizers import AdaptiveClip, Muon, orthogonalise

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(8, 16), (16, 8), (8, 16), (8, 8), (6, 20), (1, 5)]


def plain_direction(u):
    """Newton–Schulz as its author wrote it down, one matrix, float64."""
    x = u.double() / u.double().norm()
    x = x.T if len(u) > len(u[0]) else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(u) > len(u[0]) else x


def made(shapes, device="cpu", seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]


def give_gradients(*lists):
    for parameters in zip(*lists):
        gradient = torch.randn(parameters[0].shape)
        for p in parameters:
            p.grad = gradient.to(p.device, p.dtype)


def test_directions_are_those_of_the_plain_iteration():
    torch.manual_seed(0)
    updates = [torch.randn(3, 8, 16), 1e-6 * torch.randn(2, 16, 8), torch.randn(1, 8, 8), 1e4 * torch.randn(2, 6, 20)]
    for update, result in zip(updates, orthogonalise(updates, torch.float32)):
        assert result.shape == update.shape
        for u, r in zip(update, result):
            assert torch.allclose(r.double(), plain_direction(u), atol=1e-5)
            assert 0.6 < torch.linalg.svdvals(r)[0] < 1.3


def test_a_zero_update_stays_zero():
    assert torch.equal(orthogonalise([torch.zeros(1, 4, 6)], torch.float32)[0], torch.zeros(1, 4, 6))


def test_muon_is_the_plain_version():
    ours = made(SHAPES)
    weights, momenta = [p.detach().double() for p in ours], [torch.zeros(s).double() for s in SHAPES]
    optimizer = Muon([{"params": ours, "muon": True}], 1e-2, weight_decay=0.1)
    for _ in range(4):
        give_gradients(ours)
        optimizer.step()
        for i, p in enumerate(ours):
            gradient = p.grad.double()
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            direction = plain_direction(0.05 * gradient + 0.95 * momenta[i])
            weights[i] = (1 - 1e-2 * 0.1) * weights[i] - 1e-2 * 0.2 * math.sqrt(max(p.shape)) * direction
    assert all(torch.allclose(p.double(), w, atol=1e-5) for p, w in zip(ours, weights))


@pytest.mark.parametrize("device", DEVICES)
def test_muon_is_pytorchs(device):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has none")
    ours, theirs = made(SHAPES[:5], device), made(SHAPES[:5], device)
    optimizer = Muon([{"params": ours, "muon": True}], 1e-2, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        give_gradients(ours, theirs)
        optimizer.step(), reference.step()
    # Theirs multiplies in bfloat16, which is off by a hundredth of an update of 0.2 · 4 · 1e-2.
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, theirs))


def test_other_groups_are_adamws():
    vectors, theirs = made([(5,), (7, 3)]), made([(5,), (7, 3)])
    matrices = made(SHAPES, seed=1)
    adamw = {"betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = Muon([{"params": matrices, "muon": True}, {"params": vectors}], 1e-2, 4.0, **adamw)
    reference = torch.optim.AdamW(theirs, 1e-2, **adamw)
    for _ in range(3):
        give_gradients(vectors, theirs), give_gradients(matrices)
        optimizer.step(), reference.step()
    assert all(torch.equal(a, b) for a, b in zip(vectors, theirs))
    assert len(optimizer.param_groups) == 2


def test_a_step_marked_as_faulty_changes_nothing():
    ours = made(SHAPES)
    optimizer = Muon([{"params": ours, "muon": True}], 1e-2, weight_decay=0.1)
    give_gradients(ours)
    optimizer.step()
    before = [p.detach().clone() for p in ours]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    for p in ours:
        p.grad.fill_(math.nan)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(ours, before))
    assert all(torch.equal(s["momentum_buffer"], m) for s, m in zip(optimizer.state.values(), momenta))


def test_a_loaded_state_goes_on_as_it_would_have():
    whole, parts = made(SHAPES), made(SHAPES)
    first, second = (Muon([{"params": p, "muon": True}], 1e-2) for p in (whole, parts))
    torch.manual_seed(1)
    for _ in range(2):
        give_gradients(whole, parts)
        first.step(), second.step()
    resumed = Muon([{"params": parts, "muon": True}], 1e-2)
    resumed.load_state_dict(second.state_dict())
    give_gradients(whole, parts)
    first.step(), resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


def test_what_is_no_matrix_is_named():
    with pytest.raises(
        ValueError, match=r"Muon is for matrices; give parameters of shape \(3, 4, 5\) to another group"
    ):
        Muon([{"params": made([(2, 2), (3, 4, 5)]), "muon": True}], 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_step_follows_its_rate():
    shapes, rate = [(128, 256), (256, 128), (128, 128), (40,)], torch.zeros((), device="cuda")
    captured, eager = made(shapes, "cuda"), made(shapes, "cuda")
    on_gpu = {"fused": True, "capturable": True}
    ours, reference = (
        Muon([{"params": p[:3], "muon": True}, {"params": p[3:]}], lr, 4.0, **on_gpu)
        for p, lr in ((captured, rate), (eager, rate.clone()))
    )
    for p in captured:
        p.grad = torch.zeros_like(p)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours.step()  # at rate 0, to make the optimizer's state
    torch.cuda.synchronize()
    for state in ours.state.values():
        for tensor in state.values():
            tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for lr in (1e-2, 1e-3, 3e-2):
        rate.fill_(lr)
        for group in reference.param_groups:
            group["lr"] = torch.tensor(lr, device="cuda")
        for a, b in zip(captured, eager):
            gradient = torch.randn_like(a)
            a.grad.copy_(gradient)
            b.grad = gradient
        graph.replay()
        reference.step()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(captured, eager))


def test_gradients_are_clipped_at_a_multiple_of_their_usual_norm():
    (parameter,), clip = made([(3, 4)]), AdaptiveClip(2.0, "cpu")

    def clipped(norm):
        parameter.grad = torch.full((3, 4), norm / math.sqrt(12))
        assert clip([parameter]).item() == pytest.approx(norm, rel=1e-5)
        return parameter.grad.norm().item()

    assert clipped(5.0) == pytest.approx(5)  # the first says what is usual
    assert clipped(9.0) == pytest.approx(9)
    usual = clip.usual.item()
    assert usual == pytest.approx(5 + 0.01 * 4)
    assert clipped(1e4) == pytest.approx(2 * usual)
    assert clip.usual.item() == pytest.approx(1.01 * usual)  # it follows what was clipped, not the spike
    usual = clip.usual.item()
    parameter.grad = torch.full((3, 4), math.inf)
    clip([parameter])
    assert clip.usual.item() == usual
    assert torch.isinf(parameter.grad).all()  # as they were


def test_a_closure_comes_before_the_step():
    (parameter,), target = made([(4, 6)]), torch.zeros(4, 6)
    optimizer = Muon([{"params": [parameter], "muon": True}], 1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (parameter - target).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[1]
