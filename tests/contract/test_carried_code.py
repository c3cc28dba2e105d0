"""A checkpoint loads where hf_lnlm is missing: one subprocess a family goes through everything that was saved here."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import set_seed
from transformers.dynamic_module_utils import get_imports

from hf_lnlm.hub.bundle import carried_files
from hf_lnlm.registry import FAMILIES, ROWS, Family

from ..odd_offsets import OFFSETS, shift_folder
from .cases import Case, build, cases, first_output, inputs_of, labels_of, one_case_a_family, rows_of
from .test_lora import adapted, shaken
from .test_training import train

SAVED = "model"  # every folder's name: equal code in folders of one name is one module, whose loops are compiled once
SCRIPT = Path(__file__).with_name("elsewhere.py")
PEFT_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
}


class Plan:
    """Checkpoints saved here, and what to check about them elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: list[dict[str, Any]] = []
        self.offsets = itertools.cycle(OFFSETS)

    def add(self, kind: str, name: str, case: Case, model: Any, folder: Path, **more: Any) -> None:
        """Note a saved model's inputs and output, and a job of some kind about it."""
        inputs = inputs_of(case, batch=3)
        inputs["attention_mask"][1, ..., :2] = 0
        shift_folder(folder, next(self.offsets))
        tensors = self.root / f"{name}.pt"
        saved = {"inputs": inputs, "output": first_output(model.eval(), **inputs)} | more.pop("also", {})
        torch.save(saved, tensors)
        job = {"kind": kind, "name": name, "auto": case.auto, "folder": str(folder), "tensors": str(tensors)}
        self.jobs.append(job | more)

    def run(self, *missing: str) -> dict[str, str]:
        """Run the jobs in a process without the package (and others); return what went wrong by job name."""
        path = self.root / "plan.json"
        path.write_text(json.dumps(self.jobs))
        hub = {"HF_HOME": str(self.root / "hf"), "HF_MODULES_CACHE": str(self.root / "modules"), "HF_HUB_OFFLINE": "1"}
        environment = (
            os.environ | hub | {"PYTHONPATH": str(Path(transformers.__file__).parents[1])}
        )  # not the package's
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(path), *missing],
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.root,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads(done.stdout.splitlines()[-1])
        assert len(results) == len(self.jobs)
        return {self.jobs[int(n)]["name"]: result for n, result in results.items() if result != "ok"}


def plan_head(plan: Plan, case: Case) -> Any:
    """A head saved, loaded through its own Auto class and from its config, generating if it can; return the model."""
    model, folder = build(case), plan.root / str(case) / SAVED
    model.save_pretrained(folder)
    plan.add("same_head", f"{case}", case, model, folder)
    plan.add("from_config", f"{case}-config", case, model, folder)
    if case.generates:
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(inputs_of(case, batch=3)["input_ids"], **options)
        plan.add("generates", f"{case}-generates", case, model, folder, also={"tokens": tokens})
    return model


def plan_heads(plan: Plan, family: Family) -> None:
    """Every head of a family by itself, and through the Auto classes of the others."""
    for case in cases(composed=True):
        if case.family is not family:
            continue
        model = plan_head(plan, case)
        for other in family.models:
            # some masked language models read both ways whatever was asked for
            both_ways = case.both_ways or getattr(model.config, "reads_both_ways", False)
            if other != case.auto and not (both_ways and other == "AutoModelForCausalLM"):
                target = Case(family, other, case.both_ways)
                name, folder = f"{case}-as-{other}", plan.root / str(case) / SAVED
                plan.add("other_head", name, target, build(target), folder, **{"class": target.cls.__name__})


def plan_trained(plan: Plan, case: Case) -> None:
    """A stock Trainer's checkpoint, a merged LoRA model, and an adapter on a base that carries its code."""
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    model, run, adapter = build(case), plan.root / f"{case}-run", plan.root / f"{case}-adapter"
    train(model, rows_of(case), run, **arguments)
    (run / "checkpoint-1").rename(run / SAVED)
    plan.add("same_head", f"{case}-trainer", case, model, run / SAVED)

    base = plan.root / f"{case}-base" / SAVED
    build(case).save_pretrained(base)
    tuned = shaken(adapted(case))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(adapter)
    assert not list(adapter.glob("*.py"))
    task = tuned.peft_config["default"].task_type
    if task in PEFT_CLASSES:
        plan.add("adapter", f"{case}-adapter", case, tuned, adapter, peft=PEFT_CLASSES[task])
    plan_revised(plan, case, base)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(plan.root / f"{case}-merged" / SAVED)
    plan.add("same_head", f"{case}-merged", case, merged, plan.root / f"{case}-merged" / SAVED)


