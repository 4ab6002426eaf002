"""Listing: cards that were read before are not read again, and never one too old; 262 systems are listed at once."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import formarium
from formarium.core import registry
from formarium.core.registry import Cards, _entry_points, list_models, systems

CARD = '''
CARD = Card(
    title="{}", kind="mixer", domain="image", year=2026, tags=("a", "b"), hosts=("vit/nano",), exceptions={{"x": "y"}},
    variants={{
        "nano": Published(params=1e3, input=(3, 32, 32), results={{"top-1": 81.5}}),
        "tiny": Published(note="ours"),
    }},
)
'''


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A file with a card, last changed an hour ago; the cache is in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "paper.py"
    path.write_text(CARD.format("Old"))
    age(path)
    return path


def age(path):
    then = path.stat().st_mtime_ns - 3600 * 10 ** 9
    os.utime(path, ns=(then, then))


def listed(path, monkeypatch=None):
    """The card as a new process would read it; with monkeypatch, without parsing."""
    cards = Cards()
    if monkeypatch is not None:
        with monkeypatch.context() as m:
            m.setattr(registry, "_assigned", lambda pattern, path: pytest.fail("parsed again"))
            return cards.read(path)
    found = cards.read(path)
    cards.keep([path])
    return found


def test_read_once(paper, monkeypatch):
    """The second process has the same card, tuples and all, without parsing."""
    card = listed(paper)
    assert card == registry._assigned(registry._CARD, paper)
    assert card.variants["nano"].input == (3, 32, 32)
    assert listed(paper, monkeypatch) == card


def test_edit_is_seen(paper, monkeypatch):
    """Also one that leaves the size, and one that leaves size and time of change."""
    assert listed(paper).title == "Old"
    before = paper.stat()
    paper.write_text(CARD.format("New"))
    assert paper.stat().st_size == before.st_size
    assert listed(paper).title == "New"
    paper.write_text(CARD.format("Hid"))
    os.utime(paper, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listed(paper).title == "Hid"
    assert listed(paper, monkeypatch).title == "Hid"


def test_changed_just_now(paper):
    """A clock's tick may hide the next edit, so this file is not kept yet."""
    paper.write_text(CARD.format("Now"))
    assert listed(paper).title == "Now"
    assert Cards().kept == {}


def test_other_code(paper, monkeypatch):
    """What another version of the reader kept is not believed."""
    listed(paper)
    assert Cards().kept
    monkeypatch.setattr(Cards, "stamp", staticmethod(lambda path: [1, 2, 3]))
    assert Cards().kept == {}


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b.replace(b"Old", b"Odd"), lambda b: b"0\n" + b, lambda b: b"\n{}",
    lambda b: b"\xff" * 100, lambda b: b"[]",
])
def test_damaged_cache(damage, paper, monkeypatch):
    """It is ignored, and written anew."""
    listed(paper)
    kept = Cards().path
    kept.write_bytes(damage(kept.read_bytes()))
    assert Cards().kept == {}
    assert listed(paper).title == "Old"
    assert listed(paper, monkeypatch).title == "Old"


def test_no_cache(paper, monkeypatch):
    """A folder that cannot be made is no error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(paper))
    assert listed(paper).title == "Old"
    assert listed(paper).title == "Old"
    assert not Cards().path.exists()


def test_forgets_what_is_gone(paper, tmp_path):
    listed(paper)
    other = shutil.copy2(paper, tmp_path / "other.py")
    assert listed(other).title == "Old"
    assert Cards().kept.keys() == {str(other)}
    assert [p.name for p in Cards().path.parent.iterdir()] == [Cards().path.name]


def test_a_card_that_json_would_change(paper, monkeypatch):
    """It is read each time, and right."""
    paper.write_text(CARD.format("Old").replace('"Old"', '("a", "b")'))
    age(paper)
    assert listed(paper).title == ("a", "b")
    assert Cards().kept == {}


@pytest.mark.parametrize("kind", ["plugin-1.0.dist-info", "plugin.egg-info", "EGG-INFO"])
def test_entry_points(kind, tmp_path, monkeypatch):
    """A package that brings papers is found, by whatever it was installed."""
    folder = tmp_path / ("plugin-1.0-py3.egg" if kind == "EGG-INFO" else "site")
    (folder / kind).mkdir(parents=True)
    (folder / kind / ("PKG-INFO" if "egg" in kind.lower() else "METADATA")).write_text("Name: plugin\nVersion: 1.0\n")
    (folder / kind / "entry_points.txt").write_text("[formarium.papers]\nmy_paper = my_paper\n")
    (folder / "my_paper.py").write_text(CARD.format("Mine"))
    assert "my_paper" not in systems()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    _entry_points.cache_clear()
    try:
        assert systems()["my_paper"].card.title == "Mine"
        assert "my_paper/tiny" in list_models()
    finally:
        monkeypatch.undo()
        _entry_points.cache_clear()
    assert "my_paper" not in systems()


def test_imports_little():
    """Neither torch nor the Hub's library, nor the packages' metadata, is needed to list."""
    code = ("import sys, formarium as fm; assert fm.list_models('*')\n"
            "assert not {'torch', 'huggingface_hub', 'importlib.metadata'} & set(sys.modules), sorted(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


COUNT = """
import json
from formarium.core import registry
read, parse = [], registry._assigned
registry._assigned = lambda pattern, path: (read.append(path.stem), parse(pattern, path))[1]
registry.list_models()
print(json.dumps(read))
"""


def test_262_systems(tmp_path):
    """Each card is parsed once; after an edit, that file alone."""
    package = tmp_path / "formarium"
    shutil.copytree(Path(formarium.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    papers = [p for p in sorted((package / "papers").rglob("*.py")) if p.name != "__init__.py"]
    for i in range(262 - len(papers)):
        of = papers[i % len(papers)]
        shutil.copy2(of, of.with_name(f"{of.stem}_{i}.py"))
    for path in (package / "papers").rglob("*.py"):
        age(path)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command):
        told = subprocess.run([sys.executable, *command], env=env, check=True, capture_output=True, text=True)
        return json.loads(told.stdout)

    command = ["-m", "formarium.cli", "list", "--json"]
    said = run(*command)
    assert len(said) == 262
    assert run("-c", COUNT) == []
    assert run(*command) == said
    edited = papers[0]
    edited.write_text(edited.read_text().replace("year=20", "year=21"))
    assert run("-c", COUNT) == [edited.stem]
    assert [r["system"] for r, old in zip(run(*command), said, strict=True) if r != old] == [edited.stem]
    assert sorted(os.listdir(tmp_path / "cache" / "formarium"))[0].startswith("cards-")
