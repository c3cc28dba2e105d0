"""Every shipped recipe runs as it stands, for a few steps on a few modules, and leaves a folder that passes `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_lnlm.convert.sparse_attention import linformer_checkpoint
from hf_lnlm.data.algorithmic import TASKS
from hf_lnlm.flows.recipe import read_recipe
from hf_lnlm.hub.check import check_folder, is_fit
from hf_lnlm.tasks import TASKS as LABELLED
from hf_lnlm.trainer.alignment import METHODS

from ..cli.running import QUICK, copy_library, run, settings, small_library, succeed

RECIPES = sorted((Path(__file__).resolve().parents[2] / "training" / "recipes").glob("*.yaml"))
FINETUNING = [
    path for path in RECIPES if read_recipe(path).model.checkpoint or read_recipe(path).objective.name in LABELLED
]
ALIGNING = [path for path in RECIPES if read_recipe(path).objective.name in METHODS]
FINETUNING = [path for path in FINETUNING if path not in ALIGNING]
ALGORITHMS = [path for path in RECIPES if read_recipe(path).objective.name in TASKS]
PRETRAINING = [path for path in RECIPES if path not in FINETUNING + ALGORITHMS + ALIGNING]
PROTEINS = "".join(f">protein {i}\n{'MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ'[i % 9 :] * 6}\n" for i in range(40))
SENTENCES = [
    f"the {colour} {animal} that {verb} in the {place} is here"
    for colour in ("red", "old", "small", "quick")
    for animal in ("cat", "dog", "bird", "horse", "fish")
    for verb in ("ran", "slept", "sang")
    for place in ("house", "river", "field")
]
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
    (place / "protein.fasta").write_text(PROTEINS)
    (place / "sentences.txt").write_text("\n".join(SENTENCES) + "\n")

    def make(name: str) -> Path:
        folder = place / name
        if name == "bert_linformer" and not folder.exists():  # converted, as its recipe says
            linformer_checkpoint(make("bert_stdlib"), folder)
        if not folder.exists():
            recipe = next(path for path in RECIPES if path.stem == name)
            file = "protein.fasta" if name == "protein" else "sentences.txt"
            data = [] if read_recipe(recipe).data.source else ["--data", place / file, *settings("data.limit=200")]
            succeed("pretrain", recipe, "--output", folder, *settings(*SMALLER), *data)
        return folder

    return make


def labelled_file(folder: Path) -> Path:
    """Sentences with a label each, as the recipes that name no source want them."""
    rows = [
        {"text": text, "label": index % 2, "context": text, "question": "where?", "answer": text.split()[-3]}
        for index, text in enumerate(SENTENCES)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_algorithms(path, tmp_path):
    folder, recipe = tmp_path / path.stem, read_recipe(path)
    small = ["model.config.memory_size=9", "model.config.controller_size=20", "training.per_device_train_batch_size=2"]
    succeed("pretrain", path, "--output", folder, *settings(*QUICK, *small))
    assert_fit(folder)
    assert set(json.loads((folder / "evaluation.json").read_text())["metrics"]) == {"loss", "wrong_bits", "accuracy"}
    picture = tmp_path / "addressing.png"
    succeed("plot", "addressing", folder, "--task", recipe.objective.name, "--size", 3, "--output", picture)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: path.stem)
def test_finetuning(path, pretrained, tmp_path):
    recipe = read_recipe(path)
    start = ["--checkpoint", pretrained(Path(recipe.model.checkpoint).name)] if recipe.model.checkpoint else []
    folder = tmp_path / path.stem
    limit = ["data.limit=60"] if recipe.data.limit else []
    data = [] if recipe.data.source else ["--data", labelled_file(tmp_path)]
    succeed("finetune", path, *start, *data, "--output", folder, *settings(*SMALLER, *limit))
    assert_fit(folder)
    if recipe.model.head:
        assert json.loads((folder / "config.json").read_text())["model_type"] == recipe.model.head
    trained = json.loads((folder / "evaluation.json").read_text())["metrics"]
    measured = json.loads(succeed("evaluate", folder, "--json").out)[0]["metrics"]
    assert measured == pytest.approx(trained)
    if recipe.objective.name in ("causal", "text_to_text"):
        assert succeed("generate", folder, "--prompt", "def f(x):", "--max-new-tokens", 4).out
    if recipe.lora.enabled:
        assert not (folder / "model.safetensors").exists()
    if recipe.lora.merge:
        assert_fit(folder / "merged")


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("path", ALIGNING, ids=lambda path: path.stem)
@pytest.mark.slow
def test_aligning(path, pretrained, tmp_path):
    recipe = read_recipe(path)
    base, folder = pretrained(Path(recipe.model.checkpoint).name), tmp_path / path.stem
    quick = settings("training.max_steps=2", "training.per_device_train_batch_size=4", "data.limit=24")
    succeed("align", path, "--checkpoint", base, "--output", folder, *quick)
    assert_fit(folder)
    assert json.loads((folder / "evaluation.json").read_text())["task"] == recipe.objective.name


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


def test_every_algorithmic_task_has_a_recipe():
    assert {read_recipe(path).objective.name for path in ALGORITHMS} == set(TASKS)
    assert {read_recipe(path).model.family for path in ALGORITHMS} == {"lnlm_ntm", "lnlm_dnc"}
    assert "dnc_babi" in {path.stem for path in FINETUNING}


def test_launch_scripts_name_recipes_that_exist():
    folder = RECIPES[0].parents[1]
    for script in sorted(folder.glob("*.py")):
        named = [word for word in script.read_text().split() if word.endswith(".yaml")]
        assert named
        assert all((folder.parent / word).is_file() for word in named)


def test_a_head_is_put_on_a_checkpoint_only():
    recipe = next(path for path in FINETUNING if read_recipe(path).model.head)
    result = run("finetune", "--family", "bert", "--data", "x.jsonl", "--task", "sequence_classification",
                 *settings("model.head=lnlm_encoder_cnn"))  # fmt: skip
    assert result.status == 2
    assert "model.head needs model.checkpoint" in result.err
    result = run("finetune", recipe, "--data", "x.jsonl", *settings("model.head=lnlm_text_cnn"))
    assert result.status == 2
