"""`hf-lnlm`: the commands and their options. The bodies live in sibling modules and load only when they run."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Annotated, Any

import typer

import hf_lnlm

from .errors import report

app = typer.Typer(
    name="hf-lnlm",
    help="Train, fine-tune, evaluate and publish language models: hf_lnlm's families and transformers' own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[str | None, typer.Argument(metavar="[RECIPE.yaml]", help="The run's recipe; flags override it.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe key.")]
_NO_SETTINGS: list[str] = []
Size = Annotated[str | None, typer.Option(help="tiny, small or base: sets every other size.")]
Tokenizer = Annotated[str | None, typer.Option(help="bpe, byte, char, word, protein, or a folder.")]
Data = Annotated[str | None, typer.Option(help="A file, glob, dataset name or folder, `stdlib`, or `synthetic:NAME`.")]
Validation = Annotated[str | None, typer.Option(help="Held-out data: a share such as 0.05, or a file.")]
TextColumn = Annotated[str | None, typer.Option(help="Column that holds the text.")]
Output = Annotated[str | None, typer.Option(help="Folder for the result; must be new or empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --output.")]
DataChanged = Annotated[
    bool,
    typer.Option(
        "--data-changed",
        help="With --resume: go on although the data have changed, by a new epoch. Rows added at the end need no leave: "
        "they enter with the next epoch.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the earlier run in --output first.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe, sizes and memory; train and write nothing.")
]
Lora = Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train low-rank adapters only.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column that holds the class.")]
SkipBadRows = Annotated[
    bool | None, typer.Option("--skip-bad-rows", help="Leave out rows that can't be read, and say which.")
]


def _names(value: str | None) -> Any:
    return None if value is None else [name.strip() for name in value.split(",")]


Labels = Annotated[
    str | None, typer.Option(callback=_names, help="The classes, in order, with commas: no others are taken.")
]
Checkpoint = Annotated[str, typer.Argument(help="A checkpoint: folder or Hub repository.")]
_OBJECTIVES = (
    "What is learnt: causal, masked, span, denoising, replaced_token, permutation, sentence_order, next_sentence or "
    "bidirectional; default: the first that fits the family. `hf-lnlm list` says what each is."
)
_TASKS = (
    "What is learnt: sequence_classification, multi_label_classification, regression, token_classification, "
    "question_answering, multiple_choice or text_to_text, from rows with labels; or an objective of `pretrain`."
)
NewWeights = Annotated[
    bool, typer.Option("--allow-new-weights", help="Draw a head at random if the checkpoint has none.")
]
_TRUST = typer.Option("--trust-remote-code", help="Run Python code that the checkpoint carries.")
Trust = Annotated[bool | None, _TRUST]


_own: list[str] = []
"""Modules of the user's that `--import` names."""


def _note_own(names: list[str]) -> None:
    _own[:] = names


def _call(module: str, function: str, options: dict[str, Any]) -> None:
    """Load `hf_lnlm.<module>` and run its function; errors become one line and an exit status."""
    try:
        hf_lnlm.register()
        if _own:
            own_modules = importlib.import_module("hf_lnlm.flows.own_modules")
            while _own:  # once a process: tests run several commands in one
                own_modules.import_own(_own.pop(0))
        status = getattr(importlib.import_module(f"hf_lnlm.{module}"), function)(**options)
        sys.stdout.flush()  # a reader that has gone is told here, not when the interpreter ends
    except (Exception, KeyboardInterrupt) as error:
        status = report(error, show_traceback="HF_LNLM_DEBUG" in os.environ)
    raise typer.Exit(status or 0)


