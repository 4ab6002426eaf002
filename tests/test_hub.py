"""Models on the Hub, which here is a small server on this machine: same addresses, headers and refusals, no network."""

import base64
import copy
import hashlib
import inspect
import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelHubMixin, constants
from safetensors.torch import save_file

import formarium as fm
from formarium.core.errors import BadCheckpoint, FormariumError, UnknownName
from formarium.core.registry import find, list_models

WRITER, READER = "hf_writer", "hf_reader"  # tokens that the server knows


class Hub(ThreadingHTTPServer):
    """The part of the Hub that models use: repositories with commits, large files elsewhere, tokens, errors."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # another host, as the Hub's store is
        self.repositories = {}  # name -> list of (commit, {path: bytes})
        self.large = {}  # SHA-256 -> bytes
        self.gated, self.cut, self.asked = set(), None, []

    def commit(self, name, files):
        before = self.repositories.setdefault(name, [])
        files = (before[-1][1] if before else {}) | files
        text = repr([(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())])
        before.append((hashlib.sha1(f"{len(before)} {text}".encode()).hexdigest(), files))
        return before[-1][0]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def say(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, message, code=""):
        self.say(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def handle_any(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.command in ("HEAD", "GET"):
            if path.startswith("large/"):
                return self.download(self.server.large[path.removeprefix("large/")])
            if "/resolve/" in path:
                name, _, rest = path.partition("/resolve/")
                return self.resolve(name, *rest.split("/", 1))
            if path.startswith("api/models/"):
                return self.refuse(404, "Repository not found", "RepoNotFound")
            return self.refuse(404, "Not found")
        if path == "api/validate-yaml":
            metadata = yaml.safe_load(json.loads(data)["content"].split("---\n")[1])
            bad = [] if metadata.get("license") != "nonsense" else [{"message": "license must be one of the known ones"}]
            return self.say(400 if bad else 200, {"errors": bad, "warnings": []})
        if path.startswith("large/"):  # an address that was signed for this upload
            oid = path.removeprefix("large/")
            if hashlib.sha256(data).hexdigest() != oid:
                return self.refuse(400, "The content does not match the object id")
            self.server.large[oid] = data
            return self.say(200)
        if token not in (WRITER, READER):
            return self.refuse(401, "Invalid username or password.")
        if token == READER:
            return self.refuse(403, "You don't have the rights to write under this namespace")
        return self.write(path, data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def write(self, path, data):
        if path == "api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            there = name in self.server.repositories
            if not there:
                self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.say(409 if there else 200, {"url": f"{self.server.url}/{name}"})
        elif "/preupload/" in path:
            self.say(200, {"files": [{"path": f["path"], "shouldIgnore": False,
                                      "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                                     for f in json.loads(data)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            address = f"{self.server.elsewhere}/large/"
            self.say(200, {"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": address + o["oid"]}}}
                for o in json.loads(data)["objects"]]})
        elif "/commit/" in path:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            rows = [json.loads(line) for line in data.splitlines()]
            files = {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
            files |= {r["value"]["path"]: self.server.large[r["value"]["oid"]] for r in rows if r["key"] == "lfsFile"}
            commit = self.server.commit(name, files)
            self.say(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self.refuse(404, "Not found")

    def resolve(self, name, revision, file):
        commits = self.server.repositories.get(name)
        if commits is None:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        if name in self.server.gated:
            return self.refuse(403, f"Access to model {name} is restricted", "GatedRepo")
        found = [c for c in commits if c[0] == revision] or (commits[-1:] if revision == "main" else [])
        if not found:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit, files = found[0]
        if file not in files:
            return self.say(404, X_Repo_Commit=commit, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        data = files[file]
        if file.endswith(".safetensors"):
            oid = hashlib.sha256(data).hexdigest()
            self.server.large[oid] = data
            return self.say(302, X_Repo_Commit=commit, X_Linked_Etag=f'"{oid}"', X_Linked_Size=str(len(data)),
                            Location=f"{self.server.elsewhere}/large/{oid}")
        return self.download(data, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    def download(self, data, **headers):
        """All of it, or what a Range asks for; cut: the connection breaks after so many bytes."""
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest, cut = data[first:], self.server.cut
        if first:
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if cut is None or self.command == "HEAD":
            return self.say(206 if first else 200, rest, **headers)
        self.say(206 if first else 200, rest[:cut], Content_Length=str(len(rest)), **headers)
        self.close_connection = True
        return None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, at the address that huggingface_hub believes to be the Hub's; no token but those given."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which this server does not speak
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the retries of huggingface_hub
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def stop(server):
    """No network from now on."""
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def vit(**changes):
    return create("vit/nano", **changes)


def create(name, **changes):
    return fm.create_model(name, **changes).eval()


def same(a, b):
    x = b.example(2)
    return type(a) is type(b) and a.recipe == b.recipe and not a.training and torch.equal(a(x), b(x))


def write(folder, **files):
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(data)


# a folder

@pytest.mark.parametrize("name", list_models("*/nano"))
def test_folder(name, tmp_path):
    """Every system: written and read again without a network, its card proper metadata."""
    model = fm.create_model(name)
    assert model.save_pretrained(tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = fm.Model.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.recipe == model.recipe == json.loads((tmp_path / "config.json").read_text())["recipe"]
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    card, system = ModelCard((tmp_path / "README.md").read_text()), find(name.split("/")[0])
    assert card.data.library_name == "formarium"
    assert {"formarium", system.name} < set(card.data.tags)
    assert card.data.pipeline_tag == (model.pipeline or None)
    assert (card.data.license is None) == (not system.card.licence)
    assert system.card.title in card.text
    assert system.card.claim in card.text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card.text


def test_doors(tmp_path):
    """Everything that reads a folder, or the file in it, reads the same: options and transforms are kept."""
    model = fm.apply(vit(num_classes=7, depth=3), "zero_tprune(keep=0.7)")
    model.save_pretrained(tmp_path)
    for again in (fm.from_pretrained(tmp_path), fm.from_pretrained(str(tmp_path)), type(model).from_pretrained(tmp_path),
                  fm.Model.from_pretrained(tmp_path), fm.load(tmp_path / "model.safetensors")):
        assert same(again, model)
        assert again.recipe["transforms"] == [{"name": "zero_tprune", "settings": {"keep": 0.7}}]
    assert "`vit/nano(num_classes=7, depth=3)`, then `zero_tprune(keep=0.7)`" in (tmp_path / "README.md").read_text()
    assert type(model).from_pretrained(tmp_path, drop_path=0.25).recipe["changes"]["drop_path"] == 0.25


def test_mixin():
    """It is the Hub's mixin to those who look, and nothing of it stands in a constructor's way."""
    model, cls = vit(mixer="cosformer"), type(vit())
    assert isinstance(model, ModelHubMixin)
    for method in ("push_to_hub", "save_pretrained"):
        assert inspect.signature(getattr(cls, method)) == inspect.signature(getattr(ModelHubMixin, method))
    theirs, ours = ({(p.name, p.kind, p.default) for p in inspect.signature(c.from_pretrained).parameters.values()}
                    for c in (ModelHubMixin, cls))
    assert theirs < ours
    assert "_hub_mixin_config" not in vars(model)
    assert "_hub_mixin_init_parameters" not in vars(cls)
    assert same(copy.deepcopy(model), model)
    assert same(pickle.loads(pickle.dumps(model)), model)


def test_metadata_of_a_card():
    """What the caller says comes before what the card says."""
    card = vit().generate_model_card(license="mit", datasets=["mnist"], model_name="me/digits")
    assert (card.data.license, card.data.datasets) == ("mit", ["mnist"])
    assert "fm.from_pretrained('me/digits')" in card.text
    assert "ImageNet top-1 (ImageNet-21k, 384 px) 83.97" in card.text
    assert vit().generate_model_card().data.license == "apache-2.0"
    assert create("restormer/nano").generate_model_card().data.license == "other"  # academic, non-commercial


def test_adapters(tmp_path):
    """A file of what was trained alone needs the model that was adapted: the model, its file, or its folder."""
    base = vit()
    tuned = fm.apply(base, "adaptformer").eval()
    with torch.no_grad():
        for p in (p for p in tuned.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn_like(p))
    (tmp_path / "adapters").mkdir()
    fm.save(tuned, tmp_path / "adapters" / "model.safetensors", only="trained")
    base.save_pretrained(tmp_path / "base")
    for given in (base, tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        assert same(fm.from_pretrained(tmp_path / "adapters", base=given), tuned)
    with pytest.raises(BadCheckpoint, match="holds only what was trained: give the model that was adapted"):
        fm.from_pretrained(tmp_path / "adapters")
    with pytest.raises(BadCheckpoint, match=r"adapters has no config.json; fm.from_pretrained finds out"):
        fm.Model.from_pretrained(tmp_path / "adapters")
    write(tmp_path / "adapters", config__json={"recipe": tuned.recipe})
    assert same(type(base).from_pretrained(tmp_path / "adapters", base=base), tuned)


@pytest.mark.parametrize(("spoil", "why"), [
    ({"config__json": b"<html>"}, "config.json is damaged: it is no JSON"),
    ({"config__json": b"[" * 100_000}, "config.json is damaged: it is no JSON"),
    ({"config__json": {"model_type": "vit"}}, "has no recipe of ours; fm.from_pretrained finds out"),
    ({"config__json": [1]}, "has no recipe of ours; fm.from_pretrained finds out"),
    ({"config__json": {"recipe": 3}}, "is damaged: its recipe is not one"),
    ({"config__json": {"recipe": {"name": "swim/nano", "changes": {}}}}, "unknown system 'swim'; did you mean swin"),
    ({"config__json": {"recipe": {"name": "vit/nono", "changes": {}}}}, "unknown variant of vit 'nono'; did you mean nano"),
    ({"config__json": {"recipe": {"name": "gpt/nano", "changes": {}}}}, "holds gpt/nano, which is a GPT, not a ViT"),
    ({"model__safetensors": b"\x10"}, "model.safetensors is damaged or truncated"),
])
def test_damaged_folder(spoil, why, tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    write(tmp_path, **spoil)
    with pytest.raises(FormariumError, match=why):
        type(model).from_pretrained(tmp_path)


def test_folder_without_weights(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for door in (fm.from_pretrained, fm.Model.from_pretrained):
        with pytest.raises(BadCheckpoint, match=r"holds no weights|has no model\.safetensors"):
            door(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"model.safetensors has no recipe of ours; fm.from_pretrained finds out"):
        fm.Model.from_pretrained(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"model.safetensors is a file: fm.load reads it"):
        fm.from_pretrained(tmp_path / "model.safetensors")


# the Hub

def test_push_and_pull(hub, tmp_path):
    """Pushed, and read into a cold cache: the same answers; an older commit is still there; no network is needed again."""
    first, second = vit(num_classes=5), vit(num_classes=5)
    url = first.push_to_hub("me/digits", token=WRITER, model_card_kwargs={"license": "mit"})
    commit, files = hub.repositories["me/digits"][-1]
    assert str(url).endswith(f"/me/digits/commit/{commit}")
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() in hub.large
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert "fm.from_pretrained('me/digits')" in card.text
    assert same(fm.from_pretrained("me/digits"), first)
    second.push_to_hub("me/digits", token=WRITER)
    for i, door in enumerate((fm.from_pretrained, fm.Model.from_pretrained, type(first).from_pretrained)):
        assert same(door("me/digits", cache_dir=tmp_path / f"cold{i}"), second)
        assert same(door("me/digits", cache_dir=tmp_path / f"cold{i}", revision=commit), first)
    assert same(fm.from_pretrained("me/digits"), second)
    stop(hub)
    assert same(fm.from_pretrained("me/digits"), second)
    assert same(fm.from_pretrained("me/digits", local_files_only=True), second)
    assert same(type(first).from_pretrained("me/digits", cache_dir=tmp_path / "cold2"), second)
    with pytest.raises(FormariumError, match=r"not in the cache, and http://127.* did not answer"):
        fm.from_pretrained("me/digits", cache_dir=tmp_path / "empty")


def test_push_a_folder(hub, tmp_path):
    """`save_pretrained` can push, too; a name without an owner is of the one whose token it is."""
    model = vit()
    model.save_pretrained(tmp_path / "small", push_to_hub=True, token=WRITER)
    assert same(fm.from_pretrained("me/small"), model)


def test_adapters_of_the_hub(hub, tmp_path):
    base = vit()
    tuned = fm.apply(base, "adaptformer").eval()
    base.push_to_hub("me/base", token=WRITER)
    fm.save(tuned, tmp_path / "a.safetensors", only="trained")
    commit = hub.commit("me/adapters", {"model.safetensors": (tmp_path / "a.safetensors").read_bytes()})
    assert same(fm.from_pretrained("me/adapters", base="me/base"), tuned)
    assert same(fm.from_pretrained("me/adapters", base="me/base", revision=commit), tuned)  # a commit of the adapters alone


def test_repository_of_others(hub, tmp_path):
    """timm's weights under timm's names, whole and in shards: detected, not believed to be ours."""
    model = vit()
    theirs = find("vit").module.KEYS["timm"].convert(model.state_dict(), back=True).state
    parts = [dict(sorted(theirs.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(["whole", *names], [theirs, *parts], strict=True):
        save_file({k: v.contiguous() for k, v in part.items()}, tmp_path / name)
    index = {"metadata": {}, "weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part}}
    config = json.dumps({"architecture": "vit_nano", "num_classes": 1000}).encode()
    hub.commit("timm/whole", {"config.json": config, "model.safetensors": (tmp_path / "whole").read_bytes()})
    hub.commit("timm/shards", {"config.json": config, "model.safetensors.index.json": json.dumps(index).encode()}
               | {n: (tmp_path / n).read_bytes() for n in names})
    x = model.example(2)
    for name in ("timm/whole", "timm/shards"):
        assert torch.equal(fm.from_pretrained(name)(x), model(x))
        with pytest.raises(BadCheckpoint, match=r"has no recipe of ours; fm\.from_pretrained finds out what timm/"):
            type(model).from_pretrained(name)
    found, report = fm.from_pretrained("timm/whole", report=True)
    assert torch.equal(found(x), model(x))
    assert "timm" in str(report)
    hub.commit("timm/lost", {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(BadCheckpoint, match=r"timm/lost has no model-00001-of-00002\.safetensors"):
        fm.from_pretrained("timm/lost")
    hub.commit("timm/odd", {"model.safetensors.index.json": b'{"weight_map": 3}'})
    with pytest.raises(BadCheckpoint, match="does not say which files hold the weights"):
        fm.from_pretrained("timm/odd")


def test_config_of_others(hub, tmp_path):
    """The heads that no tensor tells are downloaded too, and a name is passed on to `load`."""
    theirs = find("vit").module.KEYS["timm"].convert(vit(heads=2).state_dict(), back=True).state
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "m")
    hub.commit("me/few", {"config.json": json.dumps({"model_type": "vit", "num_attention_heads": 2}).encode(),
                          "model.safetensors": (tmp_path / "m").read_bytes()})
    assert fm.from_pretrained("me/few", name="vit").recipe["changes"]["heads"] == 2
    assert fm.from_pretrained("me/few", name="vit", heads=4).recipe["changes"].get("heads", 4) == 4


@pytest.mark.parametrize(("name", "options", "kind", "why"), [
    ("me/nothing", {}, UnknownName, r"no folder me/nothing, and no such repository at http://127"),
    ("me/nothing", {"token": READER}, UnknownName, "if it is private, log in"),
    ("no/such/folder", {}, UnknownName, "neither a folder nor the name of a repository"),
    ("a b", {}, UnknownName, "neither a folder nor the name of a repository"),
    ("me/there", {"revision": "v9"}, UnknownName, "me/there has no such revision"),
    ("me/there", {"token": True}, FormariumError, "me/there could not be read"),
    ("me/there", {"local_files_only": True}, FormariumError, "not in the cache, and http://127.* was not asked"),
    ("me/gated", {}, FormariumError, r"me/gated is gated: accept its conditions at http://127\S*/me/gated, then log in"),
    ("me/empty", {}, BadCheckpoint, "me/empty has no (config.json|model.safetensors or)"),
])
def test_refused_reading(name, options, kind, why, hub):
    hub.commit("me/there", {"config.json": b"{}", "model.safetensors": b"none"})
    hub.commit("me/gated", {"config.json": b"{}", "model.safetensors": b"none"})
    hub.commit("me/empty", {"README.md": b"none"})
    hub.gated.add("me/gated")
    for door in (fm.from_pretrained, fm.Model.from_pretrained):
        with pytest.raises(kind, match=why):
            door(name, **options)


@pytest.mark.parametrize(("name", "options", "why"), [
    ("me/mine", {}, "refuses.*401"),
    ("me/mine", {"token": "hf_wrong"}, "refuses.*401"),
    ("you/yours", {"token": READER}, "refuses.*rights to write under this namespace.*log in"),
    ("a/b/c", {"token": WRITER}, "neither a folder nor the name of a repository"),
    ("me/mine", {"token": WRITER, "model_card_kwargs": {"license": "nonsense"}}, "does not take me/mine.*license must be"),
])
def test_refused_writing(name, options, why, hub):
    with pytest.raises(FormariumError, match=why):
        vit().push_to_hub(name, **options)
    assert all("config.json" not in commits[-1][1] for commits in hub.repositories.values())


def test_push_without_network(hub):
    stop(hub)
    with pytest.raises(FormariumError, match=r"no connection to http://127"):
        vit().push_to_hub("me/mine", token=WRITER)


def test_push_without_recipe(hub):
    """A model that was not made by name could not be built again: nothing is written of it."""
    model = vit()
    del model.recipe
    with pytest.raises(FormariumError, match="this model has no recipe"):
        model.push_to_hub("me/mine", token=WRITER)
    assert len(hub.repositories["me/mine"]) == 1


def test_interrupted_download(hub, tmp_path, monkeypatch):
    """It is told plainly, leaves nothing in the cache that would be believed, and the next call succeeds."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2 ** 16)
    model = vit()
    model.push_to_hub("me/mine", token=WRITER)
    whole = len(hub.repositories["me/mine"][-1][1]["model.safetensors"])
    hub.cut = 0
    with pytest.raises(FormariumError, match=r"broke off|could not be read"):
        fm.from_pretrained("me/mine")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
    hub.cut = whole // 3  # each answer breaks off, each gives a third: huggingface_hub resumes
    assert same(fm.from_pretrained("me/mine"), model)
    hub.cut = None
    assert same(fm.from_pretrained("me/mine", cache_dir=tmp_path), model)
