"""Sparse mixtures: what is wrong with stock ones is right here; padding, groups, figures, refusals."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration, default_data_collator

from hf_lnlm import (
    LNLMTrainer,
    LNLMTrainingArguments,
    ReplacedTokenConfig,
    SparseMoEConfig,
    SparseMoEForCausalLM,
    SparseMoEForMaskedLM,
    SparseMoEForSequenceClassification,
    SparseMoEForTokenClassification,
    SparseMoEModel,
)

TINY = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "num_experts": 4,
}  # fmt: skip
HEADS = (
    SparseMoEForCausalLM,
    SparseMoEForMaskedLM,
    SparseMoEForSequenceClassification,
    SparseMoEForTokenClassification,
)
HEADS_OF_TOKENS = (SparseMoEForCausalLM, SparseMoEForMaskedLM, SparseMoEForTokenClassification)
DIVIDED = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1, "num_labels": 50}  # losses over the whole batch


def build(cls=SparseMoEForCausalLM, **fields):
    torch.manual_seed(0)
    model = cls(SparseMoEConfig(**{**TINY, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids(*shape, seed=1):
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(row, padding):
    mask = torch.ones(1, row.shape[1] + padding, dtype=torch.long)
    mask[:, :padding] = 0
    return torch.cat([ids(1, padding, seed=9), row], 1), mask


# ---- what stock Switch does wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 0.75])
def test_padding_takes_no_place_in_an_expert_and_counts_for_no_loss(factor):
    model, row = build(capacity_factor=factor).train(), ids(1, 11)
    alone = model(row, labels=row)
    padded, mask = left_padded(row, 7)
    beside = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(beside.logits[:, 7:], alone.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside.aux_loss, alone.aux_loss)
    for ours, theirs in zip(beside.router_totals, alone.router_totals, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_neighbours_in_the_batch_take_no_place_in_an_expert():
    model, rows = build(capacity_factor=0.75).train(), ids(3, 11)
    together = model(rows).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index], model(row.unsqueeze(0)).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_drafts_are_taken_back_exactly(factor):
    """Drafted tokens are checked together, and experts take them as they take them one by one."""
    model = build(capacity_factor=factor).double().eval()
    other = build(num_hidden_layers=1).double().eval()  # drafts mostly wrong tokens
    text, plain = ids(1, 9).repeat(1, 2), {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(text, **plain)
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=5, **plain), expected)
    assert torch.equal(model.generate(text, assistant_model=other, **plain), expected)


def test_documents_of_a_packed_row_have_capacities_of_their_own():
    model, first, second = build(capacity_factor=0.75).train(), ids(1, 7), ids(1, 9, seed=2)
    packed = model(torch.cat([first, second], 1), position_ids=torch.tensor([[*range(7), *range(9)]])).logits
    torch.testing.assert_close(packed[:, :7], model(first).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 7:], model(second).logits, rtol=1e-4, atol=1e-5)


def test_router_losses_are_in_the_loss_of_training_unasked_and_not_in_evaluation():
    for cls in HEADS:
        model, row = build(cls), ids(2, 9)
        labels = torch.tensor([0, 1]) if cls is SparseMoEForSequenceClassification else row % 2
        trained = model.train()(row, labels=labels)
        assert float(trained.aux_loss.detach()) > 0
        evaluated = model.eval()(row, labels=labels)
        assert evaluated.aux_loss is None
        torch.testing.assert_close(trained.loss - trained.aux_loss, evaluated.loss)


def test_the_router_learns_by_its_losses():
    model = build()
    model.train()(ids(2, 9), labels=ids(2, 9)).aux_loss.backward()
    assert all(layer.mlp.router.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_num_items_in_batch_divides_the_whole_loss():
    model, row = build().train(), ids(2, 9)
    once, twice = (model(row, labels=row, num_items_in_batch=items).loss for items in (16, 32))
    torch.testing.assert_close(once, model(row, labels=row).loss)
    torch.testing.assert_close(once, 2 * twice)


def test_jitter_moves_the_router_and_not_what_the_experts_read():
    model = build(SparseMoEModel, router_jitter_noise=0.9, num_experts=1, num_experts_per_tok=1, norm_topk_prob=False)
    row = ids(1, 9)  # with one expert the gate is 1 whatever the router says
    torch.testing.assert_close(model.train()(row).last_hidden_state, model.eval()(row).last_hidden_state)
    several = build(SparseMoEModel, router_jitter_noise=0.9)
    moved = several.train()(row).last_hidden_state - several.eval()(row).last_hidden_state
    assert moved.abs().max() > 1e-3


def test_the_router_is_float32_in_a_bfloat16_model():
    outputs = build().bfloat16().eval()(ids(1, 9), output_router_logits=True)
    assert [logits.dtype for logits in outputs.router_logits] == [torch.float32] * 2
    assert outputs.logits.dtype == torch.bfloat16


def test_labels_need_not_be_contiguous():
    rows = ids(9, 2).T
    assert not rows.is_contiguous()
    model = build().eval()
    torch.testing.assert_close(model(rows, labels=rows).loss, model(rows, labels=rows.contiguous()).loss)


def test_stock_switch_is_refused(tmp_path):
    config = SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, num_experts=2, decoder_start_token_id=0
    )
    model = SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"switch_transformers can't be trained here: .*padding.*SparseMoE"):
        LNLMTrainer(model=model, args=LNLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


# ---- the rest -----------------------------------------------------------------------------------------------------------


def test_every_kth_layer_is_sparse_and_a_shared_expert_sees_all():
    model = build(num_hidden_layers=4, sparse_step=2, shared_expert_intermediate_size=5)
    assert [layer.sparse for layer in model.model.layers] == [False, True, False, True]
    shared = model.model.layers[1].mlp.shared_expert
    shared.c_proj.weight.data.mul_(2)
    changed = model.eval()(ids(1, 9)).logits
    shared.c_proj.weight.data.div_(2)
    assert (changed - model(ids(1, 9)).logits).abs().amin() > 0


def test_expert_dropout_only_while_training():
    model, row = build(SparseMoEModel, expert_dropout=0.5), ids(1, 9)
    torch.testing.assert_close(model.eval()(row).last_hidden_state, model(row).last_hidden_state)
    assert (model.train()(row).last_hidden_state - model(row).last_hidden_state).abs().max() > 1e-3


def test_reads_both_ways_where_it_is_to():
    row = ids(1, 9)
    other = row.clone()
    other[0, -1] = 3 if int(row[0, -1]) != 3 else 4
    for both, cls in ((False, SparseMoEModel), (True, SparseMoEModel), (None, SparseMoEForMaskedLM)):
        model = build(cls, bidirectional=both).eval()
        moved = (model(row)[0] - model(other)[0]).detach().abs().amax(-1)[0, :-1]
        assert bool((moved > 0).all()) if both in (True, None) else float(moved.max()) < 1e-5


def test_weights_of_attention_are_given_both_ways():
    model, (row, mask) = build(SparseMoEModel, bidirectional=True).eval(), left_padded(ids(1, 6), 3)
    outputs = model(row, attention_mask=mask, output_attentions=True)
    plain = model(row, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(outputs.last_hidden_state[:, 3:], plain[:, 3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(1, 2, 9))
    assert not bool(outputs.attentions[0][:, :, 3:, :3].any())


def test_figures_of_the_router():
    model = build(capacity_factor=0.5).train()
    sums = model.measured_sums(model(ids(2, 10)))
    figures = model.measured_summary(sums)
    assert 1.0 <= figures["router_load"] <= 4.0
    assert 0.0 < figures["router_entropy"] < torch.tensor(4.0).log()
    assert 0.5 <= figures["router_dropped"] < 1.0  # half the choices have no room, some experts stay empty
    assert model.measured_summary(model.measured_sums(build().train()(ids(2, 10))))["router_dropped"] == 0.0
    assert model.measured_sums(model.eval()(ids(2, 10))) == {}


def train(model, folder, batch, accumulation, **given):
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": (torch.arange(10) >= index % 4).long()}
        for index, row in enumerate(ids(8, 10))
    ]
    arguments = LNLMTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2, seed=3, optim="sgd",
        learning_rate=0.05, max_grad_norm=0.0, **given,
    )  # fmt: skip
    trainer = LNLMTrainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    return trainer


def same_training(whole, log, state, other_log):
    """Compare the logs of both steps and the weights after them, which plain SGD moves by the gradients."""
    for one, other in zip(log[:2], other_log[:2], strict=True):
        for name in ("loss", "grad_norm", "router_load", "router_entropy", "router_dropped"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("cls", HEADS_OF_TOKENS)
def test_accumulated_batches_are_one_batch(cls, tmp_path):
    whole, parts = build(cls, **DIVIDED), build(cls, **DIVIDED)
    logs = [train(whole, tmp_path, 8, 1).state.log_history, train(parts, tmp_path, 2, 4).state.log_history]
    same_training(whole.state_dict(), logs[0], parts.state_dict(), logs[1])
    assert parts.model.global_load is None


@pytest.mark.slow
def test_two_processes_are_one_batch(repository, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.models.mixture.distributed", str(tmp_path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "answers.pt")
    for cls in HEADS_OF_TOKENS:
        whole, answer = build(cls, **DIVIDED), found[cls.__name__]
        log = train(whole, tmp_path, 8, 1).state.log_history
        same_training(whole.state_dict(), log, answer["weights"], answer["log"])


def test_the_load_counted_ahead_is_that_of_the_step(tmp_path, monkeypatch):
    """Dropout and jitter are drawn alike, so a step is run on the very routing that was counted."""
    model = build(residual_dropout=0.3, router_jitter_noise=0.3)
    seen, forward = [], type(model).forward

    def watched(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        seen.append((torch.is_grad_enabled(), outputs.router_totals.load.clone(), self.model.global_load))
        return outputs

    monkeypatch.setattr(type(model), "forward", watched)
    train(model, tmp_path, 2, 4, remove_unused_columns=False)
    for step in (seen[:8], seen[8:]):
        ahead, trained = [[load for grad, load, _ in step if grad is mode] for mode in (False, True)]
        assert len(ahead) == len(trained) == 4
        assert all(map(torch.equal, ahead, trained))
        torch.testing.assert_close(step[-1][2], torch.stack(trained).sum(0).double())


REFUSED = [
    ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_experts \\(4\\), got 5"),
    ({"sparse_step": 3}, "sparse_step must be at most num_hidden_layers \\(2\\)"),
    ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "from which no router learns"),
    ({"capacity_factor": 0.0}, "capacity_factor must be between"),
    ({"router_jitter_noise": 1.0}, "router_jitter_noise must be between"),
    ({"intermediate_size": 1}, "moe_intermediate_size must be given"),
    ({"num_experts": 4096, "moe_intermediate_size": 2**24, "hidden_size": 2**20}, "must be at most 1099511627776"),
    ({"activation_function": "none such"}, "activation_function must be one of"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseMoEConfig(**{**TINY, **fields})


def test_a_causal_model_reads_one_way():
    with pytest.raises(ValueError, match="cannot be bidirectional"):
        SparseMoEForCausalLM(SparseMoEConfig(**TINY, bidirectional=True))


def test_a_model_made_of_others_would_lose_the_router_losses():
    part = SparseMoEConfig(**TINY).to_dict()
    with pytest.raises(ValueError, match="router_aux_loss_coef must be 0"):
        ReplacedTokenConfig(generator=copy.deepcopy(part), discriminator=copy.deepcopy(part))
    part |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    assert ReplacedTokenConfig(generator=copy.deepcopy(part), discriminator=part).discriminator.num_experts == 4
