"""DeiT: two classifiers, the losses against their equations, any teacher, the answers of timm; and runs under it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import formarium as fm
from formarium.arena.train import train
from formarium.cli import app
from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.errors import DoesNotFit, FormariumError, UnknownName
from formarium.core.model import count_parameters
from formarium.papers.backbones.deit import KEYS, Distillation
from formarium.skeletons.objective import objective
from formarium.weights.load import load
from golden_replay import compare, replay

GOLDEN = Path(__file__).parents[1] / "golden" / "deit__deit_tiny_distilled_patch16_224.json.gz"
SMALL = {"dim": 16, "heads": 2, "depth": 2, "img_size": 8, "num_classes": 10}
RUN = {"task": "digits", "steps": 4, "batch_size": 8, "evaluations": 2}


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def deit(**changes):
    return moved(create_model("deit/nano", **SMALL | changes))


@torch.no_grad()
def test_answers_of_the_reference():
    state, inputs, golden = replay(GOLDEN)
    model = load(state)
    assert model.recipe == {"name": "deit/tiny_distilled", "changes": {}}
    assert count_parameters(model) == golden["parameters"]
    compare(golden, model(*inputs))


# the model


def test_training_answers_with_both_and_evaluation_with_their_mean():
    model, x = deit(), torch.randn(3, 3, 8, 8)
    one, other = model.train()(x)
    tokens = model.forward_features(x)
    assert_close((one, other), (model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])))
    assert_close(model.eval()(x), (one + other) / 2)
    model.answer = "class"
    assert_close(model(x), one)
    model.answer = "distillation"
    assert_close(model(x), other)
    with pytest.raises(UnknownName, match="answer of DeiT 'clas'; did you mean class"):
        deit(answer="clas")


def test_features_and_new_classifiers():
    model, x = deit(num_classes=0), torch.randn(2, 3, 8, 8)
    for mode in (True, False):
        features = model.train(mode)(x)
        assert_close(features, model.forward_features(x)[:, :2].mean(1))
    assert not any("head" in n for n, _ in model.named_parameters())
    model.reset_classifier(7)
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    assert model.eval()(x).shape == (2, 7)
    assert [f.map.shape for f in model.features(x)] == [(2, 16, 2, 2)] * 2


def test_files_of_other_sizes_and_classes(tmp_path):
    model = deit().eval()
    fm.save(model, tmp_path / "m.pth", layout="timm")
    again = load(tmp_path / "m.pth", heads=2)
    assert_close(again(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))
    larger = load(tmp_path / "m.pth", heads=2, img_size=16, num_classes=3)
    assert larger(torch.ones(1, 3, 16, 16)).shape == (1, 3)
    assert torch.equal(larger.embedding.position.table[:, :2], model.embedding.position.table[:, :2])


@pytest.mark.parametrize("layout", KEYS)
def test_deit_iii_in_both_layouts(layout, tmp_path):
    """timm calls layer scale ls1.gamma, the authors gamma_1."""
    model = moved(create_model("deit/iii_small:dim=128,heads=2,depth=2,img_size=32,num_classes=3")).eval()
    fm.save(model, tmp_path / "m.pth", layout=layout)
    again, x = load(tmp_path / "m.pth"), torch.randn(1, 3, 32, 32)
    assert_close(again(x), model(x))
    names = torch.load(tmp_path / "m.pth")
    assert ("blocks.1.gamma_2" in names, "blocks.1.ls2.gamma" in names) == (layout == "authors", layout == "timm")
    assert names["pos_embed"].shape[1] == 4  # the class token has no position


# the losses


def by_hand(student, other, teacher, labels, *, kind, alpha, tau, by_image):
    """Eq. 2 and 3, image by image."""
    total = 0.0
    for s, o, t, y in zip(student, other, teacher, labels, strict=True):
        label = -s.log_softmax(0)[y]
        p, q = (t / tau).softmax(0), (o / tau).softmax(0)
        soft = tau**2 * (p * (p.log() - q.log())).sum() / (1 if by_image else len(s))
        told = -o.log_softmax(0)[t.argmax()] if kind == "hard" else soft
        total = total + (1 - alpha) * label + alpha * told
    return total / len(labels)


@pytest.mark.parametrize("settings", [{"kind": "hard"}, {"kind": "soft"}, {"kind": "soft", "tau": 3.0, "alpha": 0.1},
                                      {"kind": "soft", "tau": 2.0, "by_image": True}, {"kind": "hard", "alpha": 0.9}],
                         ids=str)
def test_losses_are_their_equations(settings):
    """Value and gradient of every weight; the teacher gets none."""
    teacher = create_model("vit/nano", **SMALL).double()
    made = Distillation(deit().double(), teacher=moved(teacher), **settings)
    x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.randint(10, (5,))
    given = {"alpha": 0.5, "tau": 1.0, "by_image": False} | settings
    weights = list(made.model.parameters())
    loss, numbers = made(x, y)
    naive = by_hand(*made.model(x), teacher(x), y, **given)
    assert_close(loss, naive)
    assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(naive, weights))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert set(numbers) == {"labels", "teacher", "agreement"}


def test_any_teacher(tmp_path):
    """A module, a file, a name, which takes the student's sizes; in evaluation mode always."""
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10))
    made = Distillation(deit(), teacher=network).train()
    assert not made.teacher.training
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    made(x, y)[0].backward()
    assert network[1].running_mean.eq(0).all()
    save(create_model("vit/nano", **SMALL), tmp_path / "teacher.safetensors")
    assert objective(f"deit(teacher={tmp_path / 'teacher.safetensors'})")(deit()).teacher.recipe["name"] == "vit/nano"
    assert objective("deit(teacher=poolformer/nano,kind=soft)")(deit()).teacher.num_classes == 10
    with pytest.raises(DoesNotFit, match=r"logits \(4, 10\) and \(4, 3\)"):
        Distillation(deit(), teacher=create_model("vit/nano", **SMALL | {"num_classes": 3}))(x, y)
    with pytest.raises(DoesNotFit, match=r"deit needs a teacher.*deit\(teacher=teacher.safetensors\)"):
        Distillation(deit())
    with pytest.raises(UnknownName, match="kind of distillation 'har'; did you mean hard"):
        Distillation(deit(), teacher=network, kind="har")


