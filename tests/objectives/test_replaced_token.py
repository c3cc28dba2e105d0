"""Replaced-token detection by hand: what is masked, sampled, counted, shared, saved and refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
)

from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.models.composed import modeling_replaced_token
from hf_lnlm.models.composed.modeling_replaced_token import ReplacedTokenForPreTraining, sample
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.replaced_token import area_under_curve, narrowed
from tests.trainer import runs, scale

VOCAB, LENGTH = 60, 12
TOKENIZER = build_tokenizer("byte")
_ATTENTION = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ENCODERS = {
    "bert": BertConfig(**_ATTENTION),
    "albert": AlbertConfig(**_ATTENTION, embedding_size=8),
    "electra": ElectraConfig(**_ATTENTION, embedding_size=8),
    "rnn": AutoConfig.for_model("lnlm_rnn", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, bidirectional=True),
    "ssm": AutoConfig.for_model(
        "lnlm_ssm", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, bidirectional="tied"
    ),
    "linformer": AutoConfig.for_model(
        "lnlm_linformer", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, max_position_embeddings=32
    ),
}


ENCODERS["dnc"] = AutoConfig.for_model(
    "lnlm_dnc", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, memory_size=4, word_size=4, num_read_heads=1,
    bidirectional=True,
)  # fmt: skip
SMALL_BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
SMALL_RNN = {"model_type": "lnlm_rnn", "hidden_size": 32, "num_hidden_layers": 1, "bidirectional": True}
PAIRS = {**{name: {} for name in ENCODERS if name != "dnc"}, "rnn, bert": SMALL_BERT, "bert, rnn": SMALL_RNN,
         "ssm, rnn": SMALL_RNN, "dnc, rnn": SMALL_RNN}  # fmt: skip
"""Discriminator, or discriminator and generator → what `generator` says."""


def model_of(encoder: str = "rnn", **options) -> ReplacedTokenForPreTraining:
    torch.manual_seed(0)
    encoder, _, mixed = encoder.partition(", ")
    if mixed:
        options = {"generator": PAIRS[f"{encoder}, {mixed}"], **options}
        objective("replaced_token", **options).check(ENCODERS[encoder], TOKENIZER)
    return objective("replaced_token", **{"generator_fraction": 0.5, **options}).build(ENCODERS[encoder]).eval()


def batch_of(padded: bool = False) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(7, VOCAB, (3, LENGTH), generator=random)
    labels = torch.full_like(ids, -100)
    for row in range(3):
        labels[row, 1 : 3 + row] = ids[row, 1 : 3 + row]
    batch = {"input_ids": ids.clone(), "labels": labels, "uniforms": torch.rand(3, LENGTH, generator=random)}
    batch["input_ids"][labels != -100] = TOKENIZER.mask_token_id
    batch["input_ids"][0, 1] = ids[0, 1]  # chosen, but left as it is
    if padded:
        batch["attention_mask"] = torch.ones(3, LENGTH, dtype=torch.long)
        batch["attention_mask"][2, 8:] = 0
        batch["input_ids"][2, 8:] = 0
    return batch


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_by_hand(padded: bool) -> None:
    model, batch = model_of(), batch_of(padded)
    with torch.no_grad():
        found = model(**batch)
        chosen = batch["labels"] != -100
        whole = model.generator(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    assert torch.allclose(found.generator_logits, whole[chosen], atol=1e-6), "only masked positions, all the same"
    # each sample: the first token whose cumulated probability exceeds the row's number at that place
    original = torch.where(chosen, batch["labels"], batch["input_ids"])
    corrupted = original.clone()
    for row, place in chosen.nonzero().tolist():
        odds = whole[row, place].double().softmax(-1).numpy()
        corrupted[row, place] = int((np.cumsum(odds) <= float(batch["uniforms"][row, place])).sum())
    assert torch.equal(found.corrupted, corrupted)
    assert torch.equal(found.replaced.bool(), corrupted != original)
    nll = sum(-float(whole[r, p].log_softmax(-1)[batch["labels"][r, p]]) for r, p in chosen.nonzero().tolist())
    binary, tokens = 0.0, 0
    for row, place in np.ndindex(3, LENGTH):
        if padded and not batch["attention_mask"][row, place]:
            continue
        logit = float(found.logits[row, place])
        binary += math.log1p(math.exp(-logit)) if found.replaced[row, place] else math.log1p(math.exp(logit))
        tokens += 1
    assert tokens == (3 * LENGTH - 4 if padded else 3 * LENGTH)
    assert float(found.loss) == pytest.approx(nll / 9 + 50 * binary / tokens, rel=1e-5)
    assert {name: int(n) for name, n in model.loss_items(batch).items()} == {"generator": 9, "discriminator": tokens}


def test_a_lucky_sample_counts_as_original(monkeypatch) -> None:
    model, batch = model_of(), batch_of()
    right = batch["labels"][batch["labels"] != -100]
    drawn = torch.where(torch.arange(9) % 2 == 0, right, (right + 1) % VOCAB)
    monkeypatch.setattr(modeling_replaced_token, "sample", lambda *args: drawn)
    replaced = model(**batch).replaced[batch["labels"] != -100].bool()
    assert replaced.tolist() == [index % 2 == 1 for index in range(9)]


def test_samples_follow_the_softmax_at_its_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -50.0])
    drawn = sample(logits.expand(40_000, -1), torch.rand(40_000), temperature=0.5)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert shares.tolist() == pytest.approx((logits / 0.5).softmax(-1).tolist(), abs=0.01)
    edge = sample(logits.expand(2, -1), torch.tensor([0.0, 1.0]), 1.0)
    assert edge.tolist() == [0, 3], "numbers at the ends of [0, 1] give tokens of the vocabulary"


@pytest.mark.parametrize("encoder", ["rnn", "bert", "electra"])
def test_the_discriminators_loss_reaches_only_shared_embeddings_of_the_generator(encoder: str) -> None:
    model, batch = model_of(encoder), batch_of()
    model.loss_sums(model(**batch), {})["discriminator"].backward()
    shared = {id(value) for value in model.discriminator.parameters()}
    own = {name: value for name, value in model.generator.named_parameters() if id(value) not in shared}
    assert any("weight" in name for name in own)
    assert all(value.grad is None or not value.grad.any() for value in own.values())
    assert model.discriminator.get_input_embeddings().weight.grad.any()
    alone = model_of(encoder, share_embeddings=False)
    alone.loss_sums(alone(**batch), {})["discriminator"].backward()
    assert all(value.grad is None or not value.grad.any() for value in alone.generator.parameters())


def test_rows_are_masked_as_in_electra() -> None:
    learnt = objective("replaced_token")
    collate = learnt.collator(TOKENIZER, seed=3)
    rows = [{"input_ids": np.r_[5, np.arange(20, 217), 6], "example_id": index, "epoch": 0} for index in range(300)]
    batch = collate(rows)
    chosen = (batch["labels"] != -100).numpy()
    ids = np.stack([row["input_ids"] for row in rows])
    masked = batch["input_ids"].numpy() == TOKENIZER.mask_token_id
    assert not chosen[:, [0, -1]].any(), "special tokens are never chosen"
    assert chosen.mean() == pytest.approx(0.15 * 197 / 199, abs=0.002)
    assert masked[chosen].mean() == pytest.approx(0.85, abs=0.01) and not masked[~chosen].any()
    assert (batch["input_ids"].numpy()[chosen & ~masked] == ids[chosen & ~masked]).all(), "the others stay as they are"
    assert torch.equal(collate(rows[7:8])["uniforms"][0], batch["uniforms"][7]), "a function of the example"
    later = collate([{**rows[7], "epoch": 1}])
    assert not torch.equal(later["uniforms"][0], batch["uniforms"][7])
    assert float(batch["uniforms"].min()) >= 0 and float(batch["uniforms"].max()) < 1
    uneven = collate([rows[0], {"input_ids": [5, 30, 31, 6], "example_id": 9}])
    assert uneven["uniforms"].shape == uneven["input_ids"].shape == uneven["attention_mask"].shape


@pytest.mark.parametrize("encoder", PAIRS)
def test_whole_and_parts_load_by_themselves(encoder: str, tmp_path) -> None:
    model, batch = model_of(encoder), batch_of()
    model.save_pretrained(tmp_path)
    again, report = ReplacedTokenForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    generator, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "generator", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        found, same = model(**batch), again.eval()(**batch)
        logits = generator.eval()(input_ids=batch["input_ids"]).logits
    assert torch.equal(found.logits, same.logits) and torch.equal(found.generator_logits, same.generator_logits)
    assert torch.allclose(logits[batch["labels"] != -100], found.generator_logits, atol=1e-5)
    shared = {id(value) for value in again.generator.parameters()} & {id(v) for v in again.discriminator.parameters()}
    assert shared, "loaded anew, the two still share embeddings"
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "discriminator")
    own, theirs = classifier.base_model.state_dict(), model.discriminator.base_model.state_dict()
    equal = [name for name in theirs if name in own]
    assert len(equal) >= len(theirs) - 1 and all(torch.equal(own[name], theirs[name]) for name in equal)


def test_stock_electra_loads_as_the_stock_discriminator(tmp_path) -> None:
    model, batch = model_of("electra"), batch_of(padded=True)
    model.save_pretrained(tmp_path)
    stock = ElectraForPreTraining.from_pretrained(tmp_path / "discriminator").eval()
    with torch.no_grad():
        found = model(**batch)
        logits = stock(input_ids=found.corrupted, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(logits, found.logits)


def test_what_is_shared() -> None:
    electra = model_of("electra")
    names = [name.partition("electra.embeddings.")[2] for name in electra._tied_weights_keys]
    assert names == [
        "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight",
        "LayerNorm.bias",
    ]  # fmt: skip
    bert = model_of("bert")
    table = bert.discriminator.get_input_embeddings().weight
    assert bert.generator.get_input_embeddings().weight is table, "projected where widths differ"
    assert (
        bert.generator.get_output_embeddings().projection.weight
        is bert.generator.get_input_embeddings().projection.weight
    )
    apart = model_of("bert", share_embeddings=False)
    assert apart.generator.get_input_embeddings().weight.shape == (VOCAB, 16)


def test_generators_of_a_fraction_or_of_another_family() -> None:
    assert narrowed(ENCODERS["bert"], 0.25) | {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8} == (
        narrowed(ENCODERS["bert"], 0.25)
    )
    assert narrowed(ENCODERS["electra"], 0.25)["embedding_size"] == 8
    assert narrowed(ENCODERS["rnn"], 0.25)["last_hidden_size"] == 8
    mixed = model_of("rnn, bert")
    assert mixed.generator.config.model_type == "bert" and mixed.discriminator.config.model_type == "lnlm_rnn"
    assert torch.isfinite(mixed(**batch_of()).loss)
    own = model_of("bert", generator={"num_hidden_layers": 2})
    assert own.generator.config.num_hidden_layers == 2 and own.generator.config.hidden_size == 16


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "mamba3"])
def test_narrow_state_space_models_are_whole_heads(mixer: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "mixer": mixer, "bidirectional": "tied"}
    config = AutoConfig.for_model("lnlm_ssm", vocab_size=VOCAB, **sizes)
    made = objective("replaced_token").generator_config(config)
    assert made.hidden_size == 16 and made.expand * made.hidden_size % made.head_dim in (0, 32)
    assert made.mixer == mixer and made.time_step_rank == 1


@pytest.mark.parametrize("encoder", ["rnn", "bert", "linformer"])
def test_both_start_from_a_masked_language_model(encoder: str) -> None:
    torch.manual_seed(3)
    start, batch = AutoModelForMaskedLM.from_config(ENCODERS[encoder]).eval(), batch_of()
    equal, narrow = model_of(encoder, generator_fraction=1.0), model_of(encoder)
    for model in (equal, narrow):
        model.start_from(start)
    with torch.no_grad():
        wanted = start.base_model(batch["labels"].clamp(min=0)).last_hidden_state
        assert torch.allclose(
            equal(**batch).generator_logits, start(batch["input_ids"]).logits[batch["labels"] != -100]
        )
        for model in (equal, narrow):
            found = model.discriminator.base_model(batch["labels"].clamp(min=0)).last_hidden_state
            assert torch.allclose(found, wanted, atol=1e-5)


def test_metrics_by_hand_and_whatever_the_batching() -> None:
    model, learnt = model_of(), objective("replaced_token")
    batch = batch_of(padded=True)
    with torch.no_grad():
        model.head.out.weight *= 300  # apart, as after training
        outputs = model(**batch)
        rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
        each = [learnt.sums(model(**row), row) for row in rows]
    whole = learnt.summary(learnt.sums(outputs, batch))
    added = learnt.summary({name: sum(found[name] for found in each) for name in each[0]})
    assert added == pytest.approx(whole, rel=1e-5)
    seen = batch["attention_mask"].bool()
    logits, replaced = outputs.logits[seen], outputs.replaced[seen].bool()
    wanted = functional.binary_cross_entropy_with_logits(logits, replaced.float())
    assert whole["discriminator_loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert whole["replaced_share"] == pytest.approx(float(replaced.float().mean()))
    pairs = [(a > b) + 0.5 * (a == b) for a in logits[replaced].tolist() for b in logits[~replaced].tolist()]
    assert whole["discriminator_auc"] == pytest.approx(sum(pairs) / len(pairs), abs=0.02)
    assert area_under_curve(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0])) == 0.75
    assert area_under_curve(torch.zeros(2), torch.ones(2)) is None


def test_a_run_that_goes_on_keeps_its_generator_and_may_change_the_rest(tmp_path) -> None:
    options = {"generator_fraction": 0.5, "generator": {"num_hidden_layers": 2}, "temperature": 2.0, "weight": 20.0}
    model_of("bert", **options).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert objective("replaced_token").continuation_overrides(config, ()) == {}, "what isn't given stays as it was"
    same = objective("replaced_token", **options)
    changed = same.continuation_overrides(config, options)
    assert changed == {"temperature": 2.0, "weight": 20.0}, "the recipe that made it goes on"
    other = objective("replaced_token", weight=1.0, share_embeddings=True)
    changed = other.continuation_overrides(config, ("weight", "share_embeddings"))
    assert ReplacedTokenForPreTraining.from_pretrained(tmp_path, **changed).config.weight == 1.0
    for given, message in (
        ({"generator_fraction": 0.25}, r"another generator \(\w+=.*leave generator and generator_fraction out"),
        ({"generator": SMALL_RNN}, r"another generator \(\w+=.*leave generator"),
        ({"share_embeddings": False}, "made with share_embeddings=True, got False"),
    ):
        with pytest.raises(ValueError, match=message):
            objective("replaced_token", **given).continuation_overrides(config, given)
    half = objective("replaced_token", generator_fraction=0.5)
    assert half.continuation_overrides(ENCODERS["bert"], ("generator_fraction",)) == {}


@pytest.mark.parametrize("encoder", ["rnn", "bert"])
def test_activation_checkpointing_changes_nothing(encoder: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = model_of(encoder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch_of()).loss
        loss.backward()
        found.append([loss.detach(), *(value.grad for value in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_accumulated_batches_equal_one_big_batch(tmp_path) -> None:
    whole = scale.loss_and_norm("replaced_token", str(tmp_path / "one"), batch=8, accumulation=1)
    cut = scale.loss_and_norm("replaced_token", str(tmp_path / "four"), batch=2, accumulation=4)
    assert cut == pytest.approx(whole, rel=1e-4)


def test_figures_are_logged_while_training_and_evaluating(tmp_path) -> None:
    case = {"objective": "replaced_token", "data": "map", "workers": 0, "accumulation": 1}
    trainer = runs.trainer_of(case, str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=2)
    trainer.train()
    names = {"generator_loss", "generator_accuracy", "discriminator_loss", "discriminator_accuracy", "replaced_share"}
    logged = trainer.state.log_history
    assert names <= set(logged[0]) and {f"eval_{name}" for name in names} <= set(logged[1])
    assert "perplexity" not in logged[0]
    found = logged[1]
    assert found["eval_loss"] == pytest.approx(
        found["eval_generator_loss"] + 50 * found["eval_discriminator_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator_fraction": 0.0}, "generator_fraction must lie above 0 and be 1 at most, got 0.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"weight": -1.0}, "weight must be 0 or more, got -1.0"),
        ({"rate": 1.0}, "rate must lie between 0 and 1"),
        ({"mask_share": 1.5}, "sum to 1 at most"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective("replaced_token", **options)


def test_what_does_not_fit_is_refused() -> None:
    learnt = objective("replaced_token")
    with pytest.raises(
        ValueError, match=r"gpt2 reads left to right only\. Objectives that fit gpt2: causal, bidirectional"
    ):
        learnt.check(GPT2Config(), TOKENIZER)
    plain = build_tokenizer("byte")
    plain.mask_token = None
    with pytest.raises(ValueError, match="objective 'replaced_token' needs a mask token"):
        learnt.check(ENCODERS["bert"], plain)
    with pytest.raises(ValueError, match="need one vocabulary, got vocab_size generator 50, discriminator 60"):
        model_of("bert", generator={"vocab_size": 50})
    with pytest.raises(ValueError, match=r"the generator must read both ways .* got gpt2, which reads forward"):
        model_of("bert", generator={"model_type": "gpt2"})
    with pytest.raises(ValueError, match=r"generator\.model_type must be a family"):
        model_of("bert", generator={"model_type": "bertt"})