def _show_traceback(value: bool) -> None:
    if value:
        os.environ["HF_LNLM_DEBUG"] = "1"


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"hf_lnlm {version('hf_lnlm')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", "--traceback", callback=_show_traceback, help="Show where an error happened.")
    ] = False,
    own: Annotated[
        list[str],
        typer.Option(
            "--import",
            metavar="MODULE",
            callback=_note_own,
            help="Your own objectives, tasks, families.",
        ),
    ] = _NO_SETTINGS,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, fine-tune, evaluate and publish language models: hf_lnlm's families and transformers' own."""


@app.command("list")
def list_families(
    json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="The synthetic tasks instead, with their sizes.")
    ] = False,
) -> None:
    """Families, their heads, papers and sizes; objectives and tasks."""
    _call("cli.listing", "list_synthetic" if synthetic else "list_families", {"json": json})


@app.command("config-keys")
def config_keys(
    prefix: Annotated[str, typer.Argument(help="Only keys that begin so: data, training.l, objective.masked …")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Every key of a recipe (`--set KEY=VALUE`), with its type, default and meaning."""
    _call("cli.keys", "config_keys", locals())


@app.command()
def pretrain(
    recipe: Recipe = None,
    family: Annotated[str | None, typer.Option(help="A row of `hf-lnlm list`, or a stock model type.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Go on from this checkpoint instead.")] = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    data: Data = None,
    text_column: TextColumn = None,
    validation: Validation = None,
    skip_bad_rows: SkipBadRows = None,
    objective: Annotated[str | None, typer.Option(help=_OBJECTIVES)] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    data_changed: DataChanged = False,
    dry_run: DryRun = False,
    settings: Settings = _NO_SETTINGS,
) -> None:
    """Pre-train a model from scratch, or go on pre-training a checkpoint."""
    _call("cli.train", "train", {"command": "pretrain", **locals()})


@app.command()
def finetune(
    recipe: Recipe = None,
    checkpoint: Annotated[str | None, typer.Option(help="The checkpoint to start from.")] = None,
    family: Annotated[str | None, typer.Option(help="Train this family from scratch instead.")] = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    task: Annotated[str | None, typer.Option(help=_TASKS)] = None,
    data: Data = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    validation: Validation = None,
    labels: Labels = None,
    skip_bad_rows: SkipBadRows = None,
    lora: Lora = None,
    merge: Annotated[bool | None, typer.Option("--merge", help="Also save the model with its adapter merged.")] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    data_changed: DataChanged = False,
    trust_remote_code: Trust = None,
    dry_run: DryRun = False,
    settings: Settings = _NO_SETTINGS,
) -> None:
    """Fine-tune any checkpoint: classes, tags, answers, choices, text to text, or more of what it was pre-trained on."""
    _call("cli.train", "train", {"command": "finetune", **locals()})


@app.command()
def align(
    recipe: Recipe = None,
    checkpoint: Annotated[str | None, typer.Option(help="The language model to start from.")] = None,
    method: Annotated[str | None, typer.Option(help="sft, reward, dpo, kto, grpo or rloo.")] = None,
    data: Data = None,
    validation: Validation = None,
    skip_bad_rows: SkipBadRows = None,
    reward: Annotated[str | None, typer.Option(help="grpo, rloo: a reward model's folder, or a reward's name.")] = None,
    lora: Lora = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    data_changed: DataChanged = False,
    trust_remote_code: Trust = None,
    settings: Settings = _NO_SETTINGS,
) -> None:
    """Let a language model learn from preferences, by TRL's trainers."""
    _call("cli.train", "train", {"command": "align", **locals()})


