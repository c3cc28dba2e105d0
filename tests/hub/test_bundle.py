"""Flattening a package into a folder: imports of every form, refusals, determinism, and what a save does with it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers.dynamic_module_utils import get_relative_imports

import hf_lnlm
from hf_lnlm.hub import bundle
from hf_lnlm.registry import FAMILIES

from .loopback import LoopbackHub, environment

numbers = itertools.count()


class FakePackage:
    """A package in a temporary folder, importable while the test runs."""

    def __init__(self, root: Path) -> None:
        self.name = f"fake_package_{next(numbers)}"
        self.root = root
        self.write("__init__", "")

    def write(self, module: str, source: str) -> None:
        """Write a module, `a.b` to `a/b.py`; packages on the way get an empty `__init__.py`."""
        path = self.root / self.name / (module.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.parents:
            if parent == self.root:
                break
            (parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(source), encoding="utf-8")

    def flatten(self, *modules: str) -> dict[str, str]:
        """Flatten from some modules; contents as text."""
        names = tuple(f"{self.name}.{module}" for module in modules)
        return {name: content.decode() for name, content in bundle.flatten(names, self.name).items()}

    def runs(self, files: dict[str, str], expression: str) -> str:
        """Write flat files as a package elsewhere and evaluate an expression over them in a fresh process."""
        flat = self.root / "elsewhere" / "flat"
        flat.mkdir(parents=True)
        for name, content in files.items():
            (flat / name).write_text(content, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", f"import importlib; print({expression})"],
            cwd=flat.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    fake = FakePackage(tmp_path)
    yield fake
    for name in [name for name in sys.modules if name.split(".")[0] == fake.name]:
        del sys.modules[name]


def test_imports_of_every_form_are_followed(package):
    package.write("ops.scan.eager", "def f():\n    return 'eager'\n")
    package.write("ops.scan.__init__", "from .eager import f\nfrom .reference import g as oracle\n")
    package.write("ops.scan.reference", "g = lambda: 'reference'\n")
    package.write("nn.late", "def late():\n    return 'late'\n")
    package.write("nn.optional", "value = 'optional'\n")
    package.write("nn.typed", "Kind = str\n")
    package.write("models.room.sibling", "one = 1\ntwo = 2\nthree = 3\n")
    package.write(
        "models.room.modeling_x",
        f"""
        import math
        from typing import TYPE_CHECKING

        from ...ops.scan import f, oracle as law  # a comment
        from {package.name}.nn.late import late as _unused
        from .sibling import (
            one,
            two as zwei,  # another
            three,
        )
        if TYPE_CHECKING:
            from ...nn.typed import Kind
        try:
            from ...nn.optional import value
        except ImportError:
            value = None

        def run() -> "Kind":
            from ...nn.late import late
            return [f(), law(), late(), value, one + zwei + three, math.floor(2.5)]
        """,
    )
    files = package.flatten("models.room.modeling_x")
    assert set(files) == {
        "modeling_x.py",
        "models_room_sibling.py",
        "nn_late.py",
        "nn_optional.py",
        "nn_typed.py",
        "ops_scan.py",
        "ops_scan_eager.py",
        "ops_scan_reference.py",
    }
    assert package.name not in "".join(files.values())
    found = package.runs(files, "importlib.import_module('flat.modeling_x').run()")
    assert found == "['eager', 'reference', 'late', 'optional', 6, 2]"


def test_only_import_lines_change(package):
    source = '# -*- coding: utf-8 -*-\n"""Grüße, from here."""\n\nfrom .b import x\n\n\ny = "from"  ; z = x\n'
    package.write("a", source)
    package.write("b", "x = 1\n")
    assert package.flatten("a")["a.py"] == source.replace("from .b import", "from .b import")
    package.write("nn.c", "from ..b import x\n")
    assert package.flatten("nn.c")["nn_c.py"] == "from .b import x\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import {package}.nn.b", "can't be carried"),
        ("import {package}.nn.b as b", "can't be carried"),
        ("import os, {package}.nn.b", "can't be carried"),
        ("from .nn.b import *", "star import"),
        ("from .nn import b", "imports b of"),
        ("from . import nn", "imports nn of"),
        ("from {package} import nn", "imports nn of"),
        ("from .nn.b import x; y = 2", "stand alone"),
        ("y = 2; from .nn.b import x", "stand alone"),
        ("if True: from .nn.b import x", "stand alone"),
        ("from .nn.missing import x", "missing"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_its_place(package, line, said):
    package.write("nn.b", "x = 1\n")
    package.write("a", "import math\n\n" + line.format(package=package.name) + "\n")
    with pytest.raises((ValueError, ModuleNotFoundError), match=said) as refusal:
        package.flatten("a")
    if said != "missing":
        assert "a.py, line 3" in str(refusal.value)


def test_names_of_the_top_package_are_refused(package):
    package.write("__init__", "version = 1\n")
    package.write("nn.a", "from .. import version\n")
    with pytest.raises(ValueError, match="line 1"):
        package.flatten("nn.a")


def test_names_that_a_package_defines_are_carried(package):
    package.write("ops.scan.__init__", "from .eager import f\n\n\ndef g():\n    return f() + 1\n")
    package.write("ops.scan.eager", "def f():\n    return 1\n")
    package.write("models.modeling_x", "from ..ops.scan import f, g\n")
    files = package.flatten("models.modeling_x")
    assert package.runs(files, "importlib.import_module('flat.modeling_x').g()") == "2"


def test_two_modules_of_one_flat_name_are_refused(package):
    package.write("nn.a_b", "x = 1\n")
    package.write("nn.a.b", "x = 2\n")
    package.write("m", "from .nn.a_b import x\nfrom .nn.a.b import x as y\n")
    with pytest.raises(ValueError, match=r"nn\.a\.b and .*nn\.a_b .*nn_a_b\.py"):
        package.flatten("m")


def test_strings_that_look_like_imports(package):
    text = '''
    """A docstring.

    from .nowhere import nothing
        from .elsewhere import more
    import .relative
    """
    from .b import x


    def f():
        """Use it so:

        from .here import f
        """
        # from .comment import z
        return x
    '''
    package.write("b", "x = 5\n")
    package.write("a", text)
    files = package.flatten("a")
    path = package.root / "a.py"
    path.write_text(files["a.py"])
    assert get_relative_imports(path) == ["b"]
    assert package.runs(files, "importlib.import_module('flat.a').f()") == "5"
    package.write("c", 'text = """\nfrom .nowhere import nothing\n"""\n')
    with pytest.raises(ValueError, match=r"c\.py, line 2.*string"):
        package.flatten("c")


def test_unusual_line_ends_do_not_shift_imports(package):
    package.write("b", "x = 1\n")
    package.write("a", 'mark = "\\u2028\x0c\u2028\x85"\nfrom .b import x\n\ny = x + 1\n')
    files = package.flatten("a")
    assert package.runs(files, "importlib.import_module('flat.a').y") == "2"


def test_cycles_and_repeats_end(package):
    package.write("a", "from .b import x\n\n\ndef f():\n    from .b import x\n    return x\n")
    package.write("b", "x = 3\n\n\ndef g():\n    from .a import f\n    return f()\n")
    files = package.flatten("a", "b")
    assert list(files) == ["a.py", "b.py"]
    assert package.runs(files, "importlib.import_module('flat.b').g()") == "3"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
def test_names_and_bytes_are_deterministic(family):
    first = bundle.carried_files(family.model_type)
    bundle.carried_files.cache_clear()
    assert bundle.carried_files(family.model_type) == first
    assert list(first) == sorted(first)
    if family is not FAMILIES[0]:
        return
    code = f"import hf_lnlm.hub.bundle as b; print(b.carried_files({family.model_type!r}))"
    variables = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == f"{first}\n"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
def test_transformers_finds_every_file_that_is_carried(family, tmp_path):
    names = bundle.write_code(family.config_class(), tmp_path)
    reached, todo = set(), [f"configuration_{family.name}", f"modeling_{family.name}"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += get_relative_imports(tmp_path / f"{module}.py")
    assert {f"{module}.py" for module in reached} == set(names)


def tiny() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = hf_lnlm.RNNConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, pad_token_id=0)
    return hf_lnlm.RNNForCausalLM(config).eval()


def test_auto_map_names_every_head_and_leaves_the_model_alone(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == FAMILIES[0].auto_map()
    assert model.config.auto_map == {}
    model.config.auto_map["AutoModelForX"] = "x.X"  # as transformers does for a class that was registered by hand
    assert model.config.auto_map == {"AutoModelForX": "x.X"} and tiny().config.auto_map == {}
    assert model._auto_class is None


def test_what_the_user_registered_stays_in_the_auto_map(tmp_path):
    model = tiny()
    model.config.auto_map = {"AutoModelForSeq2SeqLM": "mine.Mine"}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == {**FAMILIES[0].auto_map(), "AutoModelForSeq2SeqLM": "mine.Mine"}
    assert model.config.auto_map == {"AutoModelForSeq2SeqLM": "mine.Mine"}


def test_the_config_alone_carries_the_code_too(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == set(bundle.carried_files("lnlm_rnn"))


@pytest.mark.parametrize("trust", [None, True])
def test_where_it_is_installed_no_foreign_code_runs(tmp_path, trust):
    model = tiny()
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text("raise SystemExit('foreign code ran')\n")
    for auto in FAMILIES[0].models:
        loaded = getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded).__module__.startswith("hf_lnlm.")
    assert type(transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is hf_lnlm.RNNConfig


def test_stale_code_is_replaced_by_a_save(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    wanted = (tmp_path / "modeling_rnn.py").read_bytes()
    (tmp_path / "modeling_rnn.py").write_text("old\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_rnn.py").read_bytes() == wanted


def test_adapters_carry_no_code_and_merged_models_do(tmp_path):
    wrapped = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["input_gates"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.py"))
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "modeling_rnn.py").is_file()


def test_a_subclass_of_the_user_is_saved_by_name(tmp_path):
    """A user's own subclass is not in the registry: its folder still loads as the family's head."""

    class Mine(hf_lnlm.RNNForCausalLM):
        pass

    torch.manual_seed(0)
    Mine(tiny().config).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf_lnlm.RNNForCausalLM


PUSH = """
import sys, torch, hf_lnlm
torch.manual_seed(0)
config = hf_lnlm.RNNConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1)
model = hf_lnlm.RNNForCausalLM(config)
folder = sys.argv[1]
model.save_pretrained(folder, push_to_hub=True, repo_id="user/saved")
model.save_pretrained(folder, push_to_hub=True, repo_id="user/again")
model.push_to_hub("user/pushed")
config.push_to_hub("user/config")
config.save_pretrained(folder + "-config", push_to_hub=True, repo_id="user/config-saved")
"""

LOAD = """
import importlib.abc, sys
class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lnlm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotHere())
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
for repo in ("user/saved", "user/pushed"):
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
model.push_to_hub("user/pushed-by-another")
AutoModelForTokenClassification.from_pretrained("user/pushed-by-another", trust_remote_code=True)
"""


def test_pushing_uploads_the_code(tmp_path):
    code = set(bundle.carried_files("lnlm_rnn"))
    with LoopbackHub() as hub:
        for step, program in enumerate((PUSH, LOAD)):
            done = subprocess.run(
                [sys.executable, "-c", program, str(tmp_path / "model")],
                env=environment(hub, str(tmp_path / f"home{step}")) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-2000:]
        for repo in ("saved", "again", "pushed", "config", "config-saved", "pushed-by-another"):
            files = hub.files(f"user/{repo}")
            assert code <= set(files), f"{repo} lacks {code - set(files)}"
            assert re.search(rb'"AutoModelForTokenClassification": "[^"]*modeling_rnn.RNNFor', files["config.json"])
