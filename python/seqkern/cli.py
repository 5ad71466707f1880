"""The command line: `seqkern train | generate | demo | doctor`.

A mistake of the user's is one line on stderr and exit code 2 (`seqkern.errors.UserError`); an
interrupt that was saved is 130 (Ctrl-C) or 143 (SIGTERM).
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from seqkern import demo, doctor
from seqkern.config import DTYPES, RunConfig
from seqkern.data.tokenizers import TOKENIZERS
from seqkern.errors import UserError, require
from seqkern.generate import Sampling
from seqkern.models import MODELS
from seqkern.models.backends import BACKENDS
from seqkern.run_folder import draw_run, load_run, resume_run, start_run
from seqkern.train import Trainer


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    # Text may hold characters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
        code: int = args.command(args)
    except UserError as error:
        print(f"seqkern: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("seqkern: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has left; Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="seqkern", description="Train sequence models and sample from them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_train(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_doctor(commands)
    return parser


# ---------------------------------------------------------------- train

_DEFAULTS = {field.name: field.default for field in fields(RunConfig)}


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a language model on a text",
        description="Train a language model on a text. Leaves a run folder with config.json, "
        "metrics.csv, loss.png, model.safetensors and the optimizer's state. Ctrl-C saves a "
        "checkpoint; --resume --out DIR continues bit for bit, with the options of the run.",
    )
    train.set_defaults(command=_train)

    def add(group: Any, flag: str, text: str, **options: Any) -> None:
        # Only what the user gives is stored, so that --resume can tell it from a default.
        default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text + shown, **options)

    onoff = argparse.BooleanOptionalAction
    model = train.add_argument_group("model")
    add(model, "--model", "architecture", choices=MODELS)
    add(model, "--hidden", "width of embedding and layers", type=int)
    add(model, "--layers", "number of layers or blocks", type=int)
    add(model, "--heads", "attention heads of gpt", type=int)
    add(model, "--dropout", "dropout probability", type=float)
    add(model, "--tied", "gpt: the head shares the embedding's weight", action=onoff)
    add(model, "--backend", "seqkern's layers, or PyTorch's to compare", choices=BACKENDS)

    data = train.add_argument_group("data")
    add(data, "--data", "UTF-8 text file (default: the embedded language reference)")
    add(data, "--tokenizer", "what a token is", choices=TOKENIZERS)
    add(data, "--vocab-size", "most ids of a word or bpe vocabulary", type=int)
    add(data, "--val-fraction", "part of the text, at its end, held out", type=float)
    add(data, "--context", "tokens per training block", type=int)

    training = train.add_argument_group("training")
    add(training, "--batch-size", "blocks per step", type=int)
    add(training, "--steps", "updates in all", type=int)
    add(training, "--lr", "peak learning rate", type=float)
    add(training, "--min-lr-ratio", "last learning rate, as a fraction of the peak", type=float)
    add(
        training,
        "--warmup",
        "steps of linear warm-up (default: a tenth of the steps, at most 100)",
        type=int,
    )
    add(training, "--weight-decay", "AdamW's decay, on matrices only", type=float)
    add(training, "--clip", "largest gradient norm; inf: no clipping", type=float)
    add(training, "--seed", "of parameters, batches and dropout", type=int)

    running = train.add_argument_group("running")
    add(running, "--device", "auto, cpu, cuda or cuda:N")
    add(running, "--dtype", "bfloat16: autocast over float32 parameters", choices=DTYPES)
    add(running, "--compile", "torch.compile the model", action=onoff)
    add(running, "--eval-every", "steps between validations", type=int)
    add(running, "--eval-tokens", "held-out tokens per validation; 0: all", type=int)
    add(running, "--save-every", "steps between checkpoints", type=int)
    add(running, "--tensorboard", "also write TensorBoard events to DIR/tensorboard", action=onoff)
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
    _set_threads(args.threads)
    stop_after = args.stop_after
    require(
        stop_after is None or stop_after >= 1,
        f"--stop-after must be at least 1, got {stop_after}",
    )
    if args.resume:
        require(args.out is not None, "--resume needs --out DIR, the run to continue")
        trainer = resume_run(args.out, given)
        print(f"resuming {trainer.run} at step {trainer.step} of {trainer.config.steps}")
    else:
        trainer = start_run(RunConfig(**given), args.out)
        print(_describe(trainer))
    return _fit(trainer, stop_after, progress=not args.quiet, plot=args.plot)


def _describe(trainer: Trainer) -> str:
    corpus = trainer.corpus
    return (
        f"{trainer.run}: {trainer.config.model}, {trainer.model.num_parameters():,} parameters, "
        f"vocabulary {corpus.tokenizer.vocab_size}, {len(corpus.training):,} training and "
        f"{len(corpus.validation):,} validation tokens, {trainer.device}"
    )


def _fit(
    trainer: Trainer,
    stop_after: int | None = None,
    progress: bool = True,
    plot: bool = True,
    max_seconds: float = math.inf,
) -> int:
    """Train, draw the picture, say how it went; the exit code."""
    outcome = trainer.fit(stop_after, progress, max_seconds)
    if plot:
        try:
            draw_run(trainer.run)
        except UserError as error:  # training is worth more than its picture
            print(f"loss.png was not drawn: {error}")
    print(demo.losses_line(trainer))
    if outcome.step < trainer.config.steps:
        print(
            f"stopped and saved at step {outcome.step} of {trainer.config.steps}; continue with: "
            f"seqkern train --resume --out {trainer.run}"
        )
    return 0 if outcome.signal is None else 128 + outcome.signal


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        require(threads >= 1, f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- generate


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continue a prompt with the model of a run folder. The options are applied "
        "in the order temperature, top-k, top-p, min-p.",
    )
    generate.set_defaults(command=_generate)
    generate.add_argument("run", type=Path, metavar="DIR", help="run folder of `seqkern train`")
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument(
        "--max-new-tokens", type=int, default=200, help="tokens to add (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the most probable (default: 1)"
    )
    generate.add_argument(
        "--top-k", type=int, default=0, help="keep the k most probable tokens (default: 0, all)"
    )
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="keep the most probable tokens that together have this probability (default: 1)",
    )
    generate.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="keep tokens at least this fraction as probable as the best (default: 0)",
    )
    generate.add_argument("--seed", type=int, help="same seed, same text (default: a new one)")
    generate.add_argument("--backend", choices=BACKENDS, default="seqkern", help="whose layers")
    generate.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    generate.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _generate(args: argparse.Namespace) -> int:
    Sampling(args.temperature, args.top_k, args.top_p, args.min_p)  # before the model is read
    seed = args.seed
    require(seed is None or 0 <= seed < 2**63, f"seed must be in [0, 2**63), got {seed}")
    _set_threads(args.threads)
    require(args.prompt != "", "--prompt must hold at least one character")
    model, tokenizer = load_run(args.run, args.backend, args.device)
    try:
        ids = tokenizer.encode(args.prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    device = next(model.parameters()).device
    tokens = model.generate(
        torch.tensor([ids], device=device),
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=seed,
    )
    print(tokenizer.decode(tokens[0].tolist()), flush=True)
    return 0


# ---------------------------------------------------------------- demo, doctor


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train on real text, print a sample and the speed beside PyTorch",
        description="Train an LSTM on the embedded text for a few minutes, print a sample, and "
        "compare its speed with the same model on PyTorch's layers. Every demo has a run folder "
        "of its own.",
    )
    parser.set_defaults(command=_demo)
    for field in fields(demo.DemoOptions):
        flag = f"--{field.name.replace('_', '-')}"
        kind = Path if field.name == "out" else type(field.default)
        shown = "runs/demo-<n>" if field.default is None else field.default
        text = f"{field.metadata['help']} (default: {shown})"
        parser.add_argument(flag, type=kind, default=field.default, help=text)


def _demo(args: argparse.Namespace) -> int:
    options = demo.DemoOptions(
        **{field.name: getattr(args, field.name) for field in fields(demo.DemoOptions)}
    )
    trainer = demo.make_demo(options)
    print(_describe(trainer))
    print(demo.set_threads(trainer, options), flush=True)
    code = _fit(trainer, max_seconds=options.max_seconds)
    if code:
        return code
    print(f"\n--- a sample at temperature 0.7 ---\n{demo.sample(trainer, options)}\n---\n")
    print("the same model, seed and batches on both backends, taking turns:")
    print(demo.speed_lines(trainer, options))
    print(f"\nsee {trainer.run}: loss.png, metrics.csv, config.json, model.safetensors")
    print(f'try: seqkern generate {trainer.run} --prompt "{demo.PROMPT}"')
    return 0


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, machine, and which kernel runs for what",
        description="Print versions, the machine, how seqkern was built, and which kernel runs "
        "for which operation on which device, and why.",
    )
    parser.set_defaults(command=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    print(doctor.report())
    return 0