@app.command()
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints: folders or Hub repositories.")],
    data: Data = None,
    task: Annotated[str | None, typer.Option(help="Objective or task; default: what it was trained for.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    skip_bad_rows: SkipBadRows = None,
    output: Annotated[str | None, typer.Option(help="JSON file to write; default: evaluation.json beside it.")] = None,
    report: Annotated[str | None, typer.Option(help="Folder for a report by class, with a picture.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    trust_remote_code: Trust = None,
    allow_new_weights: NewWeights = False,
    settings: Settings = _NO_SETTINGS,
) -> None:
    """Measure checkpoints: perplexity, bits per byte, accuracy, as JSON and a table."""
    _call("cli.evaluate", "evaluate", locals())


@app.command()
def predict(
    checkpoint: Checkpoint,
    data: Data = None,
    output: Annotated[
        str | None, typer.Option(help="A .csv or .jsonl file; default: JSON lines on standard output.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Objective or task; default: what it was trained for.")] = None,
    text_column: TextColumn = None,
    keep: Annotated[
        str | None, typer.Option(callback=_names, help="Columns to repeat beside the answers, with commas.")
    ] = None,
    skip_bad_rows: SkipBadRows = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on with a part of the output.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over an earlier output, or part of one.")
    ] = False,
    trust_remote_code: Trust = None,
    allow_new_weights: NewWeights = False,
    settings: Settings = _NO_SETTINGS,
) -> None:
    """Ask a checkpoint about every row of a file: labels, tags, answers, choices, texts, or how likely each text is."""
    _call("cli.predict", "predict", locals())


@app.command()
def translate(
    checkpoint: Checkpoint,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to translate; or give --data, or pipe lines in.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A file of lines, or of rows with a column `source` or `text`.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="A file for the translations, one a line; or .csv or .jsonl.")
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beam search with this many beams; 1 is greedy.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a translation at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a batch.")] = 32,
    prefix: Annotated[str | None, typer.Option(help="Put before every text; default: as it was fine-tuned.")] = None,
    skip_bad_rows: SkipBadRows = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an earlier output.")] = False,
    trust_remote_code: Trust = None,
) -> None:
    """Translate or rewrite texts with any encoder-decoder: ours, T5, Marian, BART …"""
    _call("cli.translate", "translate", locals())


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 100,
    sample: Annotated[bool, typer.Option("--sample/--greedy", help="Draw tokens instead of taking the best.")] = True,
    temperature: Annotated[float, typer.Option(help="Above 0; lower is more careful.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k best tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the best tokens of this mass.")] = 0.95,
    beams: Annotated[int, typer.Option(min=1, help="Beam search with this many beams.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    trust_remote_code: Annotated[bool, _TRUST] = False,
    allow_new_weights: NewWeights = False,
) -> None:
    """Continue prompts with a checkpoint; several prompts run as one left-padded batch."""
    _call("cli.generate", "generate", locals())


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="What comes in or goes out: a folder, a file or a Hub repository.")],
    output: Annotated[str, typer.Option(help="Folder for the result; must be new or empty.")],
    from_kind: Annotated[
        str | None, typer.Option("--from", help="What the source is; default: what can be told from it.")
    ] = None,
    to_kind: Annotated[str | None, typer.Option("--to", help="What becomes of a checkpoint of ours.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the tokenizer that goes beside it.")] = None,
    into: Annotated[str | None, typer.Option(help="The checkpoint whose embeddings word vectors fill.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="A field of the new config.")
    ] = _NO_SETTINGS,
) -> None:
    """Bring a checkpoint of another project in, or one of ours out: Mamba, BERT, GPT-2, plain torch, DNC, word vectors …"""
    _call("cli.convert", "convert", locals())