def plan_revised(plan: Plan, case: Case, base: Path) -> None:
    """Another revision of the code joins the first in one process; then the first must still be itself."""
    revised = plan.root / f"{case}-revised" / SAVED
    shutil.copytree(base, revised)
    for path in revised.glob("*.py"):
        path.write_text(path.read_text() + "\n# revised\n")
    model = build(case)
    for name, folder in (("before", base), ("revised", revised), ("after", base)):
        plan.add("same_head", f"{case}-{name}", case, model, folder)


def needs_compilers(family: Family) -> bool:
    """Whether a family carries kernels for an optional compiler."""
    return any(
        b"import numba" in content or b"import triton" in content
        for content in carried_files(family.model_type).values()
    )


@pytest.mark.parametrize("family", [row for row in FAMILIES if needs_compilers(row)], ids=lambda row: row.name)
def test_loads_where_numba_and_triton_are_missing(family: Family, tmp_path):
    plan = Plan(tmp_path)
    for case in cases(loss=True, both_ways=False):
        if case.family is family:
            model = build(case, backend="eager")
            model.config.backend = "auto"
            model.save_pretrained(tmp_path / str(case) / SAVED)
            plan.add("close_head", f"{case}", case, model, tmp_path / str(case) / SAVED)
    failures = plan.run("numba", "triton")
    assert not failures, "\n".join(f"{name}: {why}" for name, why in failures.items())


@pytest.mark.parametrize("family", ROWS, ids=lambda row: row.name)
def test_loads_where_the_package_is_missing(family: Family, tmp_path):
    set_seed(0)
    plan = Plan(tmp_path)
    plan_heads(plan, family)
    trained = [case for case in cases(loss=True, both_ways=False, composed=True) if case.family is family]
    plan_trained(
        plan, max(trained, key=lambda case: (case.generates, case.auto == "AutoModelForSequenceClassification"))
    )
    failures = plan.run()
    assert not failures, "\n".join(f"{name}: {why}" for name, why in failures.items())


@pytest.mark.core
@pytest.mark.slow
def test_a_head_of_every_family_loads_where_the_package_is_missing(tmp_path):
    """All families in one process: every family by itself is above."""
    plan = Plan(tmp_path)
    for case in one_case_a_family():
        plan_head(plan, case)
    failures = plan.run()
    assert not failures, "\n".join(f"{name}: {why}" for name, why in failures.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
def test_trained_checkpoints_of_every_head_load_elsewhere(family: Family, tmp_path):
    plan = Plan(tmp_path)
    for case in cases(loss=True, both_ways=False):
        if case.family is family:
            plan_trained(plan, case)
    failures = plan.run()
    assert not failures, "\n".join(f"{name}: {why}" for name, why in failures.items())


@pytest.mark.parametrize("family", ROWS, ids=lambda row: row.name)
def test_carried_files_are_flat_and_few(family: Family):
    files = carried_files(family.model_type)
    assert f"modeling_{family.name}.py" in files
    assert f"configuration_{family.name}.py" in files
    for name, content in files.items():
        assert "/" not in name
        text = content.decode()
        assert "from ..." not in text
        assert "from hf_lnlm" not in text
        assert "import hf_lnlm" not in text
    others = {f"modeling_{row.name}.py" for row in FAMILIES if row is not family}
    if family.room != "hybrid":
        assert not others & set(files)


@pytest.mark.parametrize("family", ROWS, ids=lambda row: row.name)
def test_carried_files_need_no_optional_package(family: Family, tmp_path):
    """transformers refuses a checkpoint whose files import, outside `try`, what is not installed."""
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for name, content in carried_files(family.model_type).items():
        path = tmp_path / name
        path.write_bytes(content)
        assert set(get_imports(path)) <= allowed, name


@pytest.mark.parametrize("case", cases(loss=True, both_ways=False)[:1], ids=str)
def test_adapter_folder_of_peft_has_no_code(case: Case, tmp_path):
    model = peft.get_peft_model(build(case), peft.LoraConfig(target_modules=list(case.family.lora_targets)))
    inputs = inputs_of(case)
    model(**inputs, **labels_of(case, inputs)).loss.backward()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
