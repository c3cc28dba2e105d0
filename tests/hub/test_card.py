"""Model cards are made of what lies in the folder, name nothing of this machine, and leave a person's own words alone."""

from __future__ import annotations

import pytest
import yaml

from hf_lnlm import RNNConfig, RNNForCausalLM, RNNForSequenceClassification
from hf_lnlm.hub.card import MARK, auto_class, model_card, pipeline_tag, write_card, write_evaluation
from hf_lnlm.hub.check import card_data
from hf_lnlm.hub.folder import BadFile

CONFIG = {"vocab_size": 20, "hidden_size": 4, "num_hidden_layers": 1}
RECIPE = """
model: {family: lnlm_rnn, checkpoint: /srv/someone/runs/base}
data: {source: /srv/someone/private/novels.txt}
training: {output_dir: /srv/someone/runs/x, max_steps: 5, hub_token: hf_secret}
hub: {repo_id: someone/x, license: mit}
"""


@pytest.fixture
def folder(tmp_path):
    RNNForCausalLM(RNNConfig(**CONFIG)).save_pretrained(tmp_path)
    return tmp_path


def test_card_of_a_bare_checkpoint(folder):
    text = model_card(folder, "someone/tiny-rnn")
    data = card_data(text)
    assert "license" not in data and card_data(model_card(folder, license="mit"))["license"] == "mit"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["hf_lnlm", "lnlm_rnn"]
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-rnn", trust_remote_code=True)' in text
    assert "# tiny-rnn" in text and "Not measured." in text


def test_recipe_and_evaluation_are_quoted_without_places_or_secrets(folder):
    (folder / "recipe.yaml").write_text(RECIPE)
    write_evaluation(folder, {"data": "novels.txt", "task": "causal", "metrics": {"perplexity": 12.3456789}})
    text = model_card(folder, "someone/x")
    data = card_data(text)
    assert data["license"] == "mit"
    assert data["model-index"][0]["results"][0]["metrics"] == [
        {"type": "perplexity", "value": 12.3457, "name": "perplexity"}
    ]
    assert "Trained on novels.txt" in text and "max_steps: 5" in text and "| perplexity | 12.346 |" in text
    for private in ("/srv", "someone/private", "hf_secret", "output_dir"):
        assert private not in text


def test_card_parses_as_the_hub_parses_it(folder):
    from huggingface_hub import ModelCard

    (folder / "recipe.yaml").write_text(RECIPE)
    write_evaluation(folder, {"data": "novels.txt", "task": "causal", "metrics": {"perplexity": 12.3}})
    card = ModelCard(model_card(folder, "someone/x"))
    assert card.data.eval_results[0].metric_value == 12.3


def test_classifier(tmp_path):
    RNNForSequenceClassification(RNNConfig(**CONFIG, num_labels=3)).save_pretrained(tmp_path)
    assert card_data(model_card(tmp_path))["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize(
    "architecture, pipeline, auto",
    [
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("BertForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
        ("T5ForConditionalGeneration", "text-generation", "AutoModelForSeq2SeqLM"),
        ("BertModel", "feature-extraction", "AutoModel"),
    ],
)
def test_architectures(architecture, pipeline, auto):
    assert (pipeline_tag(architecture), auto_class(architecture)) == (pipeline, auto)


def test_a_written_card_is_kept_and_a_generated_one_renewed(folder):
    assert write_card(folder, "a/first")
    assert write_card(folder, "a/second")
    text = (folder / "README.md").read_text()
    assert "a/second" in text and "a/first" not in text
    (folder / "README.md").write_text(text.replace(MARK, ""))
    assert not write_card(folder, "a/third")
    (folder / "README.md").write_text("---\nbase_model: x\n---\n[More Information Needed]")
    assert write_card(folder, "a/fourth"), "peft's empty card is no person's"


def test_a_linked_card_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "README.md"
    outside.write_text("mine")
    (folder / "README.md").symlink_to(outside)
    with pytest.raises(BadFile, match=r"README\.md is a link"):
        write_card(folder)
    assert outside.read_text() == "mine"


def test_names_with_yaml_in_them_stay_text(folder):
    write_evaluation(folder, {"data": "a: b\n- c", "metrics": {"loss": 1.0}})
    header = model_card(folder).split("---\n")[1]
    assert yaml.safe_load(header)["model-index"][0]["results"][0]["dataset"]["name"] == "a: b\n- c"
