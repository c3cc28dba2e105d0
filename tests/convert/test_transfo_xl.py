"""Transformer-XL checkpoints of both projects, and vocabularies that are pickles: read as data, or refused."""

from __future__ import annotations

import collections
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lnlm.convert.plain_pickle import read_plain_pickle
from hf_lnlm.convert.transfo_xl import transfo_xl_from_state
from hf_lnlm.errors import UsageProblem
from hf_lnlm.flows.convert import convert
from tests.models.hybrid.test_transfo_xl import SHAPES, text
from tests.models.hybrid.transfo_xl_peer import Peer, Shape

WORDS = ["<eos>", "the", ",", "<unk>", *[f"word{i}" for i in range(56)]]


def written(shape: Shape, folder: Path, kind: str) -> Peer:
    """A checkpoint of the old layout: all tied names, or only those that safetensors keeps."""
    peer = Peer(shape).eval()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(peer.config()))
    state = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        kept = {name for name, _ in peer.named_parameters()}
        save_file(
            {n: t for n, t in state.items() if n in kept}, folder / "model.safetensors", metadata={"format": "pt"}
        )
    return peer


def vocabulary(**fields: Any) -> dict[str, Any]:
    """What the old tokenizer pickled of itself."""
    numbers = collections.OrderedDict((word, i) for i, word in enumerate(WORDS))
    return {
        "counter": collections.Counter({"the": 3}),
        "special": ["<eos>"],
        "min_freq": 0,
        "max_size": None,
        "lower_case": False,
        "delimiter": None,
        "vocab_file": None,
        "never_split": ("<unk>",),
        "idx2sym": list(WORDS),
        "sym2idx": numbers,
        **fields,
    }


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_of_transformers(name: str, kind: str, tmp_path: Path):
    peer = written(SHAPES[name], tmp_path / "old", kind)
    (tmp_path / "old" / "vocab.bin").write_bytes(pickle.dumps(vocabulary()))
    folder = convert(tmp_path / "old", tmp_path / "new", from_kind="transfo-xl")
    ours, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids, mems, cache = text(2, 12), None, None
    for piece in (ids[:, :5], ids[:, 5:]):
        with torch.no_grad():
            wanted, mems = peer(piece, mems)
            out = ours(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits.log_softmax(-1), wanted, rtol=0.0, atol=3e-5)
    assert tokenizer("the word3 , unseen").input_ids == [1, 7, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 3)


def reversed_clusters(peer: Peer) -> dict[str, torch.Tensor]:
    """The state dict as kimiyoung's code has it: no prefix, the clusters' scores from the last to the first."""
    state = {name.removeprefix("transformer."): t.clone() for name, t in peer.state_dict().items()}
    for part in ("weight", "bias"):
        state[f"crit.cluster_{part}"] = state[f"crit.cluster_{part}"].flip(0)
    return state


def test_checkpoints_of_the_original_code(tmp_path: Path):
    """Sizes come from the weights; memory, clamp and the rest from `fields`. The memory begins empty."""
    peer = Peer(SHAPES["clusters"]._replace(untie_r=False, mem_len=0, same_length=False, clamp_len=-1)).eval()
    torch.save(reversed_clusters(peer), tmp_path / "weights.pt")
    folder = convert(tmp_path / "weights.pt", tmp_path / "new", fields={"mem_len": 6})
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert tuple(ours.config.reach) == (6, None, False)
    assert (ours.config.mem_init, ours.config.untie_r) == ("empty", False)
    ids = text(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peer(ids)[0], rtol=0.0, atol=3e-5)


def test_one_table_needs_its_clusters_told(tmp_path: Path):
    peer = Peer(SHAPES["one table"]._replace(mem_len=0)).eval()
    state = reversed_clusters(peer)
    with pytest.raises(ValueError, match=r"crit\.cluster"):
        transfo_xl_from_state(state, {}, {"pre_norm": True})
    ours = transfo_xl_from_state(state, {}, {"pre_norm": True, "adaptive_cutoffs": [20, 40], "adaptive_div_value": 1})
    ids = text(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, peer(ids)[0], rtol=0.0, atol=3e-5)


def test_untied_weights_stay_apart():
    for name in ("projected", "clusters"):
        peer = Peer(SHAPES[name]).eval()
        for layer in peer.crit.out_layers:
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
        ours = transfo_xl_from_state(peer.state_dict(), peer.config(), {})
        assert not ours.config.tie_word_embeddings
        ids = text(2, 7)
        with torch.no_grad():
            found = ours(ids).logits.log_softmax(-1)
            torch.testing.assert_close(found, peer(ids)[0], rtol=0.0, atol=3e-5)


