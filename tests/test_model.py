"""The model: Mamba's parameters, the two directions, LP tokens, coordinates, the bias, decoding, PSNR."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from skimage.metrics import peak_signal_noise_ratio

from mamba_ginr import decoders
from mamba_ginr.kernels import mamba_ssm_fault


def mamba_ssm_shapes(dim, d_state=16, d_conv=4, expand=2):
    """Names and shapes of a mamba_ssm.Mamba state dict (mamba_simple.py of release 2.3.2)."""
    inner, rank = expand * dim, math.ceil(dim / 16)
    return {
        "A_log": (inner, d_state),
        "D": (inner,),
        "in_proj.weight": (2 * inner, dim),
        "conv1d.weight": (inner, 1, d_conv),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * d_state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (dim, inner),
    }


def test_a_mamba_ssm_state_dict_loads(nb):
    state = {name: torch.randn(shape) for name, shape in mamba_ssm_shapes(40).items()}
    mamba = nb.Mamba(40)
    mamba.load_state_dict(state)
    assert {k: tuple(v.shape) for k, v in mamba.state_dict().items()} == mamba_ssm_shapes(40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_mamba_equals_mamba_ssm(nb):
    if fault := mamba_ssm_fault("cuda"):
        pytest.skip(fault)
    import mamba_ssm

    torch.manual_seed(0)
    theirs, ours, x = mamba_ssm.Mamba(64).cuda(), nb.Mamba(64).cuda(), torch.randn(2, 33, 64, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_mamba_starts_as_mamba_ssm_does(nb):
    torch.manual_seed(0)
    mamba = nb.Mamba(64, d_state=8)
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 9).expand(128, 8))
    assert torch.equal(mamba.D, torch.ones(128))
    delta = F.softplus(mamba.dt_proj.bias)
    assert 0.001 <= delta.min() < 0.002
    assert 0.05 < delta.max() <= 0.1001
    assert mamba.dt_proj.weight.abs().max() <= mamba.dt_rank**-0.5


def test_mamba_is_causal_and_bimamba_is_not(nb):
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 7] += 1
    mamba, bimamba = nb.Mamba(16), nb.BiMamba(16)
    assert torch.equal(mamba(x)[:, :7], mamba(changed)[:, :7])
    assert (bimamba(x)[:, 0] - bimamba(changed)[:, 0]).abs().max() > 0


def test_bimamba_is_a_mamba_each_way_and_a_join(nb):
    torch.manual_seed(0)
    bimamba, x = nb.BiMamba(16), torch.randn(2, 11, 16)
    forward, backward = bimamba.forward_mamba(x), bimamba.backward_mamba(x.flip(1)).flip(1)
    assert (forward - backward).abs().max() > 1e-3
    assert torch.equal(bimamba(x), bimamba.join(torch.cat([forward, backward], dim=-1)))


def test_both_residuals_of_the_last_block_are_kept(nb):
    torch.manual_seed(0)
    encoder, x = nb.MambaEncoder(16, depth=2), torch.randn(1, 6, 16)
    last = encoder.blocks[-1]
    torch.nn.init.zeros_(last.mixer.join.weight), torch.nn.init.zeros_(last.mixer.join.bias)
    torch.nn.init.zeros_(last.feed_forward[-1].weight), torch.nn.init.zeros_(last.feed_forward[-1].bias)
    # A block whose branches say nothing must hand on what came in.
    assert torch.equal(encoder(x), encoder.norm(encoder.blocks[0](x)))


def test_tokens_that_leave_before_the_last_feed_forward_come_out_alike(nb):
    torch.manual_seed(0)
    encoder, x = nb.MambaEncoder(16, depth=2), torch.randn(2, 6, 16)
    assert torch.allclose(nb.fast_encoder(encoder, x, lambda t: t[:, ::2]), encoder(x)[:, ::2], atol=1e-6)


@pytest.mark.parametrize(
    ("num_lp", "num_patches"), [(2, 1), (2, 16), (5, 16), (16, 16), (17, 16), (256, 256), (64, 256)]
)
def test_lp_tokens_go_in_evenly_and_come_out_whole(nb, num_lp, num_patches):
    lp, length = nb.LearnablePositionTokens(num_lp, num_patches, 4), num_lp + num_patches
    patches = torch.randn(3, num_patches, 4)
    sequence = lp.insert(patches)
    places = [math.floor(i * (length - 1) / (num_lp - 1)) for i in range(num_lp)]
    assert sequence.shape == (3, length, 4)
    assert lp.inverse[:num_lp].tolist() == places
    assert places[0] == 0
    assert places[-1] == length - 1
    assert torch.equal(sequence[:, places], lp.tokens.expand(3, -1, -1))
    assert torch.equal(lp.extract(sequence), lp.tokens.expand(3, -1, -1))
    patches.requires_grad_()
    weights = torch.randn_like(sequence)
    (gradient,) = torch.autograd.grad((lp.insert(patches) * weights).sum(), patches)
    rest = [i for i in range(length) if i not in set(places)]
    assert torch.equal(gradient, weights[:, rest])
    assert torch.equal(sequence[:, rest], patches)


def test_lp_token_i_of_256_stands_beside_patch_i(nb):
    lp = nb.LearnablePositionTokens(256, 256, 4)
    assert lp.patch.tolist() == list(range(256))
    where = lp.order.argsort()  # place in the sequence of [LP tokens, patches]
    assert (where[256:] - where[:256]).abs().max() <= 2


def test_lp_tokens_start_as_sinusoids(nb):
    tokens = nb.LearnablePositionTokens(16, 16, 8).tokens
    for i in (0, 3, 15):
        for k in range(4):
            angle = i / 10_000 ** (2 * k / 8)
            assert tokens[i, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert tokens[i, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("num_lp", [0, 1, 18])
def test_a_number_of_lp_tokens_that_does_not_fit(nb, num_lp):
    with pytest.raises(ValueError, match=rf"num_lp must lie in 2 … num_patches \+ 1 = 17, got {num_lp}"):
        nb.LearnablePositionTokens(num_lp, 16, 4)


def test_grid_holds_pixel_centres_in_raster_order(nb):
    grid = nb.pixel_grid(4)
    assert grid.shape == (16, 2)
    for index in range(16):
        row, column = divmod(index, 4)
        assert grid[index].tolist() == [(row + 0.5) / 4, (column + 0.5) / 4]


def test_patches_are_cut_in_raster_order(nb):
    embedding = nb.PatchEmbedding(4, 2, 12, pixel_scale=4.0, fourier_std=1.0, seed=0)
    embedding.to_token.weight.data = torch.eye(12)
    for layer in (embedding.to_token, embedding.to_position):
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(embedding.to_position.weight)
    image = torch.arange(48.0).view(1, 3, 4, 4)
    tokens = embedding(image / 255)[0].view(4, 2, 2, 3)  # patch, row in it, column in it, channel
    image = (2 * image - 255) / 64  # 0 … 255 → −4 … 4
    for patch in range(4):
        row, column = divmod(patch, 2)
        expected = image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(1, 2, 0)
        assert torch.allclose(tokens[patch], expected, atol=1e-6)


def test_bias_is_two_dimensional_and_in_units_of_a_patch(nb, tiny):
    decoder = tiny().decoder  # 4×4 patches
    bias = decoder.bias(torch.tensor([[0.125, 0.125]]))[0].view(4, 4)  # asked at the centre of patch (0, 0)
    for row in range(4):
        for column in range(4):
            assert bias[row, column].item() == pytest.approx(-10.0 * (row**2 + column**2), abs=1e-4)


def test_fourier_frequencies_are_drawn_once(nb, tiny):
    coords = torch.rand(5, 2)
    a, b = nb.FourierFeatures(8, 10.0, seed=3), nb.FourierFeatures(8, 10.0, seed=3)
    torch.manual_seed(99)
    assert torch.equal(a(coords), b(coords))
    assert torch.equal(a(coords), a(coords))
    assert not torch.equal(a(coords), nb.FourierFeatures(8, 10.0, seed=4)(coords))
    assert nb.FourierFeatures(4096, 10.0, 0).frequencies.std().item() == pytest.approx(10, rel=0.05)
    names = [name for name in tiny().state_dict() if name.endswith("frequencies")]
    assert len(names) == 2  # of the patches and of the queries
    trained = [name for name, _ in tiny(decoder="gaussian").named_parameters() if name.endswith("frequencies")]
    assert trained == [f"decoder.fourier.bands.{i}.frequencies" for i in range(2)]
    assert not any(name.endswith("frequencies") for name, _ in tiny().named_parameters())


def test_fourier_features_of_a_known_frequency(nb):
    features = nb.FourierFeatures(1, 1.0, 0)
    features.frequencies.copy_(torch.tensor([[2.0], [1.0]]))
    angle = 2 * math.pi * (2 * 0.3 + 0.9)
    assert features(torch.tensor([0.3, 0.9])).tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 6])
def test_place_within_a_patch_is_linear_in_the_harmonics(nb, patch):
    size = 12
    harmonics = nb.patch_harmonics(patch, size)
    assert harmonics.shape == (2, 2 * (patch // 2))
    if patch == 1:
        return  # one place only
    features = nb.FourierFeatures(harmonics.shape[1], 1.0, 0, harmonics)(nb.pixel_grid(size)).double()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    row, column = torch.arange(size**2) // size % patch, torch.arange(size**2) % patch
    wanted = torch.cat([F.one_hot(row, patch), F.one_hot(column, patch)], dim=1).double()
    solution = torch.linalg.pinv(features, rtol=1e-4) @ wanted
    assert (features @ solution - wanted).abs().max() < 1e-4


def test_harmonics_are_among_the_frequencies_of_the_decoder(nb, tiny):
    for seed in (0, 1):
        frequencies = nb.MambaGINR(**{**tiny().config, "seed": seed}).decoder.fourier.frequencies
        assert frequencies[:, :2].tolist() == [[4.0, 0.0], [0.0, 4.0]]  # an image of four patches a side
        assert frequencies.shape == (2, 8)
    with pytest.raises(ValueError, match="num_frequencies must be at least 4 for patch_size 4, got 3"):
        tiny(patch_size=4, num_lp=4, num_frequencies=3)


def test_pixels_enter_exactly_as_float16_and_tf32_operands(nb, tiny):
    seen = []
    embedding = tiny().patch_embedding
    embedding.to_token.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    levels = torch.arange(256).float()
    embedding((levels.view(4, 1, 8, 8) / 255).expand(4, 3, 8, 8))
    entered = seen[0][..., ::3].flatten().sort().values  # three channels of the same
    assert torch.equal(entered.half().float(), (2 * levels - 255) / 64)
    assert (entered - entered.half().float()).abs().max() < 1e-6


def test_psnr_is_scikit_images(nb):
    rng = np.random.default_rng(0)
    target = rng.random((4, 8, 8, 3), dtype=np.float32)
    prediction = target + rng.normal(0, 0.3, target.shape).astype(np.float32)  # some values leave [0, 1]
    ours = nb.psnr(torch.from_numpy(prediction), torch.from_numpy(target))
    theirs = [peak_signal_noise_ratio(t, p, data_range=1.0) for t, p in zip(target, prediction)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-3)


def test_evaluate_reports_each_number_as_defined(nb, tiny):
    class Constant(torch.nn.Module):
        own_coords = nb.pixel_grid(8)

        def forward(self, images, coords):
            return images.flatten(2).transpose(1, 2) + offset[: len(images)]

    images = torch.randint(1, 254, (3, 3, 8, 8), dtype=torch.uint8)
    offset = torch.tensor([0.4, 0.6, 3.0]).view(3, 1, 1) / 255  # only the first rounds back to what it was
    metrics = nb.evaluate(Constant(), images, batch_size=3)
    errors = (offset.flatten().double() ** 2).tolist()
    assert metrics["psnr_mean"] == pytest.approx(np.mean([-10 * math.log10(e) for e in errors]), abs=1e-2)
    assert metrics["psnr_of_mean_mse"] == pytest.approx(-10 * math.log10(np.mean(errors)), abs=1e-2)
    assert metrics["psnr_worst"] == pytest.approx(-10 * math.log10(max(errors)), abs=1e-2)
    assert metrics["bit_exact_share"] == pytest.approx(1 / 3)


def test_evaluate_does_not_depend_on_the_batch(nb, tiny):
    model, images = tiny().eval(), torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    whole, parts = nb.evaluate(model, images, 7), nb.evaluate(model, images, 2)
    assert whole == pytest.approx(parts, abs=1e-3)


DECODERS = pytest.mark.parametrize("decoder", ["lainr", "gaussian", "scent", "hybrid"])


@DECODERS
def test_any_resolution_and_any_chunk_decode_alike(nb, tiny, decoder):
    model = tiny(decoder=decoder).eval()
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 8, 8))
        for size in (1, 5, 8, 24):
            whole = model.decode(latents, nb.pixel_grid(size))
            assert whole.shape == (2, size**2, 3)
            for chunk in (1, 7, 1000):
                if size * size / chunk <= 100:
                    assert torch.allclose(model.decode(latents, nb.pixel_grid(size), chunk), whole, atol=1e-5)


@DECODERS
def test_a_query_does_not_depend_on_the_others(nb, tiny, decoder):
    model, coords = tiny(decoder=decoder).eval(), torch.rand(50, 2)
    with torch.no_grad():
        latents = model.encode(torch.rand(1, 3, 8, 8))
        together = model.decode(latents, coords)
        alone = torch.cat([model.decode(latents, coords[i : i + 1]) for i in range(50)], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)


@DECODERS
def test_coordinates_of_each_image_or_shared(nb, tiny, decoder):
    model, coords = tiny(decoder=decoder).eval(), torch.rand(2, 6, 2)
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 8, 8))
        own = model.decode(latents, coords)
        shared = [model.decode(latents, coords[i])[i] for i in range(2)]
    assert torch.allclose(own, torch.stack(shared), atol=1e-5)


def test_images_of_a_wrong_kind_are_named(tiny):
    model = tiny()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\), float in \[0, 1\], got \(1, 3, 9, 8\)"):
        model.encode(torch.rand(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"got \(1, 3, 8, 8\) torch.uint8"):
        model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


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


def trained(model):
    """The same model with a head that is no longer zero, as after training."""
    torch.nn.init.normal_(model.head.to_rgb.weight)
    torch.nn.init.normal_(model.head.to_rgb.bias)
    return model.eval()


def test_the_cell_says_who_answers(nb, tiny):
    torch.manual_seed(0)
    images, coords = torch.rand(2, 3, 8, 8), torch.rand(5, 2)
    with torch.no_grad():
        plain, model = tiny().eval(), trained(tiny())
        assert torch.equal(model(images, coords), plain(images, coords))  # the decoder, without the head
        finer = [model(images, coords, width) for width in (1 / 12, 1 / 16, 1 / 32, 1 / 64)]
        assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(finer))
        each = model(images, coords, torch.tensor([1 / 16, 1 / 8]))
        assert torch.allclose(each[0], finer[1][0], atol=1e-6)
        # At the width of the image's own pixels nothing is added, and at their centres they come back.
        own = model(images, nb.pixel_grid(8))
        assert torch.allclose(model(images, nb.pixel_grid(8), 1 / 8), own, atol=1e-5)
        assert torch.allclose(each[1], plain(images, coords, 1 / 8)[1], atol=1e-6)


def test_means_of_the_spline_are_the_pixels(nb):
    torch.manual_seed(0)
    spline, pixels = nb.HistoSpline(8), torch.rand(2, 3, 8, 8)
    for scale in (1, 2, 3, 5, 8):
        width = torch.tensor([1 / (8 * scale)])
        finer = spline(pixels, nb.pixel_grid(8 * scale)[None], width).transpose(1, 2).unflatten(2, (8 * scale, -1))
        assert torch.allclose(F.avg_pool2d(finer, scale), pixels, atol=1e-5)
    # Wider than a pixel it takes the mean over several, at the border over what there is of them.
    wide = spline(pixels, torch.tensor([[[0.25, 0.5], [0.0, 0.5]]]), torch.tensor([0.25]))
    assert torch.allclose(wide[:, 0], pixels[:, :, 1:3, 3:5].mean((2, 3)), atol=1e-5)
    assert torch.allclose(wide[:, 1], pixels[:, :, :1, 3:5].mean((2, 3)), atol=1e-5)


def test_the_spline_is_scipys(nb):
    x, line = np.linspace(0.2, 0.8, 7), np.random.default_rng(0).random(8)
    whole = CubicSpline(np.arange(9) / 8, np.cumsum([0, *line / 8]), bc_type="natural")
    expected = (whole(x + 0.05) - whole(x - 0.05)) / 0.1
    pixels = torch.from_numpy(line).float().expand(1, 3, 8, 8)
    coords = torch.stack([torch.full((7,), 0.5), torch.from_numpy(x).float()], dim=1)[None]
    assert np.allclose(nb.HistoSpline(8)(pixels, coords, torch.tensor([0.1]))[0, :, 0], expected, atol=1e-5)


def test_the_head_answers_without_a_step(nb):
    """Nothing jumps where a query passes from one map pixel to the next, or beyond the last."""
    torch.manual_seed(0)
    head = nb.SuperResolutionHead(8, 4, None, dim=5, num_blocks=1, hidden=7).double()
    torch.nn.init.normal_(head.to_rgb.weight)
    features, places = torch.randn(1, 64, 7, dtype=torch.float64), torch.arange(0, 33, dtype=torch.float64) / 32
    low, high = (
        torch.cartesian_prod((places + side).clamp(0, 1), (places + side).clamp(0, 1)) for side in (-1e-9, 1e-9)
    )
    before, after = (head.read(features, coords[None], torch.ones(1).double()) for coords in (low, high))
    assert before.std() > 0.1
    assert (after - before).abs().max() < 1e-6


def test_the_head_reads_the_four_nearest_pixels_of_its_map(nb):
    torch.manual_seed(0)
    head = nb.SuperResolutionHead(6, 4, None, dim=5, num_blocks=1, hidden=7)
    torch.nn.init.normal_(head.to_rgb.weight)
    features, coords = torch.randn(2, 36, 7, requires_grad=True), torch.tensor([[0.30, 0.55], [0.0, 1.0]])
    (gradient,) = torch.autograd.grad(head.read(features, coords[None], torch.ones(1))[0, 0].sum(), features)
    assert gradient[0].abs().sum(1).nonzero().squeeze(1).tolist() == [8, 9, 14, 15]  # rows 1 and 2, columns 2 and 3
    (gradient,) = torch.autograd.grad(head.read(features, coords[None], torch.ones(1))[1, 1].sum(), features)
    assert gradient[1].abs().sum(1).nonzero().squeeze(1).tolist() == [5]  # the corner, beyond which there is none
    own = torch.stack([coords, coords.flip(0)])  # of each image, or shared
    each = head.read(features, own, torch.ones(1))
    assert torch.allclose(each[0], head.read(features, coords[None], torch.ones(1))[0], atol=1e-6)
    assert torch.allclose(each[1], head.read(features, coords.flip(0)[None], torch.ones(1))[1], atol=1e-6)


def test_the_latents_pixels_lie_where_their_patch_does(nb):
    head = nb.SuperResolutionHead(6, 4, 3, dim=1, num_blocks=0, hidden=1)
    for part in (head.of_pixels, head.of_latents, head.of_map):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    torch.nn.init.ones_(head.of_map.weight)
    head.of_latents.weight.data = torch.eye(4)  # latent channel k is pixel k of its patch, in raster order
    latents = torch.arange(36.0).view(1, 9, 4)
    features = head.map(latents, torch.zeros(1, 3, 6, 6)).view(3, 2, 3, 2)
    for patch in range(9):
        row, column = divmod(patch, 3)
        assert features[row, :, column].flatten().tolist() == latents[0, patch].tolist()


def test_without_an_lp_token_to_a_patch_the_head_reads_the_pixels_alone(nb, tiny):
    model, images, coords = trained(tiny(num_lp=8)), torch.rand(1, 3, 8, 8), torch.rand(4, 2)
    assert model.head.of_latents is None
    with torch.no_grad():
        assert (model(images, coords, 1 / 32) - model(images, coords, 1 / 16)).abs().max() > 1e-3


def test_an_unknown_decoder_is_named(tiny):
    with pytest.raises(ValueError, match="decoder = 'siren': choose one of lainr, gaussian, scent, hybrid"):
        tiny(decoder="siren")


@pytest.mark.parametrize(("decoder", "millions"), [("gaussian", 10.35), ("scent", 12.7), ("hybrid", 17.9)])
def test_presets_stay_under_25_million_parameters(nb, decoder, millions):
    model = nb.MambaGINR(decoder=decoder, decoder_dim=256, decoder_blocks=2)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_multi_head_attention_is_softmax_of_products(nb):
    torch.manual_seed(0)
    attention = decoders.MultiHeadAttention(6, 5, heads=2, head_dim=4)
    queries, context, bias = torch.randn(1, 7, 6), torch.randn(3, 9, 5), torch.randn(1, 7, 9)
    q = attention.to_q(queries).view(1, 7, 2, 4)
    k, v = attention.to_kv(context).view(3, 9, 2, 2, 4).unbind(2)
    weights = (torch.einsum("oqhd,bphd->bhqp", q, k) / 2 + bias.unsqueeze(1)).softmax(-1)
    expected = attention.to_out(torch.einsum("bhqp,bphd->bqhd", weights, v).flatten(2))
    assert torch.allclose(attention(queries, context, bias), expected, atol=1e-6)
