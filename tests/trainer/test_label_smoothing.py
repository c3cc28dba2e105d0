"""Label smoothing of causal models that transformers doesn't know by name predicts the next token, not the same one."""

from __future__ import annotations

import pytest
import torch

import hf_lnlm


@pytest.mark.parametrize("head", ["full", "chunked"])
def test_smoothing_next_to_nothing_is_the_plain_loss(tmp_path, head):
    model = hf_lnlm.RNNForCausalLM(hf_lnlm.RNNConfig(vocab_size=30, hidden_size=8, loss_head=head)).eval()
    arguments = hf_lnlm.LNLMTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=1e-9, save_strategy="no"
    )
    trainer = hf_lnlm.LNLMTrainer(model=model, args=arguments)
    ids = torch.randint(1, 30, (3, 7))
    ids_with_gap = ids.masked_fill(torch.arange(7) == 4, -100)
    batch = {"input_ids": ids, "labels": ids_with_gap}
    with torch.no_grad():
        wanted = model(**batch).loss
        found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
