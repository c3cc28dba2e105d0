"""The demo from end to end on a few modules: interrupted, resumed, reported; and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hf_lnlm.cli.demo import ahead
from hf_lnlm.cli.demo import copy_act as demo_copy_act
from hf_lnlm.cli.demo import copy_task as demo_copy
from hf_lnlm.cli.demo import race as demo_race
from hf_lnlm.cli.demo import show as demo_module
from hf_lnlm.cli.demo.report import table
from hf_lnlm.registry import FAMILIES

from .running import run, small_library

ENCODERS = {"lnlm_linformer"}
"""Causal only in a variant that is no left-to-right language model of a whole text."""
LABELS = ["RNN-LSTM", "RNN-GRU", "GPT-2 (stock)"]
FOLDERS = ["rnn-lstm", "rnn-gru", "gpt-2-stock"]


@pytest.fixture(scope="module", autouse=True)
def little():
    """Models, blocks and turns small enough for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "TARGET", 64_000)
        patch.setattr(demo_module, "BLOCK", 32)
        patch.setattr(demo_module, "VOCABULARY", 300)
        patch.setattr(demo_module, "ROUNDS", 3)
        patch.setattr(demo_module, "SHOWN", LABELS)
        patch.setitem(demo_module.STOCK["GPT-2 (stock)"], "n_layer", 2)
        patch.setitem(demo_module.STOCK["GPT-2 (stock)"], "width_step", 3)
        yield