def test_missing_and_unknown_weights_are_named():
    peer = Peer(SHAPES["clusters"])
    state = dict(peer.state_dict())
    del state["transformer.layers.1.dec_attn.r_net.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.attention\.r_net\.weight"):
        transfo_xl_from_state(state, peer.config(), {})
    state = {**peer.state_dict(), "transformer.layers.0.dec_attn.gate.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"no Transformer-XL has: layers\.0\.dec_attn\.gate\.weight"):
        transfo_xl_from_state(state, peer.config(), {})
    with pytest.raises(ValueError, match="attn_type must be 0"):
        transfo_xl_from_state(peer.state_dict(), {**peer.config(), "attn_type": 2}, {})


def test_a_pickled_module_is_refused_with_the_lines_that_export_it(tmp_path: Path):
    """What the original's training script leaves: the module itself, whose class would have to be imported and run."""
    folder = tmp_path / "trained"
    folder.mkdir()
    torch.save(Peer(SHAPES["plain"]), folder / "model.pt")
    with pytest.raises(UsageProblem, match=r"torch\.save\(model\.state_dict\(\)"):
        convert(folder, tmp_path / "new", from_kind="transfo-xl")
    assert not (tmp_path / "new").exists()


class _Caught:
    """A pickle that would run a command."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _hostile(folder: Path) -> list[bytes]:
    """Pickles that write a file when an unpickler reads them, each by another opcode."""
    trace = str(folder / "trace")
    code = f"open({trace!r}, 'w').close()"
    by_reduce = pickle.dumps({**vocabulary(), "special": _Caught(exec, (code,))})
    by_name = b"c__builtin__\nexec\n(S" + repr(code).encode() + b"\ntR."
    by_inst = b"(S" + repr(code).encode() + b"\ni__builtin__\nexec\n."
    by_obj = b"(c__builtin__\nexec\nS" + repr(code).encode() + b"\no."
    by_counter = b"ccollections\nCounter\n(c__builtin__\nlist\ntR."
    return [by_reduce, by_name, by_inst, by_obj, by_counter]


def test_nothing_of_a_hostile_vocabulary_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(SHAPES["plain"], tmp_path / "old", "safetensors")
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, lambda *_a, **_k: pytest.fail("a pickle is loaded"))
    for i, content in enumerate(_hostile(tmp_path)):
        (tmp_path / "old" / "vocab.pkl").write_bytes(content)
        with pytest.raises(UsageProblem, match="must hold plain data"):
            convert(tmp_path / "old", tmp_path / f"new{i}", from_kind="transfo-xl")
        assert not (tmp_path / "trace").exists() and not (tmp_path / f"new{i}").exists()


def test_a_hostile_pickle_is_one(tmp_path: Path):
    """The control: an unpickler runs each that ends in a call of `exec`."""
    for content in _hostile(tmp_path)[:4]:
        pickle.loads(content)
        (tmp_path / "trace").unlink()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("saved", ["pickle", "torch", "torch without zip"])
def test_plain_data_is_read_of_every_protocol(protocol: int, saved: str, tmp_path: Path):
    path = tmp_path / "vocab.bin"
    numbers = [1, -2, 70_000, 2**40, -(2**70), 1.5, True, False, None]
    data = vocabulary(numbers=numbers, nested=[[], {}, (), (1, 2), [[3], "é"]])
    data["again"] = data["special"]
    if saved == "pickle":
        path.write_bytes(pickle.dumps(data, protocol))
    elif protocol == 2:
        torch.save(data, path, _use_new_zipfile_serialization=saved == "torch")
    else:
        pytest.skip("torch writes protocol 2")
    found = read_plain_pickle(path)
    assert found == data
    assert type(found["sym2idx"]) is dict and type(found["counter"]) is dict
    assert found["again"] is found["special"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"N", b"NN.", b"(lp0\n", b"]K\x01K\x02s.", b"h\x07."])
def test_damaged_pickles_are_refused(content: bytes, tmp_path: Path):
    (tmp_path / "vocab.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"vocab\.pkl must hold plain data"):
        read_plain_pickle(tmp_path / "vocab.pkl")


def test_classes_and_calls_are_named(tmp_path: Path):
    path = tmp_path / "vocab.pkl"
    for held, named in ((Path("x"), "pathlib"), (sys.exit, "exit"), (torch.Size([1]), "torch.Size")):
        path.write_bytes(pickle.dumps({"idx2sym": held}))
        with pytest.raises(ValueError, match=named):
            read_plain_pickle(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"idx2sym": ["a", "a"], "sym2idx": {"a": 1}}, "which sym2idx says is 1"),
        ({"idx2sym": ["a", 3], "sym2idx": {"a": 0}}, r"idx2sym\[1\] is 3"),
        ({"idx2sym": {"a": 0}}, "idx2sym"),
    ],
)
def test_vocabularies_that_contradict_themselves_are_refused(fields: dict, message: str, tmp_path: Path):
    written(SHAPES["plain"], tmp_path / "old", "safetensors")
    (tmp_path / "old" / "vocab.pkl").write_bytes(pickle.dumps(vocabulary(**fields)))
    with pytest.raises(UsageProblem, match=message):
        convert(tmp_path / "old", tmp_path / "new")


def test_words_exported_as_text(tmp_path: Path):
    written(SHAPES["plain"], tmp_path / "old", "safetensors")
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    folder = convert(tmp_path / "old", tmp_path / "new")
    assert AutoTokenizer.from_pretrained(folder)("word0 the <eos>").input_ids == [4, 1, 0]
    (tmp_path / "old" / "vocab.txt").write_text("\n".join([*WORDS[:-1], "the"]), encoding="utf-8")
    with pytest.raises(UsageProblem, match="a word stands there twice"):
        convert(tmp_path / "old", tmp_path / "other")
