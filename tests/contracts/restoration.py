"""Restorers: sizes, padding, channels, scales, broken images."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from contract import KINDS, Kind, answer, check
from formarium.core.errors import BadData, DoesNotFit
from formarium.skeletons.restorer import Restorer

KINDS["restoration"] = Kind(Restorer, lambda model, batch: (
    len(batch), model.out_chans, model.scale * batch.shape[2], model.scale * batch.shape[3]))


@check("restoration")
def any_image_size(case):
    """Odd sizes, and down to half of the multiple; below that, an error says what is needed."""
    model = case.build()
    step, least = model.multiple, model.multiple // 2 + 1
    for size in ((step, 2 * step), (2 * step + 1, 3 * step - 1), (least, least), (least, 37), (41, step)):
        out = answer(model, torch.rand(2, model.in_chans, *size))
        assert out.shape == (2, model.out_chans, model.scale * size[0], model.scale * size[1])
        assert out.isfinite().all()
    for size in ((least - 1, 37), (37, least - 1)):
        with pytest.raises(DoesNotFit, match=f"at least {least}x{least}.* multiples of {step}; got {size[0]}x{size[1]}"):
            model(torch.rand(2, model.in_chans, *size))


@check("restoration")
def pads_by_reflection(case):
    """A size that is no multiple answers as the image reflected at its right and lower edge, cropped."""
    model = case.build()
    h, w = 2 * model.multiple + model.multiple // 2 + 1, 3 * model.multiple - model.multiple // 2
    batch = torch.rand(2, model.in_chans, h, w)
    by_hand = F.pad(batch, (0, -w % model.multiple, 0, -h % model.multiple), mode="reflect")
    whole = answer(model, by_hand)
    assert_close(answer(model, batch), whole[..., :h * model.scale, :w * model.scale])
    assert whole.shape[2] > h or model.multiple == 1


@check("restoration")
def image_channels(case):
    for channels in (1, 4):
        model = case.build(in_chans=channels, out_chans=channels)
        assert answer(model, model.example(2)).shape[1] == channels
        for wrong in (channels + 1, 3):
            with pytest.raises(DoesNotFit, match=rf"\(B, {channels}, H, W\), got \(2, {wrong}, .*in_chans="):
                model(torch.rand(2, wrong, 16, 16))
        with pytest.raises(DoesNotFit, match="expected images"):
            model(model.example(1)[0])
    for option in ("in_chans", "out_chans", "scale", "img_size"):
        with pytest.raises(DoesNotFit, match=f"{option} is 1 or more, got 0"):
            case.build(**{option: 0})


@check("restoration")
def enlarges(case):
    """Super-resolution by 2, 3 and 4, of a size that must be padded too."""
    for scale in (2, 3, 4):
        model = case.build(scale=scale)
        for size in ((16, 16), (13, 18)):
            out = answer(model, torch.rand(2, model.in_chans, *size))
            assert out.shape == (2, model.out_chans, scale * size[0], scale * size[1])
            assert out.isfinite().all()


@check("restoration")
def refuses_broken_images(case):
    model = case.build().eval()
    for value in (torch.nan, torch.inf, -torch.inf):
        batch = model.example(3)
        batch[1, 0, 2, 3] = value
        with pytest.raises(BadData, match=r"1 of \d+ values of the images are NaN or infinite, the first in image 1 "):
            model(batch)


@check("restoration")
def channels_last_images(case):
    model = case.build()
    batch = model.example(2)
    plain = answer(model, batch)
    out = answer(model.to(memory_format=torch.channels_last), batch.to(memory_format=torch.channels_last))
    assert_close(out, plain, atol=1e-5, rtol=1e-5)
