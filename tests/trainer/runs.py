"""Training runs in forked processes: they can be killed at any moment, and cost no import of transformers.

`python -m tests.trainer.runs '<json list of requests>'` answers with one line of JSON a request. It runs in a process of
its own, which stays single-threaded, so that forking it is safe.
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as T
from datasets import Dataset

from hf_lnlm.data.bptt_streams import BPTTStreams
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import RNNForCausalLM
from hf_lnlm.objectives import objective
from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.checkpoints import find_fault, list_checkpoints, step_of
from hf_lnlm.trainer.trainer import LNLMTrainer

LENGTH, BATCH, STEPS, SAVE = 24, 3, 14, 4
Case = dict[str, Any]
MAP: Case = {"objective": "causal", "data": "map", "workers": 0, "accumulation": 1}


def texts(number: int = 3) -> Dataset:
    """Return documents of pseudo-random words."""
    generator = random.Random(0)
    words = ["state", "lane", "token", "loss", "é", "kill", "resume", "epoch", "the", "of"]
    rows = [" ".join(generator.choice(words) for _ in range(25 + index)) for index in range(number)]
    return Dataset.from_dict({"text": rows})


class Stream:
    """Documents without a length."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


COMPOSED = ("replaced_token", "sentence_order", "next_sentence", "bidirectional")


def learnt_of(case: Case) -> Any:
    """Return the case's objective; permutation over lanes carries its memory."""
    options = {"memory": True} if (case["objective"], case["data"]) == ("permutation", "lanes") else {}
    return objective(case["objective"], **options)


def config_of(case: Case, common: dict[str, Any]) -> Any:
    """Return the configuration of an encoder with dropout, or of XLNet."""
    if case["objective"] == "permutation":
        sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "mem_len": LENGTH, "dropout": 0.1}
        return T.XLNetConfig(**common, **sizes)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "hidden_dropout": 0.2, "output_dropout": 0.2}
    return RNNConfig(**common, **sizes, bidirectional=case["objective"] != "bidirectional")


def model_of(case: Case, size: int) -> T.PreTrainedModel:
    """Return a tiny model with dropout that fits the case's objective."""
    small = {"hidden_size": 16, "num_hidden_layers": 1}
    common = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if case["objective"] in COMPOSED or case["objective"] == "permutation":
        return learnt_of(case).build(config_of(case, common))
    if case["objective"] == "masked":
        attention = {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
        return T.BertForMaskedLM(T.BertConfig(**common, **small, **attention))
    if case["objective"] == "span":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1}
        return T.T5ForConditionalGeneration(T.T5Config(**common, **shape, decoder_start_token_id=0))
    rate = case.get("dropout", 0.2)
    dropout = {"hidden_dropout": rate, "output_dropout": rate, "weight_dropout": rate}
    return RNNForCausalLM(RNNConfig(**common, **{**small, "num_hidden_layers": 2}, **dropout))


def rows_of(case: Case, tokenizer: Any, learnt: Any, documents: Dataset) -> Any:
    """Return the case's dataset: packed blocks, a stream of them, or lanes."""
    if case["data"] == "lanes":
        lanes, length = case.get("lanes", BATCH * int(os.environ.get("WORLD_SIZE", "1"))), learnt.raw_length(LENGTH)
        return BPTTStreams(documents, tokenizer, length, lanes, boundaries=case["objective"] == "causal")
    return learnt.rows(documents if case["data"] == "map" else Stream(documents), tokenizer, LENGTH)


def trainer_of(case: Case, folder: str, **changed: Any) -> LNLMTrainer:
    """Build the trainer of a case: objective, data, workers, accumulation."""
    tokenizer = build_tokenizer("byte", sentinels=20)
    learnt = learnt_of(case)
    torch.manual_seed(1)
    model = model_of(case, len(tokenizer))
    lanes = case["data"] == "lanes"
    values: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "save_steps": SAVE,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": case["accumulation"],
        "dataloader_num_workers": case["workers"],
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential" if lanes else "random",
        "carry_state": lanes and case["objective"] in ("causal", "permutation"),
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 5,
        **changed,
    }
    trainer = LNLMTrainer(
        model=model,
        args=LNLMTrainingArguments(**values),
        train_dataset=rows_of(case, tokenizer, learnt, texts()),
        eval_dataset=rows_of({**case, "data": "map"}, tokenizer, learnt, texts())
        if changed.get("eval_steps")
        else None,
        data_collator=learnt.collator(tokenizer, seed=7, bookkeeping=True),
        objective=learnt,
    )
    trainer.remove_callback(T.PrinterCallback)
    return trainer


def digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights, optimizer moments and carried state."""
    found = hashlib.sha256()
    for name in ("model.safetensors", "recurrent_state.safetensors"):
        if (folder / name).is_file():
            found.update((folder / name).read_bytes())
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    for key in sorted(moments):
        for value in moments[key].values():
            found.update(value.numpy().tobytes())
    return found.hexdigest()


def forked(work: Any) -> int:
    """Start `work()` in a forked process and return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def wait(child: int) -> int:
    """Return the exit status of a forked process, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Dying(T.TrainerCallback):
    """Kills its own process with SIGKILL at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(case: Case, folder: str, resume: bool = False, die_at: int | None = None, **changed: Any) -> None:
    """Train a case, from the newest checkpoint if asked, dying at a step if asked."""
    trainer = trainer_of(case, folder, **changed)
    if die_at is not None:
        trainer.add_callback(Dying(die_at))
    trainer.train(resume_from_checkpoint=resume)


def resumes_exactly(case: Case) -> dict[str, Any]:
    """Compare the end of a run that was killed in mid-epoch and resumed with that of one that wasn't."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        straight, killed = os.path.join(root, "straight"), os.path.join(root, "killed")
        statuses = [wait(forked(lambda: train(case, straight)))]
        statuses.append(wait(forked(lambda: train(case, killed, die_at=STEPS - 3))))
        statuses.append(wait(forked(lambda: train(case, killed, resume=True))))
        ends = [Path(folder) / f"checkpoint-{STEPS}" for folder in (straight, killed)]
        digests = [digest(end) if end.is_dir() else None for end in ends]
        state = json.loads((ends[0] / "trainer_state.json").read_text()) if ends[0].is_dir() else {}
        return {"statuses": statuses, "digests": digests, "epoch": state.get("epoch")}


def survives_kills(number: int, seed: int) -> dict[str, Any]:
    """Kill one run again and again at random moments while it saves after every second step.

    Returns how many kills hit, how often a checkpoint was found damaged, the greatest number of steps that a kill cost,
    whether the end equals an undisturbed run, the step it reached and hidden files left at the end.
    """
    settings = {"max_steps": 10 * number + 20, "save_steps": 2, "save_total_limit": 3, "logging_steps": 1000}
    generator = random.Random(seed)
    found = {"hits": 0, "damaged": 0, "lost": 0}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        folder, progress = os.path.join(root, "run"), os.path.join(root, "progress")
        for _ in range(number):
            before = done_in(progress)
            child = forked(lambda: train_noting(MAP, folder, progress, **settings))
            until(lambda goal=before + generator.randint(1, 5): done_in(progress) >= goal)
            time.sleep(generator.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            found["hits"] += wait(child) == -signal.SIGKILL
            checkpoints = list_checkpoints(folder)
            found["damaged"] += sum(find_fault(path) is not None for path in checkpoints)
            newest = max([step_of(path) or 0 for path in checkpoints], default=0)
            found["lost"] = max(found["lost"], done_in(progress) - newest)
            Path(progress).write_text(str(newest))
        settings["max_steps"] = newest + 4
        straight = os.path.join(root, "straight")
        statuses = [
            wait(forked(lambda path=path: train_noting(MAP, path, progress, **settings))) for path in (folder, straight)
        ]
        ends = [digest(Path(path) / f"checkpoint-{newest + 4}") for path in (folder, straight)]
        leftovers = [name for name in os.listdir(folder) if name.startswith(".")]
    return {**found, "statuses": statuses, "equal": ends[0] == ends[1], "reached": newest, "leftovers": leftovers}


def done_in(progress: str) -> int:
    """Return the number of steps noted in a file."""
    return int(Path(progress).read_text() or 0) if os.path.exists(progress) else 0


def until(reached: Any) -> None:
    """Wait for something, at most two minutes."""
    deadline = time.monotonic() + 120
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.001)


class Noting(T.TrainerCallback):
    """Writes down, outside the checkpoints, how many steps were done."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        draft = Path(f"{self.path}.draft")
        draft.write_text(str(state.global_step))
        os.replace(draft, self.path)


