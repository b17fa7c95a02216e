"""Views: a finite set, replayed exactly."""

import pytest
import torch
import torch.nn.functional as F

from training.views import Views

IMAGES = torch.randint(0, 256, (5, 2, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(("shift", "flip", "count"), [(0, False, 1), (0, True, 2), (1, False, 9), (2, True, 50)])
def test_count(shift: int, flip: bool, count: int) -> None:
    assert len(Views(shift=shift, flip=flip)) == count


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_view_0_is_the_image(shift: int) -> None:
    view = torch.zeros(5, dtype=torch.long)
    assert torch.equal(Views(shift=shift, flip=True).apply(IMAGES, view), IMAGES)


def test_the_set_is_all_shifts_with_and_without_mirror() -> None:
    views = Views(shift=1, flip=True)
    image = IMAGES[:1]
    seen = {views.apply(image, torch.tensor([v])).numpy().tobytes() for v in range(len(views))}
    padded = F.pad(image, (1, 1, 1, 1))
    shifted = [padded[:, :, y : y + 6, x : x + 7] for y in range(3) for x in range(3)]
    expected = {picture.contiguous().numpy().tobytes() for s in shifted for picture in (s, s.flip(-1))}
    assert len(seen) == len(views) == 18
    assert seen == expected


def test_each_image_gets_its_own_view_whatever_its_neighbours() -> None:
    views = Views(shift=2, flip=True)
    view = torch.tensor([0, 7, 24, 25, 49])
    together = views.apply(IMAGES, view)
    for i in range(5):
        assert torch.equal(together[i : i + 1], views.apply(IMAGES[i : i + 1], view[i : i + 1]))
