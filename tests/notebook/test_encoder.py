"""The encoder: how pixels enter as patches, its residuals, and tokens that leave early."""

import torch


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


def test_patches_are_cut_in_raster_order(nb):
    embedding = nb.PatchEmbedding(4, 2, 12, pixel_scale=4.0, position_scale=1.0, fourier_std=1.0, seed=0)
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


def test_the_positional_encoding_starts_as_large_as_asked(nb):
    encodings = []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        embedding = nb.PatchEmbedding(8, 2, 12, pixel_scale=4.0, position_scale=scale, fourier_std=1.0, seed=0)
        encodings.append(embedding.to_position(embedding.fourier(embedding.centres)))
    assert torch.allclose(encodings[1], 8 * encodings[0], rtol=1e-6)
    assert embedding.to_position.weight.requires_grad


def test_pixels_enter_exactly_as_float16_and_tf32_operands(nb, tiny):
    seen = []
    embedding = tiny().patch_embedding
    embedding.to_token.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    levels = torch.arange(256).float()
    embedding((levels.view(4, 1, 8, 8) / 255).expand(4, 3, 8, 8))
    entered = seen[0][..., ::3].flatten().sort().values  # three channels of the same
    assert torch.equal(entered.half().float(), (2 * levels - 255) / 64)
    assert (entered - entered.half().float()).abs().max() < 1e-6
