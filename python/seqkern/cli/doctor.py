"""`seqkern doctor`."""

import argparse
from typing import Any

from seqkern import doctor


def add(commands: Any) -> None:
    """Add the command."""
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
