"""The whole model: its sizes, what it refuses, and that it learns."""

import pytest
import torch

import mamba_ginr.data as loading


def test_eight_images_are_learnt_past_40_db(nb):
    torch.manual_seed(0)
    images = loading.load_photos(12)[1][100:1300:150][:8]
    model = nb.MambaGINR(image_size=12, dim=64, depth=1, d_state=8, num_lp=36, decoder_dim=128, fourier_std=5.0)
    optimizer = nb.make_optimizer(model, "adamw", 1e-3, 0.99, 0.0, 0.1)
    (images, target), coords = nb.to_batch(images), nb.pixel_grid(12)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = nb.learning_rate(step, 500, 40, 5e-3)
        loss = torch.nn.functional.mse_loss(model(images, coords), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        assert nb.psnr(model(images, coords), target).mean() > 40


def test_images_of_a_wrong_kind_are_named(tiny):
    model = tiny()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\), float in \[0, 1\], got \(1, 3, 9, 8\)"):
        model.encode(torch.rand(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"got \(1, 3, 8, 8\) torch.uint8"):
        model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("fused", [False, True])
def test_the_compiler_takes_the_model_in_one_piece(nb, tiny, fused):
    model, images = tiny(), torch.rand(2, 3, 8, 8)
    model.fused = fused
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [run(images, nb.pixel_grid(8)) for run in (model, compiled)]
    assert torch.allclose(*outputs, atol=1e-5)
    used = [p for n, p in model.named_parameters() if not n.startswith("head.")]  # which these queries reach
    plain, of_compiled = (torch.autograd.grad(output.square().sum(), used) for output in outputs)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(plain, of_compiled))


def test_a_model_on_a_cpu_with_the_newer_setting_of_tf32(nb, tiny):
    model, images = tiny(), torch.rand(2, 3, 8, 8)
    expected = model(images, nb.pixel_grid(8))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.allclose(model(images, nb.pixel_grid(8)), expected, atol=1e-6)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_dtype_are_refused_and_other_inputs_are_taken(nb, tiny, dtype):
    images, coords = torch.rand(2, 3, 8, 8), torch.rand(5, 2)
    with torch.no_grad():
        expected = tiny()(images.to(dtype).float(), coords.to(dtype).float())
        assert torch.equal(tiny()(images.to(dtype), coords.to(dtype)), expected)
        with pytest.raises(TypeError, match=rf"the model's weights are {dtype}; .*model.float\(\)"):
            tiny().to(dtype)(images, coords)


def test_a_model_made_under_another_default_dtype(nb, tiny):
    images, coords = torch.rand(2, 3, 8, 8), torch.rand(5, 2)
    torch.set_default_dtype(torch.float64)
    try:
        model = tiny()
        with pytest.raises(TypeError, match=r"the model's weights are torch.float64"):
            model(images, coords)
        assert model.float()(images, coords).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_patch_size_that_does_not_fit(tiny):
    with pytest.raises(ValueError, match="patch_size 3 must divide image_size 8"):
        tiny(patch_size=3)


@pytest.mark.parametrize(
    "changes",
    [{name: 0} for name in ("depth", "d_state", "d_conv", "expand", "decoder_dim", "head_dim", "head_hidden")]
    + [{"decoder": "scent", "decoder_blocks": 0}, {"decoder": "hybrid", "decoder_blocks": -1}],
    ids=str,
)
def test_a_model_without_a_part_is_named(tiny, changes):
    name, value = list(changes.items())[-1]
    with pytest.raises(ValueError, match=f"^{name} = {value}: at least 1"):
        tiny(**changes)


def test_the_default_model_has_the_sizes_of_the_figure(nb):
    model = nb.MambaGINR()
    model.fused = False
    shapes = {}
    for name in ("patch_embedding", "encoder", "decoder.fourier", "decoder.attention", "decoder.blocks", "decoder"):
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    with torch.no_grad():
        latents = model.encode(torch.rand(1, 3, 32, 32))
        model.decode(latents, torch.rand(10, 2))
    assert latents.shape == (1, 256, 256)
    assert shapes == {
        "patch_embedding": (1, 256, 256),
        "encoder": (1, 512, 256),
        "decoder.fourier": (1, 10, 64),
        "decoder.attention": (1, 10, 512),
        "decoder.blocks": (1, 10, 512),
        "decoder": (1, 10, 3),
    }
    # 4 bytes each, in the head 2: a checkpoint stays under 50 MB.
    assert sum(p.numel() for p in model.parameters()) == 12_713_094
