"""What else the Trainer adds: weight decay, non-finite values, launches, epochs, figures, constraints, arguments."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.epochs import EndlessEpochs, set_epoch_everywhere
from hf_lnlm.trainer.launch import launch_fault
from hf_lnlm.trainer.nonfinite import NonFiniteError, first_bad_parameter
from hf_lnlm.trainer.trainer import LNLMTrainer
from tests.trainer import families, runs, scale


def small(tmp_path: Path, head: str = "BertForMaskedLM", **changed: Any) -> LNLMTrainer:
    model, rows = families.build(head)
    return scale.trainer(model, rows, str(tmp_path), 4, 1, **changed)


# ---- arguments


def test_arguments_keep_the_stock_names_and_add_four(tmp_path: Path) -> None:
    stock = set(T.TrainingArguments.__dataclass_fields__)
    added = {"carry_state", "early_stopping_patience", "early_stopping_threshold", "stop_on_nonfinite"}
    assert set(LNLMTrainingArguments.__dataclass_fields__) - stock == added
    arguments = LNLMTrainingArguments(str(tmp_path), use_cpu=True, seed=5)
    assert arguments.enable_jit_checkpoint and arguments.data_seed == 5
    assert LNLMTrainingArguments(str(tmp_path), use_cpu=True, data_seed=2).data_seed == 2


@pytest.mark.parametrize(
    ("terminal", "given", "quiet"), [(True, None, False), (False, None, True), (False, False, False)]
)
def test_bars_follow_the_terminal(tmp_path: Path, monkeypatch: Any, terminal: bool, given: Any, quiet: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    T.logging.set_verbosity_warning()
    assert LNLMTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=given).disable_tqdm is quiet


def test_plain_stock_arguments_work(tmp_path: Path) -> None:
    model, rows = families.build("BertForMaskedLM")
    arguments = T.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = LNLMTrainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(T.PrinterCallback)
    assert trainer.train().global_step == 1
    assert not trainer.args.enable_jit_checkpoint


# ---- weight decay and constraints


class Named(nn.Module):
    _no_weight_decay = (r"A_log$", r"^decay\.")

    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.matrix = nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 2)
        self.decay = nn.Linear(2, 2)


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.decay = Named(), nn.Linear(2, 2)


def test_a_model_names_what_has_no_weight_decay(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    assert trainer.get_decay_parameter_names(Named()) == ["matrix.weight"]
    assert sorted(trainer.get_decay_parameter_names(Holding())) == ["decay.weight", "inner.matrix.weight"]
    stock = T.Trainer.get_decay_parameter_names(trainer, trainer.model)
    assert trainer.get_decay_parameter_names(trainer.model) == stock


def test_constraints_are_applied_after_each_step(tmp_path: Path) -> None:
    trainer = small(tmp_path, max_steps=3)
    norms: list[float] = []

    def apply_constraints() -> None:
        weight = trainer.model.bert.embeddings.word_embeddings.weight
        norms.append(weight.norm().item())
        with torch.no_grad():
            weight.mul_(0.5 / weight.norm())

    trainer.model.apply_constraints = apply_constraints
    trainer.train()
    assert len(norms) == 3
    assert trainer.model.bert.embeddings.word_embeddings.weight.norm().item() == pytest.approx(0.5, rel=1e-5)


# ---- non-finite values


def test_a_bad_loss_stops_with_step_and_parameter(tmp_path: Path) -> None:
    trainer = small(tmp_path, max_steps=3)
    with torch.no_grad():
        trainer.model.bert.encoder.layer[0].output.dense.weight[1, 1] = math.inf
    name = r"parameter bert\.encoder\.layer\.0\.output\.dense\.weight isn't finite itself"
    with pytest.raises(NonFiniteError, match=rf"the loss is nan at step 1: {name}"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_bad_gradient_stops_with_step_and_parameter(tmp_path: Path, max_grad_norm: float) -> None:
    model, rows = families.build("BertForMaskedLM")
    weight = model.bert.encoder.layer[0].output.dense.weight
    steps = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return gradient * math.inf if len(steps) == 3 else gradient

    weight.register_hook(spoil)
    trainer = scale.trainer(model, rows, str(tmp_path), 4, 1, max_steps=5)
    trainer.args.max_grad_norm = max_grad_norm
    with pytest.raises(
        NonFiniteError, match=r"gradient norm is inf at step 3: the gradient of bert\.\S*output\.dense\.weight"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


def test_the_stop_can_be_turned_off(tmp_path: Path) -> None:
    trainer = small(tmp_path, max_steps=2, stop_on_nonfinite=False)
    with torch.no_grad():
        trainer.model.bert.encoder.layer[0].output.dense.weight[1, 1] = math.inf
    assert trainer.train().global_step == 2
    assert first_bad_parameter(nn.Linear(2, 2)) == "all parameters are finite"


def test_the_gradient_norm_is_the_stock_one(tmp_path: Path) -> None:
    norms = []
    for kind in (LNLMTrainer, T.Trainer):
        trainer = small(tmp_path)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainer.args.max_grad_norm = 0.5
        norms.append(float(kind._clip_grad_norm(trainer, trainer.model)))
        clipped = torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.model.parameters()])
        assert float(clipped) == pytest.approx(0.5, rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# ---- launches


@pytest.mark.parametrize(
    ("changed", "environment", "said"),
    [
        ({}, {}, None),
        ({"world_size": 2}, {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, None),
        ({}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "x", "ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({}, {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "torchrun --nproc_per_node <processes>"),
        ({}, {"WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2"),
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, "torchrun --nproc_per_node 4"),
        ({"fsdp": True}, {}, "DistributedConfig"),
        ({"world_size": 2}, {"ACCELERATE_USE_FSDP": "true"}, "DistributedConfig(fsdp_size=2)"),
        ({"n_gpu": 2, "device": torch.device("cuda")}, {}, "torchrun --nproc_per_node 2"),
        ({"fsdp": True, "world_size": 2, "device": torch.device("cuda")}, {}, None),
    ],
)
def test_launches(changed: dict[str, Any], environment: dict[str, str], said: str | None) -> None:
    values = {"world_size": 1, "n_gpu": 0, "device": torch.device("cpu"), "fsdp": False, **changed}
    fault = launch_fault(SimpleNamespace(**values), environment)
    assert (fault is None) if said is None else (said in (fault or ""))


def test_the_simple_launcher_of_accelerate_is_recognised() -> None:
    given = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "train.py"]
    arguments = launch_command_parser().parse_args(given)
    arguments.dynamo_backend = "no"
    environment = prepare_simple_launcher_cmd_env(arguments)[1]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        assert name not in environment
    alone = SimpleNamespace(world_size=1, n_gpu=0, device=torch.device("cpu"), fsdp=False)
    assert "started one process instead of several; use torchrun" in (launch_fault(alone, environment) or "")


def test_a_refused_launch_stops_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS=2, but this process would train alone; use torchrun"):
        small(tmp_path)


# ---- epochs


class Counting(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return index


def test_the_epoch_reaches_dataset_and_samplers() -> None:
    dataset = Counting()
    sampler = RandomSampler(dataset)
    loader = DataLoader(dataset, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    orders = []
    for epoch in (0, 1, 0):
        set_epoch_everywhere(loader, epoch, seed=3)
        orders.append(list(sampler))
    assert dataset.epochs == [0, 1, 0]
    assert orders[0] == orders[2] != orders[1]


def test_a_stream_goes_on_with_its_epochs() -> None:
    class Rows:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter([(self.epoch, 0), (self.epoch, 1)])

    found = iter(EndlessEpochs(Rows()))
    assert [next(found) for _ in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert list(EndlessEpochs([])) == []


# ---- figures


def test_training_logs_perplexity_bits_per_byte_and_speed(tmp_path: Path) -> None:
    case = {**runs.MAP, "dropout": 0.0, "accumulation": 2}
    trainer = runs.trainer_of(case, str(tmp_path), max_steps=2, logging_steps=2, learning_rate=0.0, save_strategy="no")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    seen = [trainer.train_dataset[index] for index in batches_of(trainer, 12)]
    bytes_seen, tokens = sum(row["num_bytes"] for row in seen), 12 * runs.LENGTH
    nats = math.log(entry["perplexity"]) * 12 * (runs.LENGTH - 1)
    assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]), rel=1e-4)
    assert entry["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_seen, rel=1e-6)
    assert 0 < entry["tokens_per_second"] < tokens / 1e-4


def batches_of(trainer: LNLMTrainer, rows: int) -> list[int]:
    """Return the first rows of the first epoch, in the order of the run."""
    loader = trainer.get_train_dataloader()
    set_epoch_everywhere(loader, 0, trainer.args.data_seed)
    return [index for batch in loader.batch_sampler for index in batch][:rows]


def test_evaluation_adds_up_batches_of_unequal_length(tmp_path: Path) -> None:
    model, rows = families.build("BertForMaskedLM")
    losses = []
    for batch in (8, 3):
        trainer = scale.trainer(model, rows, str(tmp_path), 4, 1, per_device_eval_batch_size=batch)
        losses.append(trainer.evaluate(rows)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_evaluation_measures_without_gathering_logits(tmp_path: Path) -> None:
    trainer = runs.trainer_of(runs.MAP, str(tmp_path))
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(trainer.train_dataset), "x", prediction_loss_only=True)
    assert output.predictions is None
    metrics = output.metrics
    assert {"eval_loss", "eval_perplexity", "eval_accuracy", "eval_bits_per_byte"} <= set(metrics)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-6)


def test_label_smoothing_is_measured_too(tmp_path: Path) -> None:
    found = []
    for smoothing in (0.0, 0.2):
        case = {**runs.MAP, "dropout": 0.0}
        trainer = runs.trainer_of(case, str(tmp_path), label_smoothing_factor=smoothing)
        found.append(trainer.evaluate(trainer.train_dataset))
    assert found[1]["eval_perplexity"] == pytest.approx(found[0]["eval_perplexity"], rel=1e-6)
    assert {"eval_accuracy", "eval_bits_per_byte"} <= set(found[1])


def test_classification_has_no_perplexity(tmp_path: Path) -> None:
    entry = scale.step(*families.build("BertForSequenceClassification"), str(tmp_path), 4, 1).state.log_history[0]
    assert "perplexity" not in entry and "tokens_per_second" in entry


def test_evaluation_leaves_the_random_state(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    before = torch.random.get_rng_state()
    trainer.evaluate(trainer.train_dataset)
    trainer.predict(trainer.train_dataset)
    assert torch.equal(before, torch.random.get_rng_state())
