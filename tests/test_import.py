"""`import hf_lnlm` adds its own entries to transformers and changes, loads and costs nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from hf_lnlm.moved import MOVED
from hf_lnlm.registry import FAMILIES, ROWS

SNAPSHOT = """
import json, sys
import transformers
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.loss import loss_utils
from transformers.models.auto import auto_factory, configuration_auto, feature_extraction_auto, image_processing_auto
from transformers.models.auto import modeling_auto, processing_auto, tokenization_auto

def of_mapping(mapping):
    sources = ("_mapping", "_config_mapping", "_model_mapping", "_reverse_config_mapping")
    stock = {str(key): str(value) for source in sources for key, value in vars(mapping).get(source, {}).items()}
    extra = {getattr(k, "__name__", str(k)): str(getattr(v, "__name__", v)) for k, v in mapping._extra_content.items()}
    return {"stock": stock, "extra": extra}

def snapshot():
    found = {}
    modules = (configuration_auto, modeling_auto, tokenization_auto, processing_auto, feature_extraction_auto,
               image_processing_auto)
    for module in modules:
        for name, value in vars(module).items():
            if hasattr(value, "_extra_content"):
                found[name] = of_mapping(value)
            elif isinstance(value, dict) and name.isupper():
                found[name] = {"stock": {str(k): str(v) for k, v in value.items()}, "extra": {}}
    for name, table in (("losses", loss_utils.LOSS_MAPPING), ("attention", modeling_utils.ALL_ATTENTION_FUNCTIONS),
                        ("masks", masking_utils.ALL_MASK_ATTENTION_FUNCTIONS),
                        ("dynamic", cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
                        ("static", cache_utils.STATIC_LAYER_TYPE_MAPPING)):
        extra = {str(k): str(getattr(table[k], "__qualname__", table[k])) for k in table.keys()}
        found[name] = {"stock": {}, "extra": extra}
    return found
"""

ANOTHER_PACKAGE = """
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel
class OtherConfig(PreTrainedConfig):
    model_type = "other"
class OtherModel(PreTrainedModel):
    config_class = OtherConfig
class OtherGPT2(PreTrainedModel):
    config_class = GPT2Config
AutoConfig.register("other", OtherConfig)
AutoModel.register(OtherConfig, OtherModel)
AutoModelForCausalLM.register(GPT2Config, OtherGPT2, exist_ok=True)
"""


def run(*parts: str) -> Any:
    """Run Python in a fresh process and return the JSON of its last line."""
    code = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("before", ["", ANOTHER_PACKAGE], ids=["alone", "after another package"])
def test_every_stock_mapping_stays_as_it_was(before: str):
    found = run(SNAPSHOT, before, "one = snapshot(); import hf_lnlm; two = snapshot(); print(json.dumps([one, two]))")
    old, new = found
    assert old.keys() == new.keys()
    assert len(old) > 60, "the snapshot does not see the mappings"
    added: dict[str, set[str]] = {}
    for name, mapping in old.items():
        assert new[name]["stock"] == mapping["stock"], name
        assert {k: new[name]["extra"].get(k) for k in mapping["extra"]} == mapping["extra"], name
        added[name] = set(new[name]["extra"]) - set(mapping["extra"])
    assert added.pop("CONFIG_MAPPING") == {row.model_type for row in ROWS}
    configs = {row.config for row in ROWS}
    for name in ("dynamic", "static", "attention", "masks", "losses"):
        assert all(entry.startswith("lnlm") for entry in added.pop(name)), name
    assert {name for entries in added.values() for name in entries} <= configs
    assert added["MODEL_MAPPING"] | added["MODEL_FOR_PRETRAINING_MAPPING"] == configs


def test_importing_twice_is_safe():
    code = """
    import importlib, sys
    import hf_lnlm
    from transformers import AutoConfig
    first = type(AutoConfig.for_model("lnlm_rnn"))
    hf_lnlm.registry.register()
    importlib.reload(hf_lnlm)
    for name in [name for name in sys.modules if name.split(".")[0] == "hf_lnlm"]:
        del sys.modules[name]
    import hf_lnlm
    second = type(AutoConfig.for_model("lnlm_rnn"))
    model = hf_lnlm.RNNForCausalLM(second(vocab_size=20, hidden_size=8))
    print('"ok"' if first is not second and type(model.config) is second else '"stale classes"')
    """
    assert run(code) == "ok"


HEAVY = [
    "numba",
    "triton",
    "datasets",
    "peft",
    "trl",
    "matplotlib",
    "pandas",
    "typer",
    "rich",
    "yaml",
    "accelerate.utils",
]
OF_COMMANDS = [
    "transformers.trainer",
    "hf_lnlm.trainer",
    "hf_lnlm.data",
    "hf_lnlm.objectives",
    "datasets",
    "peft",
    "trl",
]


def loaded(code: str, names: list[str]) -> list[str]:
    """Modules of `names` that are loaded after `code` and that transformers had not loaded before."""
    before = "import sys, json, torch, transformers; transformers.PreTrainedModel; before = set(sys.modules)"
    return run(before, code, f"print(json.dumps([n for n in {names!r} if n in sys.modules and n not in before]))")


def test_import_loads_nothing_heavy():
    assert loaded("import hf_lnlm", [*HEAVY, *OF_COMMANDS]) == []


def test_help_loads_no_trainer_and_no_data():
    code = """
    from hf_lnlm.cli.main import app
    try:
        app(["--help"])
    except SystemExit as stop:
        assert not stop.code, stop.code
    """
    assert loaded(code, [*OF_COMMANDS, "numba", "triton", "matplotlib", "pandas"]) == []


def test_help_and_wrong_usage_of_the_command_load_no_torch():
    code = """
    import sys
    sys.argv = ["hf-lnlm"]
    from hf_lnlm.cli.main import main
    def status(*words):
        try:
            main(list(words))
        except SystemExit as stop:
            return stop.code or 0
    assert status("--help") == status("pretrain", "--help") == status("--version") == 0
    assert status("nonsense") == status("pretrain", "--nonsense") == status("generate") == 2
    assert not {"torch", "transformers", "numpy"} & set(sys.modules)
    assert status("check", "nowhere") != 0
    from transformers import AutoConfig
    print(json.dumps(AutoConfig.for_model("lnlm_rnn").model_type))
    """
    assert run("import json", code) == "lnlm_rnn"


def test_rooms_are_reachable_and_misspelt_names_get_a_hint():
    code = """
    import hf_lnlm
    assert callable(hf_lnlm.convert.sparse_attention.linformer_from_stock)
    found = [hf_lnlm.convert.__name__, hf_lnlm.tasks.TASKS["multiple_choice"].name, hf_lnlm.objectives.__name__]
    try:
        hf_lnlm.pretrian
    except AttributeError as error:
        print(json.dumps([*found, str(error)]))
    """
    *found, hint = run("import json", code)
    assert found == ["hf_lnlm.convert", "multiple_choice", "hf_lnlm.objectives"] and "did you mean 'pretrain'" in hint


def test_public_names_are_importable():
    code = """
    import json
    import hf_lnlm
    for name in hf_lnlm.__all__:
        getattr(hf_lnlm, name)
    assert set(hf_lnlm.__all__) <= set(dir(hf_lnlm))
    try:
        hf_lnlm.NoSuchModel
    except AttributeError as error:
        print(json.dumps(str(error)))
    """
    assert "NoSuchModel" in run(code)


def test_moved_modules_are_importable_from_their_old_places():
    for old, new in MOVED.items():
        sys.modules.pop(old, None)
        with pytest.warns(FutureWarning, match=f"{old} has moved to {new}"):
            place = importlib.import_module(old)
        names = [name for name in vars(importlib.import_module(new)) if not name.startswith("__")]
        assert all(getattr(place, name) is getattr(sys.modules[new], name) for name in names)
        with pytest.raises(AttributeError):
            place.no_such_name


def test_every_family_runs_without_the_optional_compilers():
    """numba and Triton are extras: without them the modules import, and `auto` takes the eager backend."""
    code = """
    import importlib.abc, json, sys
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("numba", "triton", "llvmlite"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Missing())
    import torch
    from tests.contract.cases import build, first_output, inputs_of, one_case_a_family
    names = []
    for case in one_case_a_family():
        assert torch.isfinite(first_output(build(case), **inputs_of(case))).all()
        names.append(case.family.model_type)
    print(json.dumps(names))
    """
    assert run(code) == [row.model_type for row in FAMILIES]
