"""MatFormer: are the four models in one as good as four models that are trained apart, each for as many steps?

The number is the mean test loss of the four sizes. `agreement`: how often the smallest and the largest find the same next
byte likeliest, which decides how many drafts are taken in speculative decoding. `mixed`: the loss of a mixture of sizes
that was never trained, less the mean loss of the two sizes that it is between.
"""

from ..arena.study import Cell, Decides, Study

RATIOS = (0.5, 1, 2, 4)
LR = 3e-3


def four_sizes(cell: Cell) -> dict[str, float]:
    import torch

    from ..papers.channels.matformer import choose, mix_n_match

    split, losses, found, more = "val" if cell.quick else "test", [], [], {}
    batch = cell.task.train_batch(cell.seed + 1000, 0, 16)
    ids = batch[0] if isinstance(batch, tuple) else batch

    def look(model) -> None:
        losses.append(cell.task.evaluate(model, split)["loss"])
        with torch.no_grad():
            found.append(model.eval()(ids[:, :cell.study.task_options["context"]]).argmax(-1))

    if cell.arm == "matformer":
        model, _ = cell.train(lr=LR)
        for i in range(4):
            choose(model, i)
            look(model)
        choose(model, mix_n_match(4, 1.5))
        more = {"mixed": cell.task.evaluate(model, split)["loss"] - (losses[1] + losses[2]) / 2}
    else:
        for ratio in RATIOS:
            look(cell.train(f"gpt/nano:channel=mlp(ratio={ratio})", into=f"ratio{ratio}", lr=LR)[0])
    sizes = dict(zip(("S", "M", "L", "XL"), losses, strict=True))
    return {"loss": sum(losses) / 4, "agreement": float((found[0] == found[-1]).float().mean()), **sizes, **more}


STUDY = Study(
    system="matformer",
    claim="The models nested in one MatFormer have the losses of models that were trained for each size alone.",
    source="MatFormer (arXiv 2310.07707), section 4.1",
    arms={"matformer": "matformer/nano", "apart": "gpt/nano"},
    matched="steps",
    task="stdlib",
    task_options={"context": 64},
    recipe={"steps": 120, "batch_size": 16},
    lrs=(),
    seeds=3,
    decides=Decides("loss", better="lower", by="ratio", no_worse_by=0.02),
    measure=four_sizes,
    published="MatLM of 850M parameters: all sizes within about 1 % of the losses of models trained apart (from memory of "
              "the figure)",
    scale="200 thousand parameters and 120 steps of 1,024 bytes, against 850M parameters and 80B tokens. In both a size "
          "gets a quarter of the one run's steps.",
    cannot="Accuracy on tasks; time gained by speculative decoding; images and retrieval.",
)
