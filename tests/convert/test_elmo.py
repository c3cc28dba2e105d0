"""ELMo's published layout: in and back, bit for bit, both projects' variants; damage is named; nothing is lost."""

from __future__ import annotations

import json
import sys

import h5py
import pytest
import torch

from hf_lnlm import ElmoConfig, ElmoModel
from hf_lnlm.convert import elmo
from hf_lnlm.flows.convert import convert

OPTIONS = {
    "lstm": {
        "cell_clip": 3,
        "use_skip_connections": True,
        "n_layers": 2,
        "proj_clip": 3,
        "projection_dim": 6,
        "dim": 10,
    },
    "char_cnn": {
        "embedding": {"dim": 4},
        "filters": [[1, 4], [3, 6]],
        "n_highway": 2,
        "n_characters": 262,
        "max_characters_per_token": 50,
        "activation": "relu",
    },
}
CELL = "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell"


def variant(name: str) -> dict:
    """AllenNLP's options, or those that bilm-tf writes: no skip connections, fields of training, no highways."""
    found = json.loads(json.dumps(OPTIONS))
    if name == "bilm-tf":
        found |= {"bidirectional": True, "dropout": 0.1, "n_epochs": 10}
        del found["lstm"]["use_skip_connections"], found["char_cnn"]["n_highway"]
        found["char_cnn"] |= {"n_characters": 261, "activation": "tanh"}
        found["lstm"]["projection_dim"] = 10  # as wide as the maps: bilm-tf has no projection of word vectors then
    return found


def published(folder, options: dict):
    """A folder in the published layout with made-up weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    model = ElmoModel(elmo.config_of(options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if name == "embed_tokens.weight":
                parameter[0] = 0
    variables = elmo.to_variables(model)
    if "n_highway" not in options["char_cnn"]:
        variables = {name: value for name, value in variables.items() if not name.startswith("CNN_proj")}
        variables["RNN_0/global_step"] = torch.zeros(1)  # of training, no part of the model
    elmo.write(folder, variables, options)
    return folder, variables


def datasets(path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, it: found.update({name: torch.from_numpy(it[...])}) if isinstance(it, h5py.Dataset) else None
        )
    return found


@pytest.mark.parametrize("name", ["allennlp", "bilm-tf"])
def test_there_and_back_bit_for_bit(name, tmp_path):
    source, variables = published(tmp_path / "source", variant(name))
    ours = convert(source, tmp_path / "ours", from_kind="allennlp-elmo")
    model = ElmoModel.from_pretrained(ours)
    assert model.config.use_skip_connections is (name == "allennlp")
    assert (ours / "tokenizer.json").is_file()
    back = convert(ours, tmp_path / "back", to_kind="allennlp-elmo")
    found = datasets(back / "lm_weights.hdf5")
    assert found.keys() == variables.keys() - {"RNN_0/global_step"}
    assert all(torch.equal(found[key], variables[key]) for key in found)
    again = elmo.read(back, {})
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert elmo.options_of(again.config) == elmo.options_of(model.config)


def test_one_cell_by_hand(tmp_path):
    """TensorFlow's gates are i, g, f, o, in columns; ours i, f, g, o, in rows."""
    source, _ = published(tmp_path / "source", OPTIONS)
    kernel = datasets(source / "lm_weights.hdf5")[f"{CELL}/W_0"]
    cell = elmo.read(source, {}).layers[0].forwards
    for ours, theirs in enumerate((0, 2, 1, 3)):
        rows, columns = slice(10 * ours, 10 * ours + 10), slice(10 * theirs, 10 * theirs + 10)
        assert torch.equal(cell.input_gates.weight[rows], kernel[:6, columns].T)
        assert torch.equal(cell.recurrent_gates.weight[rows], kernel[6:, columns].T)


def test_damage_is_named(tmp_path):
    def refused(said: str, change) -> None:
        folder, _ = published(tmp_path / str(len(list(tmp_path.iterdir()))), OPTIONS)
        change(folder)
        with pytest.raises(ValueError, match=said):
            elmo.read(folder, {})

    def without(folder) -> None:
        with h5py.File(folder / "lm_weights.hdf5", "a") as file:
            del file[f"{CELL}/W_P_0"]

    def reshaped(folder) -> None:
        with h5py.File(folder / "lm_weights.hdf5", "a") as file:
            del file["CNN/b_cnn_1"]
            file["CNN/b_cnn_1"] = torch.zeros(5).numpy()

    def cut(folder) -> None:
        path = folder / "lm_weights.hdf5"
        path.write_bytes(path.read_bytes()[:500])

    def options(folder) -> None:
        (folder / "options.json").write_text(json.dumps({"char_cnn": OPTIONS["char_cnn"]}))

    refused(rf"{CELL}/W_P_0 \(10, 6\) is missing", without)
    refused(r"CNN/b_cnn_1 must have shape \(6,\), as options.json says, got \(5,\)", reshaped)
    refused("is damaged or no HDF5 file", cut)
    refused("must have an object lstm, got None", options)
    refused("is no JSON", lambda folder: (folder / "options.json").write_text("{"))
    refused("must hold one", lambda folder: (folder / "options.json").unlink())


def test_what_the_file_has_no_place_for_is_refused():
    config = elmo.config_of(OPTIONS)
    for fields, said in (
        ({"forget_bias": 0.0}, "forget_bias must be 1"),
        ({"vocab_size": 300}, "vocab_size must be 262"),
    ):
        kept = {name: getattr(config, name) for name in elmo.config_fields()}
        with pytest.raises(ValueError, match=said):
            elmo.to_variables(ElmoModel(ElmoConfig(**kept, **fields)))


def test_without_h5py_the_extra_is_named(monkeypatch, tmp_path):
    source, _ = published(tmp_path / "source", OPTIONS)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_lnlm\[elmo\]'"):
        elmo.read(source, {})
