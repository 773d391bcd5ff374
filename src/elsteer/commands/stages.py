"""The long stages: demo, fit, evaluate. Each works in a run folder and goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elsteer.commands.shared import (
    FILE,
    debug_option,
    judge_options,
    load_for,
    load_model,
    model_options,
    read_landscape,
    run_folder_of,
)
from elsteer.console import ProgressBars, invocation, note, screen
from elsteer.errors import PromptError
from elsteer.options import SettingsCommand, read_settings, settings_options
from elsteer.settings import FitSettings

if TYPE_CHECKING:
    from elsteer.prompts import Prompt

__all__ = ["demo", "evaluate", "fit"]


@click.command(short_help="See it work: fit a small chat model, measure it.")
@click.option("--run-dir", type=FILE, default=Path("runs/demo"), show_default=True, help="Folder for all files.")
@click.option(
    "--model", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", show_default=True, help="Hub id, folder or GGUF file."
)
@click.option("--dtype", default="auto", show_default=True, help="auto takes the quicker one of bfloat16 and float32.")
@debug_option
def demo(run_dir: Path, model: str, dtype: str) -> None:
    """Fit a landscape on the shipped starter prompts and measure it on held-out ones.

    Started again, it goes on where it was.

    \b
    Example:  elsteer demo
    """
    invocation().kept = run_dir
    note(f"Loading {model}")
    from elsteer import show
    from elsteer.demo import demo as run

    with ProgressBars() as progress:
        found = run(run_dir=run_dir, model=model, dtype=dtype, progress=progress)
    console = screen()
    show.evaluation(found.evaluation, console)
    show.examples(found.evaluation.examples, console)
    console.print("", show.timings(found.timings), show.overhead(found.decode_overhead), sep="\n", soft_wrap=True)
    click.echo(f"The report is {found.evaluation.report}; the landscape and everything else are in {found.run_dir}.")


@click.command(cls=SettingsCommand)
@click.argument("model")
@click.option("--benign", type=FILE, multiple=True, metavar="FILE", help="Prompts to be answered; may be repeated.")
@click.option("--harmful", type=FILE, multiple=True, metavar="FILE", help="Prompts to be refused; may be repeated.")
@click.option(
    "--prompts", multiple=True, metavar="FILE", help="Prompts with a column that says which; may be repeated."
)
@click.option("--dev", metavar="FILE", help="Prompts to tune on. [default: a share of the prompts]")
@click.option("--prompt-column", default="prompt", show_default=True, help="Column of the prompts.")
@click.option(
    "--harmful-column", default="harmful", show_default=True, help="Column of true (refuse) and false (help)."
)
@click.option(
    "--start", metavar="LANDSCAPE", help="Go on from this landscape of the model: then a few thousand prompts do."
)
@click.option("--run-dir", type=FILE, help="Folder for all files. [default: runs/ and the model's name]")
@click.option("--config", type=FILE, metavar="FILE", help="YAML file of settings; flags win over it.")
@model_options
@settings_options(FitSettings, among_main=("collect",))
@debug_option
def fit(
    model: str,
    benign: tuple[Path, ...],
    harmful: tuple[Path, ...],
    prompts: tuple[str, ...],
    dev: str | None,
    prompt_column: str,
    harmful_column: str,
    start: str | None,
    run_dir: Path | None,
    config: Path | None,
    dtype: str,
    device: str | None,
    device_map: str | None,
    revision: str | None,
    chat_template: Path | None,
    blocks: str | None,
    **_settings: Any,
) -> None:
    """Fit a landscape for MODEL: a hub id, a folder, or a GGUF file.

    Files are JSONL, CSV, TSV, Parquet or plain text with a prompt a line; --prompts and --dev also take a hub data set.
    Without any, the shipped starter prompts are used. Started again, it goes on where it was.

    \b
    Example:  elsteer fit Qwen/Qwen2.5-Coder-0.5B-Instruct
    Example:  elsteer fit ./my-model --benign asked.jsonl --harmful refuse.csv --run-dir runs/mine
    """
    settings = read_settings(FitSettings, config)
    from elsteer.judges import judge_of_fit

    judge_of_fit(settings.collect.judge)  # what is wrong with it is said before the model is loaded
    before = None if start is None else read_landscape(start)
    from elsteer import show
    from elsteer.prompts import load_starter, read_prompts, require_both_classes

    def read(files: Iterable[str | Path], refuse: bool | None) -> list[Prompt]:
        columns = {"prompt_column": prompt_column, "harmful_column": harmful_column}
        return [one for file in files for one in read_prompts(file, harmful=refuse, **columns)]

    train_set = read(prompts, None) + read(benign, False) + read(harmful, True)
    dev_set = None if dev is None else read([dev], None)
    if not train_set:
        train_set, dev_set = load_starter("train"), load_starter("dev") if dev_set is None else dev_set
    for name, part in (("training prompts", train_set), ("dev prompts", dev_set)):
        if part is not None:
            require_both_classes(part, f"The set of {name}")
            note(show.count_prompts(part, name.capitalize()))
    folder = run_dir or Path("runs") / (Path(model).stem if model.endswith(".gguf") else Path(model).resolve().name)
    invocation().kept = folder
    llm, tokenizer = load_model(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        chat_template=chat_template,
        blocks=blocks,
    )
    from elsteer.fitting import fit as run

    with ProgressBars() as progress:
        found = run(
            llm,
            tokenizer,
            train_set,
            dev=dev_set,
            run_dir=folder,
            settings=settings,
            start=before,
            progress=progress,
            command=invocation().command,
        )
    console = screen()
    show.landscape(found, console)
    click.echo(f"The landscape is {folder / 'landscape'}; what it rests on is in {folder}.")


@click.command()
@click.argument("landscape")
@click.option(
    "--suite",
    "suites",
    multiple=True,
    required=True,
    metavar="NAME",
    help="A benchmark (see elsteer suites) or a file; with +ATTACK its harmful prompts under attack; may be repeated.",
)
@click.option("--data-dir", type=FILE, help="Folder that holds the benchmarks. [default: $ELSTEER_DATA, else the hub]")
@click.option("--limit", type=click.IntRange(min=1), help="Prompts of each suite at most, drawn by seed.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draw and of the intervals."
)
@click.option("--method", "methods", multiple=True, metavar="NAME", help="A control besides: random; may be repeated.")
@click.option("--strength", type=float, help="Scales the steps. [default: the landscape's]")
@click.option("--model", help="Hub id, folder or GGUF file. [default: the model it was fitted to]")
@click.option(
    "--run-dir", type=FILE, help="Folder for all files. [default: the landscape's run folder, else runs/ and its name]"
)
@click.option("--judge", default="rules", show_default=True, help="Who says whether an answer refuses.")
@judge_options
@click.option(
    "--judge-labels",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Answers that people labelled: the judge is measured on them, and rates are corrected. [default for rules: known]",
)
@click.option("--harm", is_flag=True, help="Also ask the judge (api or local) how harmful answers are.")
@click.option("--quality/--no-quality", default=True, help="Also measure whole answers. [default: yes]")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Prompts at a time.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=4),
    default=48,
    show_default=True,
    help="Tokens that are judged at most.",
)
@model_options
@debug_option
def evaluate(
    landscape: str,
    suites: tuple[str, ...],
    data_dir: Path | None,
    limit: int | None,
    seed: int,
    methods: tuple[str, ...],
    strength: float | None,
    model: str | None,
    run_dir: Path | None,
    judge: str,
    judge_url: str | None,
    judge_model: str | None,
    judge_labels: tuple[Path, ...],
    harm: bool,
    quality: bool,
    batch_size: int,
    max_new_tokens: int,
    **loading: Any,
) -> None:
    """Measure plain against steered on the same prompts of each suite.

    \b
    Example:  elsteer evaluate runs/demo/landscape --suite starter --limit 100
    Example:  elsteer evaluate runs/demo/landscape --suite xstest --suite mine.jsonl --method random
    Example:  elsteer evaluate runs/demo/landscape --suite harmbench --suite harmbench+past-tense
    Example:  elsteer evaluate LANDSCAPE --suite xstest --judge api --judge-url http://localhost:8000/v1 --judge-model NAME
    Example:  elsteer evaluate LANDSCAPE --suite harmbench --judge local --judge-model allenai/wildguard --harm
    """
    from elsteer import show
    from elsteer.judges import get_judge, require_harm
    from elsteer.judges.agreement import read_labels
    from elsteer.prompts import load_suite

    if "shuffled" in methods:
        raise PromptError(
            "The control shuffled is other energies, trained on what the fit was answered: elsteer compare MODEL --run-dir RUN "
            "--methods els,shuffled measures it."
        )
    if other := [name for name in methods if name != "random"]:
        raise PromptError(
            f"There is no control {other[0]!r}: there is random, and other methods are measured by elsteer compare MODEL "
            "--run-dir RUN."
        )
    judging = get_judge(judge, url=judge_url, model=judge_model)
    if harm:
        require_harm(judging)
    for file in judge_labels:  # what is wrong with them is said before the model is loaded
        read_labels(file)
    for name in suites:
        note(show.count_prompts(load_suite(name, data_dir=data_dir, limit=limit, seed=seed), name))
    found = read_landscape(landscape)
    if strength is not None:
        found = found.with_rule(strength=strength)
    controls = [found.with_method(name) for name in dict.fromkeys(methods)]
    folder = run_dir or run_folder_of(landscape, found)
    invocation().kept = folder
    llm, tokenizer = load_for(found, model, **loading)
    from elsteer.evaluation.evaluate import evaluate as run

    with ProgressBars() as progress:
        result = run(
            llm,
            tokenizer,
            ["none", found, *controls],
            list(suites),
            run_dir=folder,
            data_dir=data_dir,
            limit=limit,
            seed=seed,
            judge=judging,
            judge_labels=judge_labels,
            harm=harm,
            quality=quality,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
            command=invocation().command,
        )
    show.evaluation(result, screen())
    if spent := show.judge_usage(judging):
        click.echo(spent)
    click.echo(f"The report is {result.report}; every row is in {folder / 'evaluation'}.")
