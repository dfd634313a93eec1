"""A training step: loss, optimizer and schedule, the average, compiled in one piece, in a CUDA graph."""

import math

import pytest
import torch

from mamba_ginr.kernels import backends


def test_a_step_that_is_not_finite_changes_nothing(nb, tiny, batch_of):
    model, batch = tiny(dim=128, d_state=2), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), mosaics=2)
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    step(batch, 1e-3)
    before = {name: tensor.clone() for name, tensor in step.tensors().items()}
    spoilt = batch._replace(rgb=batch.rgb * math.inf)  # the finer pixels' loss alone
    assert not torch.isfinite(step(spoilt, 1e-3)).all()
    changed = {n.split(".")[0] for n, t in step.tensors().items() if not torch.equal(t, before[n])}
    assert changed <= {"average", "usual"}  # the average comes nearer to the same weights


def test_without_float16_the_scale_stays_what_it_is(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), mosaics=2)
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    for _ in range(3):
        step(batch._replace(rgb=batch.rgb * math.inf), 1e-3)
    assert step.scaler.get_scale() == 1


def test_the_rate_of_a_step_is_the_one_asked_for(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1.0, compiled=False)
    loss = step(batch, 0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(step(batch, 1e-3), loss)
    assert step(batch, 1e-3)[0] < loss[0]


def test_what_is_evaluated_is_an_average_of_the_weights(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), mosaics=1)
    expected = [p.detach().clone() for p in model.parameters()]
    step = nb.TrainingStep(
        model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1.0, compiled=False, decay=0.75
    )
    for _ in range(3):
        step(batch, 1e-2)
        expected = [0.75 * e + 0.25 * p.detach() for e, p in zip(expected, model.parameters())]
    assert all(torch.allclose(a, e, atol=1e-6) for a, e in zip(step.average.parameters(), expected))
    assert not any(torch.equal(a, p) for a, p in zip(step.average.parameters(), model.parameters()))
    assert not any(a.requires_grad for a in step.average.parameters())


def test_the_logarithm_of_the_loss_changes_only_the_size_of_its_gradient(nb, tiny, batch_of):
    batch, losses, gradients = batch_of(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)), [], []
    for log_loss in (False, True):
        model = tiny()
        step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1e9, False, log_loss)
        losses.append(step(batch, 0.0))
        trained = [p for p in model.parameters() if p.grad is not None]  # not the head, which mosaics train
        gradients.append([p.grad * (losses[-1][0] if log_loss else 1) for p in trained])
    assert torch.equal(*losses)  # the MSE in both
    assert losses[0][1] == 0
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(*gradients))


@pytest.mark.skipif(backends.triton is None, reason="needs Triton")
@pytest.mark.parametrize("decoder", ["lainr", "hybrid"])
def test_the_model_is_compiled_in_one_piece(nb, tiny, batch_of, decoder, monkeypatch):
    # Nothing is known of the machine yet, so that the scan is tried while the model is compiled.
    monkeypatch.setattr(backends, "_faults", {})
    monkeypatch.setattr(backends, "triton_fault", lambda device: backends._fault_of("triton", device))
    monkeypatch.setitem(backends._chosen, "backend", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny(decoder=decoder).to(device)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, device=device)
    batch = batch_of(images, mosaics=2)
    model.precision = torch.bfloat16
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 1.0, compiled=False)
    losses, gradients = [], []
    for errors_of in (torch.compile(step.errors, backend="aot_eager", fullgraph=True), step.errors):
        model.zero_grad()
        losses.append(errors_of(batch))
        losses[-1].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.equal(*losses)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("decoder", ["lainr", "gaussian", "scent", "hybrid"])
def test_a_captured_step_trains_as_an_eager_one(nb, tiny, precision, decoder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8).cuda()
    sampler = nb.Sampler(images, 8, 2, 2, 64, 0)
    losses = []
    for compiled in (False, True):
        model = tiny(decoder=decoder).cuda()
        model.precision = precision
        step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 1.0, compiled)
        losses.append(torch.stack([step(sampler(0, i), 1e-3 * (i + 1) / 8).clone() for i in range(8)]))
        assert (getattr(step.execute, "graph", None) is not None) == compiled
    assert torch.allclose(*losses, atol=0, rtol=2e-3 if precision == torch.float16 else 1e-4)


@pytest.mark.parametrize("head_latents", [True, False])
def test_finer_pixels_train_the_head_alone(nb, tiny, batch_of, head_latents):
    images, gradients = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), []
    for mosaics in (0, 4):
        batch, model = batch_of(images, mosaics), tiny(head_latents=head_latents)
        batch, encoded = batch._replace(images=images[:4]), []
        encode = model.encode
        model.encode = lambda images: encoded.append(len(images)) or encode(images)  # noqa: B023
        step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1.0, 0.99, 0.1, 0.1), 1e9, False)
        mse, finer = step(batch, 0.0)
        assert encoded == ([4, 4] if mosaics and head_latents else [4])
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert (0 < mse != finer > 0) if mosaics else finer == 0
    without, with_mosaics = gradients
    assert {n for n in with_mosaics if n not in without} == {n for n in with_mosaics if n.startswith("head.")}
    assert all(torch.equal(with_mosaics[n], without[n]) for n in without)
    assert with_mosaics["head.to_rgb.weight"].abs().max() > 0


def test_beyond_black_and_white_nothing_is_missing(nb):
    rgb = torch.tensor([-0.2, 0.3, 1.4, -0.2, 0.3, 1.4, -0.2, 0.3, 1.4], requires_grad=True)
    target = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0])
    missing = nb.shortfall(rgb, target)
    assert missing.tolist() == pytest.approx([0, 0.3, 1.4, -0.7, -0.2, 0.9, -1.2, -0.7, 0])
    missing.square().mean().backward()
    assert (rgb.grad == 0).tolist() == [True, *[False] * 7, True]  # also far on the wrong side there is a gradient


def test_images_without_an_error_train_on(nb, tiny, batch_of):
    model, batch = tiny(), batch_of(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    with torch.no_grad():
        model.decoder.to_rgb.weight.zero_()
        model.decoder.to_rgb.bias.fill_(-1.0)
    step = nb.TrainingStep(model, nb.make_optimizer(model, "muon", 1e-3, 0.99, 0.1, 0.1), 2.0, False)
    assert step(batch, 1e-3)[0] == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parameters_go_to_the_optimizer_that_is_theirs(nb):
    model = nb.MambaGINR(dim=128, depth=1, decoder_blocks=1)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer, groups in (("muon", 3), ("adamw", 2)):
        made = nb.make_optimizer(model, optimizer, 1e-3, 0.99, 0.1, 0.3).param_groups
        assert len(made) == groups
        assert sum(len(g["params"]) for g in made) == len(names)
        for group in made:
            for p in group["params"]:
                spared = p.dim() < 2 or "A_log" in names[id(p)] or names[id(p)] == "lp.tokens"
                matrix = p.dim() == 2 and min(p.shape) >= 128 and not spared
                muon = matrix and optimizer == "muon"
                assert bool(group.get("muon")) == muon, names[id(p)]
                assert group["weight_decay"] == (0.0 if spared else 0.3 if muon else 0.1), names[id(p)]
    with pytest.raises(ValueError, match="OPTIMIZER = 'sgd': choose one of muon, adamw"):
        nb.make_optimizer(model, "sgd", 1e-3, 0.99, 0.1, 0.1)


def test_the_schedule_warms_up_and_ends_at_zero(nb):
    rates = [nb.learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert nb.learning_rate(0, 100, 0, 1.0) == 1