@app.command()
def check(
    folder: Annotated[str, typer.Argument(help="The checkpoint folder to examine.")],
    run_code: Annotated[bool, typer.Option("--run-code", help="Also run the Python code it carries.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
    refresh_code: Annotated[bool, typer.Option("--refresh-code", help="First renew the code that it carries.")] = False,
) -> None:
    """Examine a checkpoint folder: one line for each thing that is wrong; safe on a stranger's folder."""
    _call("cli.check", "check", locals())


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="The checkpoint folder to publish.")],
    repo_id: Annotated[str | None, typer.Argument(help="owner/name on the Hub; default: hub.repo_id.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="For a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up; send nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Push although the check fails.")] = False,
    include: Annotated[list[str] | None, typer.Option(help="A file that goes up although it looks foreign.")] = None,
) -> None:
    """Check a folder, write its model card and publish it as one commit."""
    _call("flows.push", "push", locals())


plots = typer.Typer(help="Draw pictures of what a model does.", no_args_is_help=True)
app.add_typer(plots, name="plot")


@plots.command("addressing")
def plot_addressing(
    checkpoint: Checkpoint,
    task: Annotated[str, typer.Option(help="An algorithmic task: copy, repeat_copy, associative_recall …")] = "copy",
    size: Annotated[int | None, typer.Option(help="The row's size; the longest of training by default.")] = None,
    output: Annotated[str, typer.Option(help="The picture: .png, .pdf, .svg or .jpg.")] = "addressing.png",
    layer: Annotated[int, typer.Option(help="Which layer's memory, from 0.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the row.")] = 0,
) -> None:
    """Where a Turing machine or neural computer reads and writes while it works on one row of a task."""
    _call("cli.plot", "plot_addressing", locals())


@plots.command("alignment")
def plot_alignment(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Argument(help="The text to translate.")],
    target: Annotated[str | None, typer.Option(help="What is written; default: what the model writes.")] = None,
    output: Annotated[str, typer.Option(help="The picture: .png, .pdf, .svg or .jpg.")] = "alignment.png",
    layer: Annotated[int | None, typer.Option(help="Layer of the decoder, from 0; default: the last.")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beam search with this many beams; 1 is greedy.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a translation at most.")] = 128,
    prefix: Annotated[str | None, typer.Option(help="Put before the text; default: as it was fine-tuned.")] = None,
    trust_remote_code: Trust = None,
) -> None:
    """Where an encoder-decoder, ours or stock, looks in a text while it translates it."""
    _call("cli.plot_alignment", "plot_alignment", locals())


@plots.command("curves")
def plot_curves(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, drawn over each other.")],
    output: Annotated[str, typer.Option(help="The picture: .png, .pdf, .svg or .jpg.")] = "curves.png",
    metric: Annotated[
        str | None, typer.Option(help="Column of metrics.csv to draw beside the losses, e.g. eval_accuracy.")
    ] = None,
) -> None:
    """Losses, a measure of the validation data, learning rate and throughput of runs, one over the other."""
    _call("cli.plot", "plot_curves", locals())


@app.command("warm-up")
def warm_up(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Families; default: all with compiled loops.")
    ] = None,
) -> None:
    """Compile the families' loops for this processor now, so that no first step waits for it."""
    _call("cli.warm_up", "warm_up", locals())


@app.command()
def demo(
    all_families: Annotated[
        bool, typer.Option("--all", help="Every causal family, not the default selection.")
    ] = False,
    output: Annotated[str, typer.Option(help="Folder for report, curves and checkpoints.")] = "runs/demo",
    seconds: Annotated[float | None, typer.Option(min=1.0, help="CPU seconds of training for each family.")] = None,
    copy_seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="CPU seconds of training for each model of the first act; 0 leaves it out."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Watch memories learn to copy, and the causal families side by side on Python's own library; reload them elsewhere."""
    _call("cli.demo.show", "demo", locals())


def _repeated_settings(words: list[str]) -> list[str]:
    """`--set a.b=1 c.d=2` as `--set a.b=1 --set c.d=2`."""
    result: list[str] = []
    open_list = False
    for word in words:
        setting = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+=.*", word, re.DOTALL) is not None
        if open_list and setting and result[-1] != "--set":
            result.append("--set")
        open_list = word == "--set" or (open_list and setting)
        result.append(word)
    return result


def _imports_first(words: list[str]) -> list[str]:
    """`--import MODULE` moved to the front, where the options of all commands stand."""
    first: list[str] = []
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == "--import":
            first += [word, *([value] if (value := next(waiting, None)) is not None else [])]
        else:
            (first if word.startswith("--import=") else rest).append(word)
    return first + rest


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console command.

    Args:
        arguments: words after `hf-lnlm`; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = _repeated_settings(_imports_first(words))
    for name in ("--debug", "--traceback"):
        if name in words[1:]:  # accepted at the end too, where one adds it
            words.remove(name)
            words.insert(0, name)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal's or pipe's, which may not know every letter
            stream.reconfigure(errors="backslashreplace")
    app(words)


if __name__ == "__main__":
    main()
