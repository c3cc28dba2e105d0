"""`hf-lnlm`: the commands and their options. The bodies live in sibling modules and load only when they run."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Annotated, Any

import typer

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
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe key.")]
Size = Annotated[str | None, typer.Option(help="tiny, small or base: sets every other size.")]
Tokenizer = Annotated[str | None, typer.Option(help="bpe, byte, char, word, protein, or a folder.")]
Data = Annotated[str | None, typer.Option(help="A file, glob, dataset name or folder, or `stdlib`.")]
Validation = Annotated[str | None, typer.Option(help="Held-out data: a share such as 0.05, or a file.")]
TextColumn = Annotated[str | None, typer.Option(help="Column that holds the text.")]
Output = Annotated[str | None, typer.Option(help="Folder for the result; must be new or empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the earlier run in --output first.")]
Checkpoint = Annotated[str, typer.Argument(help="A checkpoint: folder or Hub repository.")]
_OBJECTIVES = (
    "What is learnt: causal, masked, span, replaced_token, permutation, sentence_order, next_sentence or bidirectional; "
    "default: the first that fits the family. `hf-lnlm list` says what each is."
)
_TASKS = (
    "What is learnt: sequence_classification, token_classification, question_answering, multiple_choice or "
    "text_to_text, from rows with labels; or an objective of `pretrain`, from more text."
)
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint carries.")]


def _call(module: str, function: str, options: dict[str, Any]) -> None:
    """Load `hf_lnlm.cli.<module>` and run its function; errors become one line and an exit status."""
    try:
        status = getattr(importlib.import_module(f"hf_lnlm.cli.{module}"), function)(**options)
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, KeyboardInterrupt) as error:
        status = report(error, show_traceback="HF_LNLM_TRACEBACK" in os.environ)
    raise typer.Exit(status or 0)


def _show_traceback(value: bool) -> None:
    if value:
        os.environ["HF_LNLM_TRACEBACK"] = "1"


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"hf_lnlm {version('hf_lnlm')}")
        raise typer.Exit()


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", callback=_show_traceback, help="Show where an error happened.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, fine-tune, evaluate and publish language models: hf_lnlm's families and transformers' own."""


@app.command("list")
def list_families(
    json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Families, their heads, papers and sizes; objectives and tasks."""
    _call("listing", "list_families", locals())


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
    objective: Annotated[str | None, typer.Option(help=_OBJECTIVES)] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set: Settings = None,
) -> None:
    """Pre-train a model from scratch, or go on pre-training a checkpoint."""
    _call("pretrain", "pretrain", locals())


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
    label_column: Annotated[str | None, typer.Option(help="Column that holds the class.")] = None,
    validation: Validation = None,
    lora: Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train low-rank adapters only.")] = None,
    merge: Annotated[bool | None, typer.Option("--merge", help="Also save the model with its adapter merged.")] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    set: Settings = None,
) -> None:
    """Fine-tune any checkpoint: classes, tags, answers, choices, text to text, or more of what it was pre-trained on."""
    _call("finetune", "finetune", locals())


@app.command()
def align(
    recipe: Recipe = None,
    checkpoint: Annotated[str | None, typer.Option(help="The language model to start from.")] = None,
    method: Annotated[str | None, typer.Option(help="sft, reward, dpo, kto, grpo or rloo.")] = None,
    data: Data = None,
    validation: Validation = None,
    reward: Annotated[str | None, typer.Option(help="grpo, rloo: a reward model's folder, or a reward's name.")] = None,
    lora: Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train low-rank adapters only.")] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    set: Settings = None,
) -> None:
    """Let a language model learn from preferences, by TRL's trainers."""
    _call("align", "align", locals())


@app.command()
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoints: folders or Hub repositories.")],
    data: Data = None,
    task: Annotated[str | None, typer.Option(help="Objective or task; default: what it was trained for.")] = None,
    text_column: TextColumn = None,
    label_column: Annotated[str | None, typer.Option(help="Column that holds the class.")] = None,
    output: Annotated[str | None, typer.Option(help="JSON file to write; default: evaluation.json beside it.")] = None,
    report: Annotated[str | None, typer.Option(help="Folder for a report by class, with a picture.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    trust_remote_code: Trust = False,
    set: Settings = None,
) -> None:
    """Measure checkpoints: perplexity, bits per byte, accuracy, as JSON and a table."""
    _call("evaluate", "evaluate", locals())


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
    trust_remote_code: Trust = False,
) -> None:
    """Continue prompts with a checkpoint; several prompts run as one left-padded batch."""
    _call("generate", "generate", locals())


@app.command()
def check(
    folder: Annotated[str, typer.Argument(help="The checkpoint folder to examine.")],
    run_code: Annotated[bool, typer.Option("--run-code", help="Also run the Python code it carries.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Examine a checkpoint folder: one line for each thing that is wrong; safe on a stranger's folder."""
    _call("check", "check", locals())


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="The checkpoint folder to publish.")],
    repo_id: Annotated[str | None, typer.Argument(help="owner/name on the Hub; default: hub.repo_id.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="For a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up; send nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Push although the check fails.")] = False,
) -> None:
    """Check a folder, write its model card and publish it as one commit."""
    _call("push", "push", locals())


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
    _call("plot", "plot_addressing", locals())


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
    _call("demo", "demo", locals())


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console command.

    Args:
        arguments: words after `hf-lnlm`; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = _repeated_settings(words)
    if "--traceback" in words[1:]:  # accepted at the end too, where one adds it
        words.remove("--traceback")
        words.insert(0, "--traceback")
    app(words)


if __name__ == "__main__":
    main()
