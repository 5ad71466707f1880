"""`seqkern demo`."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from seqkern import demo
from seqkern.cli.running import describe, fit


def add(commands: Any) -> None:
    """Add the command."""
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
    print(describe(trainer))
    print(demo.set_threads(trainer, options), flush=True)
    code = fit(trainer, max_seconds=options.max_seconds)
    if code:
        return code
    print(f"\n--- a sample at temperature 0.7 ---\n{demo.sample(trainer, options)}\n---\n")
    print("the same model, seed and batches on both backends, taking turns:")
    print(demo.speed_lines(trainer, options))
    print(f"\nsee {trainer.run}: loss.png, metrics.csv, config.json, model.safetensors")
    print(f'try: seqkern generate {trainer.run} --prompt "{demo.PROMPT}"')
    return 0
