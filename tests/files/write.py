"""Writes small files of this version into tests/files/<version>/, which every later version must read.

    python tests/files/write.py

Beside them: answers.safetensors, inputs and outputs of the models; an existing folder stays as it is.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import formarium as fm

HERE = Path(__file__).parent


def samples():
    """Name -> (model, how it is saved). The adapters were trained on `vit`."""
    small = {"depth": 2, "dim": 32, "heads": 2}
    vit = fm.create_model("vit/nano", img_size=16, num_classes=10, **small)
    yield "vit", vit, {}
    yield "gpt", fm.create_model("gpt/nano", vocab=64, context=16, mixer=fm.part("mixer", "cosformer"),
                                 residual="denseformer(dilation=2)", **small), {}
    yield "pruned", fm.create_model("vit/nano:depth=2,dim=16,img_size=16,num_classes=10+zero_tprune(keep=0.7)"), {}
    adapted = fm.apply(vit, "adaptformer(bottleneck=4)")
    for name, p in adapted.named_parameters():
        if p.requires_grad and "head" not in name:
            torch.nn.init.normal_(p, std=0.2)
    yield "adapters", adapted, {"only": "trained"}


@torch.no_grad()
def main():
    torch.manual_seed(0)
    folder = HERE / fm.__version__
    if folder.exists():
        sys.exit(f"{folder} is there already: files of a released version stay as they were written")
    answers = {}
    for name, model, how in list(samples()):  # all are made before one is written
        fm.save(model, folder / f"{name}.safetensors", **how)
        answers[f"{name}.input"] = model.eval().example(2)
        answers[f"{name}.output"] = model(answers[f"{name}.input"])
    save_file(answers, folder / "answers.safetensors")


if __name__ == "__main__":
    main()
