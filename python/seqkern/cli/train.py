"""`seqkern train`."""

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from seqkern.cli.running import describe, fit, set_threads
from seqkern.config import DTYPES, RunConfig
from seqkern.data.tokenizers import TOKENIZERS
from seqkern.errors import require
from seqkern.models import MODELS
from seqkern.models.backends import BACKENDS
from seqkern.parallel import KINDS, Parallel
from seqkern.run_folder import resume_run, start_run
from seqkern.train import Trainer

_DEFAULTS = {field.name: field.default for field in fields(RunConfig)}


def add(commands: Any) -> None:
    """Add the command."""
    train = commands.add_parser(
        "train",
        help="train a language model on a text",
        description="Train a language model on a text. Leaves a run folder with config.json, "
        "metrics.csv, loss.png, model.safetensors and the optimizer's state. Once training has "
        "begun, Ctrl-C saves a checkpoint; --resume --out DIR continues bit for bit, with the "
        "options of the run. Several processes: torchrun --nproc-per-node=N -m seqkern train ..., "
        "which share each batch and may be another number on --resume.",
    )
    train.set_defaults(command=_train)

    def option(group: Any, flag: str, text: str, **options: Any) -> None:
        # Only what the user gives is stored, so that --resume can tell it from a default.
        default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text + shown, **options)

    onoff = argparse.BooleanOptionalAction
    model = train.add_argument_group("model")
    option(model, "--model", "architecture", choices=MODELS)
    option(model, "--hidden", "width of embedding and layers", type=int)
    option(model, "--layers", "number of layers or blocks", type=int)
    option(model, "--heads", "attention heads of gpt", type=int)
    option(model, "--dropout", "dropout probability", type=float)
    option(model, "--tied", "gpt: the head shares the embedding's weight", action=onoff)
    option(model, "--backend", "seqkern's layers, or PyTorch's to compare", choices=BACKENDS)

    data = train.add_argument_group("data")
    option(
        data,
        "--data",
        "UTF-8 text file, or a token file of `seqkern prepare` (default: the embedded language "
        "reference)",
    )
    option(
        data,
        "--tokenizer",
        "what a token is (default: char, or what the token file was made with)",
        choices=TOKENIZERS,
    )
    option(data, "--vocab-size", "most ids of a word or bpe vocabulary", type=int)
    option(data, "--val-fraction", "part of the text, at its end, held out", type=float)
    option(data, "--context", "tokens per training block", type=int)

    training = train.add_argument_group("training")
    option(training, "--batch-size", "blocks per step, over all processes", type=int)
    option(training, "--accumulate", "parts a batch is taken in, to save memory", type=int)
    option(training, "--steps", "updates in all", type=int)
    option(training, "--lr", "peak learning rate", type=float)
    option(training, "--min-lr-ratio", "last learning rate, as a fraction of the peak", type=float)
    option(
        training,
        "--warmup",
        "steps of linear warm-up (default: a tenth of the steps, at most 100)",
        type=int,
    )
    option(training, "--weight-decay", "AdamW's decay, on matrices only", type=float)
    option(training, "--clip", "largest gradient norm; inf: no clipping", type=float)
    option(training, "--seed", "of parameters, batches and dropout", type=int)

    running = train.add_argument_group("running")
    option(running, "--device", "auto, cpu, cuda or cuda:N")
    option(running, "--dtype", "bfloat16: autocast over float32 parameters", choices=DTYPES)
    option(running, "--compile", "torch.compile the model", action=onoff)
    option(running, "--parallel", "with several processes: copies or shares", choices=KINDS)
    option(running, "--eval-every", "steps between validations", type=int)
    option(running, "--eval-tokens", "held-out tokens per validation; 0: all", type=int)
    option(running, "--save-every", "steps between checkpoints", type=int)
    option(
        running, "--tensorboard", "also write TensorBoard events to DIR/tensorboard", action=onoff
    )
    running.add_argument("--out", type=Path, help="run folder (default: a new one under runs/)")
    running.add_argument("--resume", action="store_true", help="continue the run in --out")
    running.add_argument(
        "--stop-after", type=int, metavar="STEP", help="save and stop at this step, to be resumed"
    )
    running.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    running.add_argument(
        "--plot", action=onoff, default=True, help="draw loss.png at the end (default: True)"
    )
    running.add_argument("--quiet", action="store_true", help="no progress bar")


def _train(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if name in _DEFAULTS}
    set_threads(args.threads)
    stop_after = args.stop_after
    require(
        stop_after is None or stop_after >= 1,
        f"--stop-after must be at least 1, got {stop_after}",
    )
    parallel = Parallel()
    try:
        return _train_together(args, given, parallel)
    finally:
        parallel.close()


def _train_together(args: argparse.Namespace, given: dict[str, Any], parallel: Parallel) -> int:
    """What each process does; the trainer is gone before they part."""
    try:
        if args.resume:
            require(args.out is not None, "--resume needs --out DIR, the run to continue")
            trainer = resume_run(args.out, given, parallel)
            started = f"resuming {trainer.run} at step {trainer.step} of {trainer.config.steps}"
        else:
            trainer = start_run(RunConfig(**given), args.out, parallel=parallel)
            started = "\n".join([describe(trainer), *_unused(given, trainer)])
        if parallel.rank == 0:
            print(started)
    except KeyboardInterrupt:  # from here on it is saved
        print(
            "seqkern: interrupted before the first step: nothing is lost, the same command starts "
            "again",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    return fit(trainer, args.stop_after, progress=not args.quiet, plot=args.plot)


def _unused(given: dict[str, Any], trainer: Trainer) -> list[str]:
    """A line per option that was given and changes nothing.

    No error: who trains several models gives them the same options.
    """
    corpus, model = trainer.corpus, trainer.config.model
    where = "a token file has its own" if corpus.file else "characters have no limit"
    cases = {
        "heads": (model != "gpt", f"{model} has none"),
        "tied": (model != "gpt", f"{model} has a head of its own"),
        "vocab_size": (corpus.file is not None or corpus.tokenizer.kind == "char", where),
    }
    return [
        f"--{name.replace('_', '-')} is not used: {reason}"
        for name, (unused, reason) in cases.items()
        if unused and name in given
    ]
