"""Deletion and insertion scores, pictures, and the command that explains one."""

import pytest
import torch
from PIL import Image
from torch import nn

import formarium as fm
from formarium.arena.explanations import deletion, explain_image, insertion, overlay
from formarium.cli import main
from formarium.core.errors import BadData, DoesNotFit, FormariumError


class Corner(nn.Module):
    """Sure of class 1 as far as the upper left quarter is there."""

    def forward(self, x):
        there = x[:, 0, :2, :2].mean((1, 2))
        return torch.stack((1 - there, there), dim=1).log()


def test_scores_are_of_the_right_pixels():
    """Deleting the quarter that counts first empties it at once; deleting it last keeps it until the end."""
    images, one = torch.ones(1, 1, 4, 4), torch.tensor([1])
    right, wrong = torch.tensor([[[1.0, 0], [0, 0]]]), torch.tensor([[[0.0, 1], [1, 1]]])
    # of 16 pixels, in 4 steps of 4: the quarter goes first, or last
    assert deletion(Corner(), images, right, one, steps=4).item() == pytest.approx(1 / 5)
    assert deletion(Corner(), images, wrong, one, steps=4).item() == pytest.approx(4 / 5)
    assert insertion(Corner(), images, right, one, steps=4).item() == pytest.approx(4 / 5)
    assert insertion(Corner(), images, wrong, one, steps=4).item() == pytest.approx(1 / 5)
    with pytest.raises(DoesNotFit, match="whose cells divide 4x4"):
        deletion(Corner(), images, torch.rand(1, 3, 3), one)


def test_a_picture_is_written(tmp_path, monkeypatch, capsys):
    """From a file of ours, with the task's normalisation, and by name; what is drawn has the size that was asked."""
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.jpg")
    fm.save(fm.create_model("vit/nano", in_chans=1, num_classes=10), tmp_path / "m.safetensors")
    for arguments in ([str(tmp_path / "m.safetensors"), "--task", "mnist5k", "--target", "3", "--method", "rollout"],
                      ["vit/nano"]):
        picture = tmp_path / "shown.png"
        monkeypatch.setattr("sys.argv", ["formarium", "explain", arguments[0], str(tmp_path / "red.jpg"),
                                         *arguments[1:], "--out", str(picture)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert Image.open(picture).size == (980, 518)
        said = capsys.readouterr().out
        assert ("class 3 (3)" in said) == (len(arguments) > 1)
        assert ("untrained" in said) == (len(arguments) == 1)
        picture.unlink()


def test_wrong_pictures(tmp_path):
    model = fm.create_model("vit/nano")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadData, match="cannot be read as an image"):
        explain_image(model, tmp_path / "text.png")
    with pytest.raises(BadData, match="there is no image"):
        explain_image(model, tmp_path / "none.png")
    Image.new("L", (9, 9)).save(tmp_path / "black.png")
    with pytest.raises(DoesNotFit, match="name the task it was trained on"):
        explain_image(model, tmp_path / "black.png", task=fm.get_task("digits"))
    with pytest.raises(DoesNotFit, match="grey or colour"):
        explain_image(fm.create_model("vit/nano", in_chans=5), tmp_path / "black.png")
    found, pixels = explain_image(model, tmp_path / "black.png")
    with pytest.raises(FormariumError, match=r"ends in .png, not a.jpg"):
        overlay(pixels, found, tmp_path / "a.jpg", "black")