def test_a_model_with_one_classifier_is_taught_the_usual_way():
    teacher = moved(create_model("vit/nano", **SMALL))
    made = Distillation(moved(create_model("swin/nano", img_size=8, num_classes=10, window=4)), teacher=teacher)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    logits = made.model(x)
    assert_close(made(x, y)[0], (F.cross_entropy(logits, y) + F.cross_entropy(logits, teacher(x).argmax(1))) / 2)


def test_without_a_teacher_both_learn_from_the_labels():
    model, task = deit(in_chans=1), fm.get_task("digits")
    batch = task.train_batch(0, 0, 6)
    one, other = model.train()(batch[0])
    assert_close(task.loss(model, batch), (F.cross_entropy(one, batch[1]) + F.cross_entropy(other, batch[1])) / 2)


# runs


STUDENT = "deit/nano:patch=2,dim=16,depth=1,heads=2"


def test_trains_under_a_teacher(tmp_path):
    """What is evaluated and saved is the student; recipe, mixed labels and average work with it."""
    found = train(STUDENT, out=tmp_path / "r", objective="deit(teacher=vit/nano:dim=16)",
                  recipe="deit", **RUN)
    assert set(found["test"]) == {"loss", "accuracy", "macro_f1"}
    student = load(tmp_path / "r" / "last.safetensors")
    assert student.recipe["name"] == "deit/nano"
    assert found["parameters"] == count_parameters(student)
    pre = fm.pretrain(STUDENT, "deit(teacher=vit/nano:dim=16)", out=tmp_path / "p", **RUN)
    assert set(pre["val"]) == {"loss", "labels", "teacher", "agreement"}
    with pytest.raises(DoesNotFit, match="droppos trains without the labels"):
        train(STUDENT, out=tmp_path / "d", objective="droppos", **RUN)


def test_command_line(tmp_path):
    run = CliRunner()
    shared = ["--task", "digits", "--steps", "2", "--batch-size", "8"]
    made = run.invoke(app, ["train", STUDENT, *shared, "--recipe", "deit", "--out", str(tmp_path / "r"),
                            "--objective", "deit(teacher=vit/nano:dim=16)"])
    assert made.exit_code == 0, made.output
    with pytest.raises(FormariumError, match="unknown recipe 'dait'; did you mean deit"):
        train(STUDENT, recipe="dait", **RUN)
