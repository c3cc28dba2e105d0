"""Every shipped recipe runs as it stands, for a few steps on a few modules, and leaves a folder that passes `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_lnlm.cli.recipe import read_recipe
from hf_lnlm.hub.check import check_folder, is_fit

from ..cli.running import QUICK, copy_library, settings, small_library, succeed

RECIPES = sorted((Path(__file__).resolve().parents[2] / "training" / "recipes").glob("*.yaml"))
FINETUNING = [path for path in RECIPES if read_recipe(path).model.checkpoint]
PRETRAINING = [path for path in RECIPES if path not in FINETUNING]
PROTEINS = "".join(f">protein {i}\n{'MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ'[i % 9 :] * 6}\n" for i in range(40))
SMALLER = [*QUICK, "training.per_device_train_batch_size=2", "data.limit=24", "data.block_size=32"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return copy_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(autouse=True)
def _small_stdlib(library):
    with small_library(library):
        yield


@pytest.fixture(scope="module")
def pretrained(library, tmp_path_factory):
    """A function: name of a pre-training recipe → its checkpoint, made once."""
    place = tmp_path_factory.mktemp("runs")
    (place / "proteins.fasta").write_text(PROTEINS)

    def make(name: str) -> Path:
        folder = place / name
        if not folder.exists():
            recipe = next(path for path in RECIPES if path.stem == name)
            data = [] if read_recipe(recipe).data.source else ["--data", place / "proteins.fasta"]
            succeed("pretrain", recipe, "--output", folder, *data, *settings(*SMALLER))
        return folder

    return make


def assert_fit(folder: Path) -> None:
    findings = check_folder(folder)
    assert is_fit(findings), findings


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_pretraining(path, pretrained):
    folder = pretrained(path.stem)
    assert_fit(folder)
    wanted, resolved = read_recipe(path), read_recipe(folder / "recipe.yaml")
    assert resolved.objective.name == wanted.objective.name
    assert resolved.model.family == wanted.model.family
    assert resolved.data.validation or resolved.data.mode


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_finetuning(path, pretrained, tmp_path):
    recipe = read_recipe(path)
    base = pretrained(Path(recipe.model.checkpoint).name)
    folder = tmp_path / path.stem
    limit = ["data.limit=60"] if recipe.data.limit else []
    succeed("finetune", path, "--checkpoint", base, "--output", folder, *settings(*SMALLER, *limit))
    assert_fit(folder)
    trained = json.loads((folder / "evaluation.json").read_text())["metrics"]
    measured = json.loads(succeed("evaluate", folder, "--json").out)[0]["metrics"]
    assert measured == pytest.approx(trained)
    if recipe.objective.name in ("causal", "text_to_text"):
        assert succeed("generate", folder, "--prompt", "def f(x):", "--max-new-tokens", 4).out
    if recipe.lora.enabled:
        assert not (folder / "model.safetensors").exists()
    if recipe.lora.merge:
        assert_fit(folder / "merged")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_they_do_and_how_to_run_them(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"training/recipes/{path.name}" in text
    assert read_recipe(path).training["output_dir"] == f"runs/{path.stem}"


def test_the_issue_of_recipes_is_complete():
    families = {read_recipe(path).model.family for path in PRETRAINING}
    assert {"lnlm_rnn", "gpt2", "bert", "roberta", "t5"} <= families
    assert {"protein", "code"} <= {path.stem for path in RECIPES}
    assert any(read_recipe(path).lora.enabled for path in FINETUNING)


def test_launch_scripts_name_recipes_that_exist():
    folder = RECIPES[0].parents[1]
    for script in sorted(folder.glob("*.py")):
        named = [word for word in script.read_text().split() if word.endswith(".yaml")]
        assert named
        assert all((folder.parent / word).is_file() for word in named)
