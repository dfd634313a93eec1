"""Pictures of any size: crops of them at random places and in the middle, and mosaics of as few pieces as can be."""

import pytest
import torch

from mamba_ginr.pictures import Pictures


def numbered(height, width):
    """A picture whose first two channels are row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, height)]).byte()


def test_a_picture_counts_as_often_as_crops_lie_in_it():
    shapes = [(8, 8), (16, 25), (40, 17)]
    pictures = Pictures([numbered(*shape) for shape in shapes], 8)
    assert pictures.picture_of.tolist() == [0] + 6 * [1] + 10 * [2]
    assert len(Pictures([numbered(*shape) for shape in shapes], 8, many=False)) == 3


def test_crops_lie_in_their_picture_and_depend_on_the_generator_only():
    pictures = Pictures([numbered(8, 8), numbered(16, 25), numbered(40, 17)], 8)
    which = torch.arange(len(pictures)).repeat(50)
    crops, again = (pictures.crops(which, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(crops, again)
    assert crops.shape == (len(which), 3, 8, 8)
    assert torch.equal(crops[:, 2, 0, 0], pictures.shapes[pictures.picture_of[which], 0].byte())
    first = crops[:, :2, :1, :1]
    steps = torch.arange(8)
    assert torch.equal(crops[:, 0], (first[:, 0] + steps.view(8, 1)).byte().expand(-1, 8, 8))
    assert torch.equal(crops[:, 1], (first[:, 1] + steps).byte().expand(-1, 8, 8))
    of_second = first[pictures.picture_of[which] == 1].view(-1, 2).unique(dim=0)
    assert of_second.amax(0).tolist() == [8, 17]  # every place is drawn, up to the last
    assert of_second.amin(0).tolist() == [0, 0]


def test_without_a_generator_crops_are_the_middle():
    pictures = Pictures([numbered(16, 25), numbered(9, 8)], 8, many=False)
    assert pictures.crops(torch.arange(2))[:, :2, 0, 0].tolist() == [[4, 8], [0, 0]]
    assert pictures.crops(torch.tensor([0]), 12)[:, :2, 0, 0].tolist() == [[2, 6]]


def test_pictures_of_the_crops_size_are_the_crops():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    for pictures in (Pictures(images, 8), Pictures(list(images), 8)):
        assert pictures.exact
        assert torch.equal(pictures.crops(torch.tensor([3, 0])), images[[3, 0]])


def test_pictures_that_stay_apart_give_the_same_crops():
    shapes = [(8, 8), (16, 25), (40, 17)]
    for pictures in ([numbered(*shape) for shape in shapes], torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)):
        one, other = (Pictures(pictures, 8).to("cpu", apart) for apart in (False, True))
        which = torch.arange(len(one)).repeat(20)
        drawn = (each.crops(which, 8, torch.Generator().manual_seed(1)) for each in (one, other))
        assert torch.equal(*drawn)
        assert torch.equal(one.crops(which), other.crops(which))


def test_mosaics_take_as_few_pieces_as_half_of_the_crops_can_give():
    small, large = [numbered(8, 8)] * 3, [numbered(20, 17)]
    assert Pictures(small, 8).pieces(4)[0] == 4
    tiles, which = Pictures(small + large, 8).pieces(2)  # 4 of 7 crops are the large one's
    assert (tiles, which.tolist()) == (1, [3, 4, 5, 6])
    assert Pictures(small + large, 8).pieces(4)[0] == 2  # 16 of its 17 pixels, twice a side
    tiles, which = Pictures(small * 3 + large, 8).pieces(2)
    assert (tiles, len(which)) == (2, 13)  # most are small: all serve, side by side


def test_what_cannot_be_cropped_is_named():
    with pytest.raises(ValueError, match="pictures of 9×7 pixels are smaller than crops of 8×8"):
        Pictures([numbered(8, 8), numbered(7, 9)], 8)
    with pytest.raises(ValueError, match="crops of 9×9 of pictures that have 8 pixels at most"):
        Pictures([numbered(8, 8), numbered(8, 30)], 8).crops(torch.tensor([0]), 9)
    with pytest.raises(ValueError, match="no pictures"):
        Pictures([], 8)


def test_an_epoch_has_at_most_so_many_crops_of_any_picture():
    pictures = Pictures([numbered(40, 40), numbered(16, 16)], 8, most=10)
    assert len(pictures) == 10
    assert set(pictures.picture_of.tolist()) == {0, 1}
