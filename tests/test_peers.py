"""Models of the transformers library, made from configurations: their weights in ours, ours in theirs, the same answers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from formarium.core.build import preset
from formarium.core.registry import find
from formarium.weights.load import load
from golden_replay import load_filled

SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80}
TEXT = SIZES | {"vocab_size": 60, "max_position_embeddings": 24}


@dataclass(frozen=True)
class Peer:
    """`build()`: their model. answer: from what it gives. options: those that the tensors cannot tell.

    in_memory: their state dict has the names of their files. beside: tensors that we have not and they make, or that we
    write and only their version 4 reads. idle: parameters of theirs that have no effect.
    """

    build: Callable[[], torch.nn.Module]
    answer: Callable[[Any], torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    in_memory: bool = True
    beside: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()


def hidden(told: Any) -> torch.Tensor:
    return told.last_hidden_state


def logits(told: Any) -> torch.Tensor:
    return told.logits


PEERS = {
    "bert": Peer(lambda: transformers.BertModel(transformers.BertConfig(
        **TEXT, num_hidden_layers=2), add_pooling_layer=False),
        hidden, {"heads": 4}, beside=frozenset({"pooler.dense.weight", "pooler.dense.bias"})),
    "albert": Peer(lambda: transformers.AlbertModel(transformers.AlbertConfig(
        **TEXT, embedding_size=20, num_hidden_layers=5, num_hidden_groups=2), add_pooling_layer=False),
        hidden, {"heads": 4, "depth": 5}, beside=frozenset({"pooler.weight", "pooler.bias"})),
    "gpt": Peer(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=24, n_embd=48, n_layer=2, n_head=4, n_inner=80, bos_token_id=0, eos_token_id=0)),
        logits, {"heads": 4}),
    "reformer": Peer(lambda: transformers.ReformerModelWithLMHead(transformers.ReformerConfig(
        is_decoder=True, vocab_size=60, hidden_size=48, num_attention_heads=4, attention_head_size=12, feed_forward_size=80,
        max_position_embeddings=24, axial_pos_shape=(4, 6), axial_pos_embds_dim=(16, 32), attn_layers=["local"] * 2,
        local_attn_chunk_length=8)), logits, {"heads": 4, "chunk": 8}, beside=frozenset({"lm_head.decoder.bias"}),
        idle=("lm_head.bias",)),  # which version 4 adds to the logits, and 5.23 has and forgets
    "vit": Peer(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
        **SIZES, num_hidden_layers=2, image_size=32, patch_size=8, num_labels=5)), logits, {"heads": 4}, in_memory=False),
    "swin": Peer(lambda: transformers.SwinForImageClassification(transformers.SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=64, patch_size=4, num_labels=5)),
        logits, {"img_size": 64}, in_memory=False),
    "poolformer": Peer(lambda: transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_labels=5)), logits),
}


@pytest.fixture(scope="module", params=PEERS)
def pair(request):
    """Their model with weights away from their start, and ours, loaded from its state dict without a name."""
    peer = PEERS[request.param]
    torch.manual_seed(0)
    theirs = peer.build().eval()
    load_filled(theirs)
    with torch.no_grad():
        for name in peer.idle:
            theirs.get_parameter(name).zero_()
    ours = load(theirs.state_dict(), **peer.options)
    assert isinstance(ours, preset(f"{request.param}/nano").target)
    return peer, theirs, ours


def example(ours):
    torch.manual_seed(1)
    return ours.example(2)


def written(ours):
    """Our state dict in their files' names."""
    made = find(ours.recipe["name"].split("/")[0]).module.KEYS["transformers"].convert(ours.state_dict(), back=True)
    assert made.unmatched == []
    return {k: v.clone().contiguous() for k, v in made.state.items()}


@torch.no_grad()
def test_their_weights_in_ours(pair):
    peer, theirs, ours = pair
    batch = example(ours)
    assert_close(ours(batch), peer.answer(theirs(batch)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_our_weights_in_theirs(pair, tmp_path):
    """By a file, and where the names in memory are those of files, by load_state_dict, strictly."""
    peer, theirs, ours = copy.deepcopy(pair)
    torch.manual_seed(2)
    for p in ours.parameters():
        p.mul_(1 + 0.1 * torch.randn_like(p))
    batch = example(ours)
    want = ours(batch)
    assert (want - peer.answer(theirs(batch))).abs().max() > 1e-2
    theirs.save_pretrained(tmp_path)
    file, state = tmp_path / "model.safetensors", written(ours)
    own = {k: v.shape for k, v in load_file(file).items()}
    assert own.items() <= {k: v.shape for k, v in state.items()}.items()
    save_file(state, file, {"format": "pt"})
    read, told = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert told.pop("missing_keys") | told.pop("unexpected_keys") == peer.beside
    assert not any(told.values()), told
    assert_close(peer.answer(read.eval()(batch)), want, atol=1e-4, rtol=1e-4)
    if peer.in_memory:
        theirs.load_state_dict({k: v for k, v in state.items() if k not in peer.beside}, strict=True)
        assert_close(peer.answer(theirs(batch)), want, atol=1e-4, rtol=1e-4)


def test_names_in_memory(pair):
    """`in_memory` is said of the models it is true of, so that the test above leaves none out."""
    peer, theirs, ours = pair
    assert (set(written(ours)) - peer.beside == set(theirs.state_dict())) is peer.in_memory


@pytest.mark.parametrize("shards", ["50GB", "40KB"])
@torch.no_grad()
def test_a_folder_of_theirs_states_the_heads(tmp_path, shards):
    """96 channels are rather one head of 96 or three of 32: the tensors do not tell, config.json does."""
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=16,
        patch_size=4)).eval()
    load_filled(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    images = torch.randn(2, 3, 16, 16)
    ours, report = load(tmp_path, report=True)
    assert "heads=3: config.json beside it says so" in report.notes
    assert_close(ours(images), theirs(images).logits, atol=1e-4, rtol=1e-4)
    assert load(tmp_path, heads=6).recipe["changes"]["heads"] == 6
    for broken in ("{", '{"model_type": "vit", "num_attention_heads": "3"}', '{"num_attention_heads": 3}', "[1]"):
        (tmp_path / "config.json").write_text(broken)
        assert "heads" in load(tmp_path, report=True)[1].assumed
