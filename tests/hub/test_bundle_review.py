"""What a stranger's config says about code is not followed where the package is installed, and is not passed on."""

from __future__ import annotations

import json

import pytest
import transformers

from hf_lnlm.models.base import strict_config
from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import RNNForCausalLM
from hf_lnlm.registry import FAMILIES

EVIL = "stranger/evil--modeling_evil.Evil"
CODE = "raise RuntimeError('carried code ran')\n"


@pytest.fixture
def folder(tmp_path):
    """A stranger's checkpoint of ours, whose config points to code of his for a head of ours and for one we lack."""
    RNNForCausalLM(RNNConfig(vocab_size=20, hidden_size=8)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] |= {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": EVIL,
        "AutoModelForMultipleChoice": "modeling_evil.Evil",
    }
    path.write_text(json.dumps(settings))
    for name in ("configuration_evil.py", "modeling_evil.py", "modeling_rnn.py", "configuration_rnn.py"):
        (tmp_path / name).write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("trusted", [False, True])
def test_the_registered_class_wins(folder, trusted):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
    assert type(model) is RNNForCausalLM


def test_a_head_that_the_family_lacks_is_not_taken_from_the_folder(folder):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForMultipleChoice.from_pretrained(folder, trust_remote_code=True)


def test_the_next_save_names_its_own_code_only(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert saved == FAMILIES[0].auto_map()
    assert not list((tmp_path / "again").glob("*evil*"))


def test_a_subclass_of_the_user_does_not_name_code_that_it_does_not_carry(folder, tmp_path):
    @strict_config
    class MyConfig(RNNConfig):
        model_type = "mine"
        extra: int = 3

    found = MyConfig.from_pretrained(folder)
    found.save_pretrained(tmp_path / "mine")
    saved = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert "auto_map" not in saved
    assert MyConfig.from_pretrained(tmp_path / "mine").to_dict() == found.to_dict()