def train_noting(case: Case, folder: str, progress: str, **settings: Any) -> None:
    """Train from the newest checkpoint if there is one."""
    trainer = trainer_of(case, folder, lr_scheduler_type="constant", **settings)
    trainer.add_callback(Noting(progress))
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(folder)))


class Full(T.TrainerCallback):
    """Lets no file grow beyond a few kilobytes from a step on: writing a checkpoint fails as on a full disk."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def fills_the_disk() -> dict[str, Any]:
    """Return what is left when the second checkpoint of a run can't be written, and how the run goes on."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def run() -> None:
            trainer = trainer_of(MAP, folder)
            trainer.add_callback(Full(SAVE + 1))
            try:
                trainer.train()
            except OSError as error:
                raise SystemExit(3 if f"step {2 * SAVE}" in str(error) else 4) from error

        statuses = [wait(forked(run))]
        left = {path: find_fault(os.path.join(folder, path)) for path in os.listdir(folder)}
        statuses.append(wait(forked(lambda: train(MAP, folder, resume=True))))
        return {"statuses": statuses, "left": left, "last": find_fault(os.path.join(folder, f"checkpoint-{STEPS}"))}


def stops_on(number: int, while_evaluating: bool = False, workers: int = 0) -> dict[str, Any]:
    """Send a signal to a run and its workers, after some steps or in an evaluation, and finish the run afterwards."""
    case = {**MAP, "workers": workers}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        folder, straight, progress = (os.path.join(root, name) for name in ("run", "straight", "progress"))
        settings: dict[str, Any] = {"save_steps": 1000, "max_steps": 60, "lr_scheduler_type": "constant"}

        def run() -> None:
            os.setpgid(0, 0)
            if number == signal.SIGHUP:  # ignored where the tests were started by nohup
                signal.signal(number, signal.SIG_DFL)
            evaluation = {"eval_steps": 5, "eval_strategy": "steps" if while_evaluating else "no"}
            trainer = trainer_of(case, folder, **settings, **evaluation)
            trainer.add_callback(Slow(progress, while_evaluating))
            trainer.train()

        child = forked(run)
        until(lambda: done_in(progress) >= 3)
        os.killpg(child, number)
        statuses = [wait(child)]
        left = sorted(os.listdir(folder))
        reached = int(left[0].rpartition("-")[2]) if left else 0
        settings["max_steps"] = reached + 3
        for path in (folder, straight):
            again = path == folder
            statuses.append(wait(forked(lambda path=path, again=again: train(case, path, resume=again, **settings))))
        ends = [digest(Path(path) / f"checkpoint-{reached + 3}") for path in (folder, straight)]
        return {"statuses": statuses, "left": left, "equal": ends[0] == ends[1]}


class Slow(Noting):
    """Takes its time over every step and every evaluated batch, and notes which one it is at."""

    def __init__(self, path: str, evaluating: bool) -> None:
        super().__init__(path)
        self.evaluating, self.batches = evaluating, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.evaluating:
            super().on_step_end(args, state, control)
            time.sleep(0.05)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        Path(self.path).write_text(str(self.batches))
        time.sleep(0.05)


REQUESTS = {function.__name__: function for function in (resumes_exactly, survives_kills, fills_the_disk, stops_on)}


def main() -> None:
    """Answer the requests of the command line."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    for name, arguments in json.loads(sys.argv[1]):
        print(json.dumps(REQUESTS[name](**arguments)), flush=True)


if __name__ == "__main__":
    main()
