"""Forward and backward language modelling: by hand, no token sees itself, what is shared and saved."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig

from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.models.composed.modeling_bidirectional import BidirectionalForPreTraining, reversal
from hf_lnlm.objectives import objective
from tests.trainer import scale

TOKENIZER = build_tokenizer("byte")
FAMILIES = {
    "lnlm_rnn": {"hidden_size": 16, "num_hidden_layers": 2},
    "lnlm_ssm": {"hidden_size": 16, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
}


def model_of(name: str) -> BidirectionalForPreTraining:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=263, **FAMILIES[name])
    objective("bidirectional").check(config, TOKENIZER)
    return objective("bidirectional").build(config).eval()


def batch_of() -> dict[str, torch.Tensor]:
    rows = [{"input_ids": list(range(10, 19))}, {"input_ids": list(range(30, 35))}]
    return objective("bidirectional").collator(TOKENIZER)(rows)


def test_rows_in_reverse() -> None:
    assert reversal(torch.zeros(1, 4), None).tolist() == [[3, 2, 1, 0]]
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
    order = reversal(mask, mask)
    assert order.tolist() == [[2, 1, 0, 3], [0, 3, 2, 1], [3, 1, 2, 0], [0, 1, 2, 3]]
    assert torch.equal(order.gather(1, order), torch.arange(4).expand(4, 4)), "its own inverse"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_by_hand(name: str) -> None:
    model, batch = model_of(name), batch_of()
    with torch.no_grad():
        found = model(**batch)
        total = {"forwards": 0.0, "backwards": 0.0}
        for ids in (torch.arange(10, 19), torch.arange(30, 35)):
            for part, row in (("forwards", ids), ("backwards", ids.flip(0))):
                logits = getattr(model, part)(row[None]).logits[0]
                total[part] += float(functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    assert float(found.loss) == pytest.approx((total["forwards"] + total["backwards"]) / 2 / 12, rel=1e-5)
    learnt = objective("bidirectional")
    metrics = learnt.summary(learnt.sums(found, batch))
    assert metrics["forward_loss"] == pytest.approx(total["forwards"] / 12, rel=1e-5)
    assert metrics["backward_loss"] == pytest.approx(total["backwards"] / 12, rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(found.loss), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_direction_sees_what_it_predicts(name: str) -> None:
    model, ids = model_of(name), torch.arange(10, 18)[None]
    with torch.no_grad():
        before = model(ids)
        for place in range(8):
            other = ids.clone()
            other[0, place] = 99
            after = model(other)
            assert torch.allclose(after.logits[:, :place], before.logits[:, :place], atol=1e-6)
            assert torch.allclose(
                after.backward_logits[:, place + 1 :], before.backward_logits[:, place + 1 :], atol=1e-6
            )
            assert not torch.allclose(after.logits[:, place], before.logits[:, place], atol=1e-6)
            assert not torch.allclose(after.backward_logits[:, place], before.backward_logits[:, place], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_shared_and_parts_load_by_themselves(name: str, tmp_path) -> None:
    model, batch = model_of(name), batch_of()
    ahead, back = model.forwards, model.backwards
    assert ahead.get_input_embeddings().weight is back.get_input_embeddings().weight
    assert ahead.get_output_embeddings().weight is back.get_output_embeddings().weight
    shared = {id(value) for value in ahead.parameters()} & {id(value) for value in back.parameters()}
    assert len(shared) < len(list(ahead.parameters())) / 2, "layers are each direction's own"
    model.save_pretrained(tmp_path)
    again, report = BidirectionalForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).loss, model(**batch).loss)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "backwards").eval()
        row = torch.arange(18, 9, -1)[None]
        assert torch.equal(alone(row).logits, back(row).logits)


def test_hidden_states_of_both_directions_in_the_order_of_the_text() -> None:
    model, ids = model_of("lnlm_rnn"), torch.arange(10, 18)[None]
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        back = model.backwards(ids.flip(1), output_hidden_states=True).hidden_states
    assert len(found.hidden_states) == len(found.backward_hidden_states) == 3
    assert found.hidden_states[-1].shape == (1, 8, 16)
    assert torch.equal(found.backward_hidden_states[-1], back[-1].flip(1))


def test_accumulated_batches_equal_one_big_batch(tmp_path) -> None:
    for goal in ("bidirectional", "sentence_order", "next_sentence"):
        whole = scale.loss_and_norm(goal, str(tmp_path / goal), batch=8, accumulation=1)
        cut = scale.loss_and_norm(goal, str(tmp_path / goal), batch=2, accumulation=4)
        assert cut == pytest.approx(whole, rel=1e-4), goal


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bert reads in both directions.*Models that fit 'bidirectional': lnlm_rnn"):
        objective("bidirectional").check(BertConfig(), TOKENIZER)
