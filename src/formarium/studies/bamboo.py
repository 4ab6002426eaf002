"""Bamboo: does depth at equal parameters pay more after masked autoencoding than under the classification loss alone?

The claim is an interaction. A cell trains both configurations, the usual one and one that is four times as deep and half as
wide, with the same start and steps, and what counts is how much more accurate the deep one is. How alike the tokens are
after the last layer is recorded beside it.
"""

from ..arena.study import Cell, Decides, Study

DEEP, USUAL = "bamboo/nano:patch=7,dim=32,depth=16,heads=2", "bamboo/nano:patch=7,dim=64,depth=4,heads=4"
PRETRAINING, TUNING = 200, 100  # steps


def gain_of_depth(cell: Cell) -> dict[str, float]:
    from ..papers.objectives.bamboo import smoothness

    found = {}
    for name, host in (("deep", DEEP), ("usual", USUAL)):
        init = None
        if cell.arm == "mae":
            init = str(cell.pretrain("bamboo(decoder_depth=2)", host, into=f"{name}-pretrained", steps=PRETRAINING))
        model, numbers = cell.train(host, init=init, into=f"{name}-tuned")
        images = next(iter(cell.task.batches("test", 256)))[0]
        found |= {f"{name}_accuracy": numbers["accuracy"], f"{name}_cosine": smoothness(model, images).cosine[-1].item()}
    return found | {"gain_of_depth": found["deep_accuracy"] - found["usual_accuracy"]}


STUDY = Study(
    system="bamboo",
    claim="A deeper and narrower ViT of equal size gains more, or loses less, accuracy against the usual one after masked "
          "autoencoding than when it is trained to classify alone.",
    source="A Study on Transformer Configuration and Training Objective (arXiv 2205.10505), abstract and section 5",
    arms={"mae": DEEP, "supervised": DEEP},
    matched="steps",
    task="mnist5k",
    recipe={"steps": TUNING, "batch_size": 32},
    lrs=(1e-3,),
    seeds=3,
    decides=Decides("gain_of_depth", better="higher", by="difference", at_least=0.01),
    measure=gain_of_depth,
    published="ImageNet, ViT-B after masked autoencoding: 84.2 % deeper and narrower, 83.3 % as usual, 0.9 points less "
              "(abstract); by classification alone deeper and narrower is worse (in a figure; from memory)",
    scale="200 thousand parameters in 16 layers of 32 against 4 of 64, 200 steps of pre-training and 100 of fine-tuning on "
          "3,500 digits of 16 patches, of which 4 are seen, against 86 M, 1,600 epochs of ImageNet and 196 patches.",
    cannot="The best ratio of depth to width of large models; BERT with masked words on GLUE.",
)
