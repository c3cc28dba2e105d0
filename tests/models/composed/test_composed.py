"""Models made of several: their configurations, older ones too, and what they carry for parts of our own families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForPreTraining, BertConfig

from hf_lnlm import BidirectionalConfig, ReplacedTokenConfig, ReplacedTokenForPreTraining, SentencePairConfig
from hf_lnlm.models.composed.modeling_replaced_token import ProjectedEmbedding
from hf_lnlm.registry import family
from tests.contract.cases import Case, add_noise, first_output
from tests.contract.test_carried_code import Plan

RNN = {"model_type": "lnlm_rnn", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "bidirectional": True}
LINFORMER = {"model_type": "lnlm_linformer", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
SSM = {"model_type": "lnlm_ssm", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}
BERT = {"model_type": "bert", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
OURS = {
    "narrow generator": ReplacedTokenConfig(generator=RNN, discriminator=LINFORMER),
    "projected generator": ReplacedTokenConfig(generator=BERT, discriminator={**LINFORMER, "hidden_size": 32}),
    "pair": SentencePairConfig(encoder=RNN),
    "both ways": BidirectionalConfig(forwards=SSM, backwards=SSM),
}


def model_of(name: str):
    torch.manual_seed(0)
    return add_noise(AutoModelForPreTraining.from_config(OURS[name]).eval(), 1)


@pytest.mark.parametrize("name", OURS)
def test_code_of_our_own_parts_is_carried(name: str, tmp_path: Path) -> None:
    """The whole and each part load where the package is missing, and are saved again with their code."""
    plan, model = Plan(tmp_path), model_of(name)
    case = Case(family(model.config.model_type), "AutoModelForPreTraining")
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    plan.add("same_head", "whole", case, model, folder)
    plan.add("from_config", "config", case, model, folder)
    for part, config in model.config.parts.items():
        if config.model_type.startswith("lnlm_"):
            alone = model.part_to_save(part).eval()
            auto = "AutoModelForCausalLM" if name == "both ways" else "AutoModelForMaskedLM"
            auto = "AutoModelForPreTraining" if part == "discriminator" else auto
            plan.add("same_head", part, Case(family(config.model_type), auto), alone, folder / part)
    assert len(plan.jobs) > 2
    assert not plan.run()


def test_parts_saved_without_the_package_carry_their_code(tmp_path: Path) -> None:
    model_of("both ways").save_pretrained(tmp_path / "whole")
    code = """
    import sys
    sys.modules["hf_lnlm"] = None
    from transformers import AutoModelForCausalLM, AutoModelForPreTraining
    AutoModelForPreTraining.from_pretrained("whole", trust_remote_code=True).save_pretrained("again")
    print(type(AutoModelForCausalLM.from_pretrained("again/backwards", trust_remote_code=True)).__name__)
    """
    script = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["SelectiveSSMForCausalLM"], done.stderr[-1500:]


@pytest.mark.parametrize("name", OURS)
def test_configs_of_earlier_checkpoints_are_read(name: str, tmp_path: Path) -> None:
    """They have their parts under `parts`, as plain values, and no sizes of their own."""
    model = model_of(name)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    parts = {part: saved.pop(part) for part in model.config.parts}
    for field in ("auto_map", "vocab_size", "hidden_size", "num_hidden_layers", "use_cache", "backend"):
        saved.pop(field, None)
    (tmp_path / "config.json").write_text(json.dumps({**saved, "parts": parts}))
    again = AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": torch.arange(12, 30).view(2, 9)}
    assert torch.equal(first_output(again, **inputs), first_output(model, **inputs))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="generator and discriminator need one vocabulary, got vocab_size generator 60"
    ):
        ReplacedTokenConfig(generator={**RNN, "vocab_size": 60}, discriminator=LINFORMER)
    with pytest.raises(ValueError, match="lnlm_sentence_pair has the parts encoder, got encodr"):
        SentencePairConfig(encodr=BERT)
    with pytest.raises(ValueError, match="lnlm_bidirectional has the parts forwards, backwards, got 'encoder'"):
        BidirectionalConfig(parts={"encoder": SSM})
    with pytest.raises(ValueError, match="encoder: transformers knows no model type 'lnlm_nothing' here"):
        SentencePairConfig(encoder={**BERT, "model_type": "lnlm_nothing"})
    with pytest.raises(ValueError, match="encoder must be one model, got lnlm_sentence_pair, which is made of several"):
        SentencePairConfig(encoder=SentencePairConfig(encoder=BERT))
    with pytest.raises(ValueError, match="label must be one of next_sentence_label, sentence_order_label, got 'order'"):
        SentencePairConfig(label="order")
    with pytest.raises(ValueError, match="hidden_size must be the encoder's, 16, got 32"):
        SentencePairConfig(encoder=BERT).hidden_size = 32
    with pytest.raises(ValueError, match="forwards must be of a family with AutoModelForCausalLM, got lnlm_text_cnn"):
        text_cnn = {"model_type": "lnlm_text_cnn", "hidden_size": 16}
        AutoModelForPreTraining.from_config(BidirectionalConfig(forwards=text_cnn, backwards=text_cnn))


def test_inputs_that_a_part_would_misread_are_refused() -> None:
    model, ids = model_of("pair"), torch.arange(12, 30).view(2, 9)
    with pytest.raises(ValueError, match=r"attention_mask must have shape .*, got \(1, 9\)"):
        model(ids, torch.ones(1, 9))
    with pytest.raises(ValueError, match="give labels and next_sentence_label together"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="next_sentence_label must be between 0 and 1, or -100 to be ignored, got 2"):
        model(ids, labels=ids, next_sentence_label=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="labels must be between 0 and 60"):
        model_of("both ways")(ids, labels=ids + 40)
    with pytest.raises(TypeError, match="unexpected keyword argument 'labls'"):
        model_of("narrow generator")(ids, labls=ids)


def test_a_projected_generator_is_resized_with_the_table_it_reads() -> None:
    model = model_of("projected generator")
    assert isinstance(model.generator.get_input_embeddings(), ProjectedEmbedding)
    ids = torch.arange(12, 30).view(2, 9)
    with torch.no_grad():
        before = model.generator(ids).logits
        model.resize_token_embeddings(70)
        after = model.generator(ids).logits
    assert after.shape[-1] == 70 and torch.allclose(after[..., :61], before, atol=1e-6)
    assert model.generator.get_input_embeddings().weight is model.discriminator.get_input_embeddings().weight
    alone = model.part_to_save("generator").eval()
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, after, atol=1e-5)


def test_attention_and_dtype_reach_the_parts(tmp_path: Path) -> None:
    AutoModelForPreTraining.from_config(SentencePairConfig(encoder=BERT)).save_pretrained(tmp_path)
    model = AutoModelForPreTraining.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)
    assert model.encoder.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(12, 30).view(2, 9)
    found = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == 1 and len(found.hidden_states) == 2


def test_evaluation_draws_the_same_samples_every_time() -> None:
    model: ReplacedTokenForPreTraining = model_of("narrow generator")
    ids = torch.arange(12, 30).view(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).corrupted, model(ids, labels=ids).corrupted)
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(model(ids, labels=ids).corrupted, model(ids, labels=ids).corrupted)


def test_old_places_of_the_classes() -> None:
    with pytest.warns(FutureWarning, match="has moved to hf_lnlm.models.composed"):
        from hf_lnlm.objectives.replaced_token_model import ReplacedTokenForPreTraining as Old
    assert Old is ReplacedTokenForPreTraining
    assert AutoConfig.for_model("lnlm_bidirectional").forwards.model_type == "llama"
    assert isinstance(SentencePairConfig().encoder, BertConfig)