@pytest.fixture(scope="module")
def interrupted(library, tmp_path_factory):
    """A demo stopped in its last round, when one model has had its time and the others have not."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    measure = demo_module.measure

    def press(contender, validation):
        measure(contender, validation)
        if contender.finished:
            raise KeyboardInterrupt

    with small_library(library), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "measure", press)
        result = run("demo", "--seconds", 1, "--copy-seconds", 0, "--output", folder)
    written = {name: sorted(path.name for path in (folder / "models" / name / "run").iterdir()) for name in FOLDERS}
    return folder, result, written


@pytest.fixture(scope="module")
def resumed(interrupted, library):
    """The same demo, gone on with to the end; and the bits per byte of each model measured again at the end."""
    folder, again = interrupted[0], {}
    sample = demo_module.sample

    with small_library(library), pytest.MonkeyPatch.context() as patch:
        finished = {}

        def remember(contender, seed):
            finished[contender.label] = contender
            return sample(contender, seed)

        race = demo_module.race

        def watched(contenders, validation, *arguments):
            race(contenders, validation, *arguments)
            for contender in contenders:
                again[contender.label] = demo_race.bits_per_byte(contender.model, validation)

        patch.setattr(demo_module, "sample", remember)
        patch.setattr(demo_module, "race", watched)
        result = run("demo", "--resume", "--output", folder)
    bits = {label: contender.progress.curve[-1][1] for label, contender in finished.items()}
    return folder, result, bits, again


def test_interrupt_leaves_checkpoints_and_says_how_to_go_on(interrupted):
    folder, result, written = interrupted
    assert result.status == 130
    assert f"go on with: hf-lnlm demo --resume --output {folder}" in result.err
    assert all(any(name.startswith("checkpoint-") for name in names) for names in written.values()), written
    assert not (folder / "REPORT.md").exists()
    assert "\x1b" not in result.out


def test_resumed_demo_holds_its_claims(resumed):
    _, result, _, _ = resumed
    assert result.status == 0, result.out + result.err
    assert "FAILS" not in result.out
    folder = resumed[0]
    assert f"Pictures in {folder}: curves.png\n" in result.out
    assert re.search(rf"hf-lnlm generate {folder}/models/(rnn-lstm|rnn-gru|gpt-2-stock) --prompt", result.out)
    assert re.search(r"\d+ s, peak memory \d+\.\d\d GiB \(this process and those it started\)", result.out)
    assert result.out.count("reloaded without hf_lnlm, logits bit-identical") == 3
    assert result.out.count("hf-lnlm check finds nothing wrong") == 3
    assert "\x1b" not in result.out


def test_what_is_published_is_what_was_measured(resumed):
    _, _, bits, again = resumed
    assert list(bits) == LABELS
    assert again == pytest.approx(bits, rel=1e-6)


def test_report_holds_table_picture_seed_and_versions(resumed):
    folder, _, bits, _ = resumed
    text = (folder / "REPORT.md").read_text()
    for label in LABELS:
        assert f"| {label} |" in text
        assert f"{bits[label]:.3f} |" in text
        assert f"**{label}**" in text
    for part in (
        "gzip -9",
        "xz -9",
        "![bits per byte against CPU seconds](curves.png)",
        "- seed: 0",
        "torch 2",
        "hf_lnlm 0",
    ):
        assert part in text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("models/*/run"))


def test_a_finished_demo_is_not_resumed(resumed):
    result = run("demo", "--resume", "--output", resumed[0])
    assert result.status == 2
    assert "is finished, see REPORT.md there; --overwrite starts anew" in result.err


def test_a_failing_claim_is_a_failing_command(library, tmp_path, monkeypatch):
    claim = demo_module.Claim("the moon is made of cheese", False)
    monkeypatch.setattr(demo_module, "race", lambda contenders, validation, *rest: _measured(contenders))
    monkeypatch.setattr(demo_module, "sample", lambda contender, seed: "")
    monkeypatch.setattr(demo_module, "publish_claims", lambda *arguments: [claim])
    result = run("demo", "--seconds", 1, "--copy-seconds", 0, "--output", tmp_path / "run")
    assert result.status == 1
    assert "FAILS  the moon is made of cheese" in result.out
    assert "- FAILS: the moon is made of cheese" in (tmp_path / "run" / "REPORT.md").read_text()


def _measured(contenders) -> None:
    for contender in contenders:
        contender.progress = demo_race.Progress(1.0, 3, [(0.0, 4.0), (1.0, 2.0)])


def unfinished(folder, **settings):
    folder.mkdir()
    (folder / "demo.json").write_text(
        json.dumps({"all": False, "seconds": 1.0, "copy_seconds": 0, "seed": 0} | settings)
    )
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume", "--overwrite"], "give one of them"),
        (["--resume", "--seconds", 2], r"begun with \(seconds = 1.0\), got 2.0"),
        (["--resume", "--seed", 5], r"begun with \(seed = 0\), got 5"),
        (["--resume", "--all"], r"begun with \(all = False\), got True"),
        ([], "holds files already: --resume goes on, --overwrite starts anew"),
    ],
    ids=str,
)
def test_settings_and_folders_that_disagree_are_refused(tmp_path, words, said):
    result = run("demo", *words, "--output", unfinished(tmp_path / "run"))
    assert result.status == 2
    assert re.search(said, result.err), result.err


def test_folders_of_others_are_left_alone(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for words, said in ((["--overwrite"], "delete it yourself"), (["--resume"], "nothing to resume")):
        result = run("demo", *words, "--output", other)
        assert (result.status, said in result.err) == (2, True), result.err
    result = run("demo", "--output", other / "thesis.txt")
    assert (result.status, "is a file; --output names a folder" in result.err) == (2, True), result.err
    assert (other / "thesis.txt").read_text() == "years of work"


def test_damaged_settings_are_named(tmp_path):
    folder = unfinished(tmp_path / "run")
    (folder / "demo.json").write_text("{")
    result = run("demo", "--resume", "--output", folder)
    assert result.status == 2
    assert "demo.json is damaged, so that nothing can go on; give another --output" in result.err


def test_progress_without_its_checkpoint_is_none(library, tmp_path, monkeypatch):
    folder = unfinished(tmp_path / "run")
    home = folder / "models" / "rnn-lstm"
    home.mkdir(parents=True)
    demo_race.Progress(1.0, 30, [(0.0, 4.0), (1.0, 2.0)]).save(home)  # as after kill -9 in an earlier version
    seen = {}

    def stop(contender, *arguments):
        seen[contender.label] = (contender.progress.seconds, len(contender.progress.curve))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_race.Contender, "start", stop)
    assert run("demo", "--resume", "--output", folder).status == 130
    assert seen == {"RNN-LSTM": (0.0, 1)}


@pytest.fixture
def quick(monkeypatch):
    """Lengths that cost little to test."""
    monkeypatch.setattr(demo_copy, "SIZES", (10, 20))


def test_every_causal_family_is_in_the_table():
    shown = {fields["model_type"] for fields in demo_module.plans(all_families=True).values()}
    assert shown >= {family.model_type for family in FAMILIES if "AutoModelForCausalLM" in family.models} - ENCODERS


def test_rows_of_the_table_are_sorted_by_their_result():
    contenders = [
        SimpleNamespace(label=label, parameters=1, progress=demo_race.Progress(1.0, 2, [(0.0, 9.0), (1.0, bits)]))
        for label, bits in (("slow", 3.0), ("quick", 1.7))
    ]
    assert [row[0] for row in table(contenders, {"gzip": 1.8, "xz": 1.5})] == ["xz", "quick", "gzip", "slow"]


def test_loops_are_compiled_ahead_in_order_and_a_failure_is_said(monkeypatch, capfd):
    commands = {"lnlm_ntm": [sys.executable, "-c", ""], "lnlm_dnc": [sys.executable, "-c", "raise OSError('no room')"]}
    monkeypatch.setattr(ahead, "command", lambda name, fields: commands[name])
    monkeypatch.setattr(ahead, "numba_reason", lambda: None)
    with ahead.CompileAhead(["lnlm_ntm", "gpt2", "lnlm_dnc"]) as compiling:
        for name in ("gpt2", "lnlm_ntm", "lnlm_dnc"):
            compiling.wait(name)
    said = capfd.readouterr().err
    assert said == "hf_lnlm: compiling lnlm_dnc ahead failed: OSError: no room\n"


def test_leaving_ends_what_is_being_compiled(monkeypatch):
    monkeypatch.setattr(ahead, "command", lambda name, fields: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(ahead, "numba_reason", lambda: None)
    with ahead.CompileAhead(["lnlm_ntm", "lnlm_dnc"]) as compiling:
        while compiling._running is None:
            time.sleep(0.01)
    assert compiling._running.returncode != 0


@pytest.mark.slow
def test_a_whole_demo_prints_time_and_memory_within_three_times_and_half_more(tmp_path):
    """The figures are for a quiet machine (3 minutes, 1.5 GiB); this is to notice what multiplies them."""
    command = [
        sys.executable,
        "-m",
        "hf_lnlm.cli.main",
        "demo",
        "--seconds",
        "4",
        "--copy-seconds",
        "2",
        "--output",
        "run",
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # nothing is compiled yet
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    last = done.stdout.strip().splitlines()[-1]
    found = re.match(r"(\d+) s, peak memory ([0-9.]+) GiB .*; report: run/REPORT.md", last)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(found[1]) <= 540 and 0.5 <= float(found[2]) <= 2.2
    text = (tmp_path / "run" / "REPORT.md").read_text()
    bits = [float(row) for row in re.findall(r"^\| .* \| ([0-9.]+) \|$", text, flags=re.M)]
    assert len(bits) >= 6 and bits == sorted(bits)


def test_first_act_is_shown_drawn_and_kept(quick, tmp_path, capsys, monkeypatch):
    act = demo_copy_act.copy_act(tmp_path, 0.3, seed=0)
    said = capsys.readouterr().out
    assert [row[0] for row in act.table[1:]] == ["Neural Turing Machine", "Differentiable Neural Computer", "LSTM"]
    assert all(f"{row[0]}, {row[2]} CPU s, wrong bits: " in said for row in act.table[1:])
    assert act.pictures == list(demo_copy_act.PICTURES)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in act.pictures)
    assert len(act.claims) == 2
    monkeypatch.setattr(demo_copy, "copy_race", None)
    assert demo_copy_act.copy_act(tmp_path, 0.3, seed=0) == act
    assert demo_copy_act.copy_act(tmp_path, 0.0, seed=0).table == []
