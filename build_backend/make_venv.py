"""Make the virtual environment of the Makefile: `python make_venv.py DIR`.

Where the interpreter that runs this already has a torch that is new enough, the environment sees
its packages, so that no second torch is downloaded.
"""

from __future__ import annotations

import subprocess
import sys

from find_torch import find_torch

command = [sys.executable, "-m", "venv", sys.argv[1]]
if find_torch():
    command.append("--system-site-packages")
if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
    sys.exit(
        "seqkern: python3 -m venv failed; on Debian and Ubuntu: "
        "apt-get install python3-venv python3-dev"
    )
