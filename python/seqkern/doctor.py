"""What `seqkern doctor` prints: versions, the machine, and which kernel runs for what."""

import ctypes
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from seqkern import _C
from seqkern._load import CUDA_LIBRARY, cuda_unavailable_reason


@dataclass(frozen=True)
class Operation:
    """A public operation and the dispatcher op under it."""

    name: str  # as users call it
    op: str  # `seqkern::<op>`


# A test compares them with what `seqkern.ops` has.
OPERATIONS = (
    Operation("ops.cross_entropy, nn.CrossEntropyLoss", "cross_entropy"),
    Operation(
        "ops.linear_cross_entropy, nn.LinearCrossEntropyLoss, "
        "ops.vocab_parallel_linear_cross_entropy, models: the loss",
        "linear_cross_entropy_forward",
    ),
    Operation("ops.lstm, nn.LSTM, models: LSTM layers", "lstm"),
    Operation("ops.lstm_cell, nn.LSTMCell", "lstm_cell"),
    Operation("ops.gru, nn.GRU", "gru"),
    Operation("ops.gru_cell, nn.GRUCell", "gru_cell"),
    Operation("ops.rnn, nn.RNN, models: RNN layers", "rnn"),
    Operation("ops.rnn_cell, nn.RNNCell", "rnn_cell"),
    Operation("ops.causal_attention, nn.CausalSelfAttention, models.GPT", "attention_forward"),
    Operation("ops.attention_step, nn.KVCache, models.GPT.generate", "attention_step"),
    Operation("ops.decoder_step, models.GPT.generate", "decoder_step"),
    Operation("ops.linear_step, models.GPT.generate", "linear_step"),
    Operation("ops.softmax, ops.log_softmax", "softmax"),
    Operation("ops.sample, model.generate: the next token", "sample"),
)


def report() -> str:
    """The whole report, for people."""
    return "\n\n".join(
        (
            _section("Versions", _versions()),
            _section("Machine", _machine()),
            _section("Build", _build()),
            _kernels(),
            *([] if cuda_unavailable_reason else [_section("CUDA kernels", _resources())]),
        )
    )


def _section(title: str, rows: dict[str, str]) -> str:
    width = max(len(name) for name in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _versions() -> dict[str, str]:
    from seqkern import __version__

    return {
        "seqkern": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
    }


def _machine() -> dict[str, str]:
    forced = os.environ.get("SEQKERN_FORCE_ISA")
    isa = _C.cpu_isa() + (f" (SEQKERN_FORCE_ISA={forced})" if forced else "")
    rows = {
        "CPU": _cpu_model(),
        "CPU kernels for": isa,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical CPUs",
        "torch's CUDA": torch.version.cuda or "none: this torch was built for the CPU",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        built = str(_C.build_info()["cuda_architectures"]).split()
        if built and not any(_serves(name, properties.major, properties.minor) for name in built):
            rows[f"GPU {index}"] += "; no kernel of this build is for it"
    return rows


def _serves(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture, as CMake names it, runs on a GPU."""
    name, _, kind = architecture.partition("-")
    digits = name.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if name.endswith("a"):
        return built == (major, minor)
    machine_code = built[0] == major and built[1] <= minor and kind != "virtual"
    return machine_code or (kind != "real" and built <= (major, minor))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _build() -> dict[str, str]:
    return {name.replace("_", " "): _shown(value) for name, value in _C.build_info().items()}


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value not in (None, "") else "none"


def _kernels() -> str:
    lines = ["Which kernel runs"]
    for operation in OPERATIONS:
        lines.append(f"  {operation.name}")
        lines += [f"    {device:<5} {_runs(operation, key)}" for device, key in _DEVICES.items()]
    return "\n".join(lines)


_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


def _runs(operation: Operation, key: str) -> str:
    """What answers a call on a device, and why."""
    ours = torch._C._dispatch_has_kernel_for_dispatch_key(f"seqkern::{operation.op}", key)
    if key == "CPU":
        return f"seqkern's, {_C.cpu_isa()}" if ours else "nothing: the extension lacks this kernel"
    if not ours:
        return f"nothing: {cuda_unavailable_reason or 'the CUDA library lacks this kernel'}"
    if not torch.cuda.is_available():
        return "nothing now: seqkern's kernel is loaded, but there is no GPU"
    return "seqkern's CUDA kernel"


def _resources() -> dict[str, str]:
    """What each CUDA kernel takes on this GPU, or why that cannot be told."""
    table = ctypes.CDLL(str(CUDA_LIBRARY)).seqkern_cuda_kernel_resources
    table.restype = ctypes.c_char_p
    return {kernel["name"]: _resource_line(kernel) for kernel in json.loads(table())}


def _resource_line(kernel: dict[str, str | int]) -> str:
    if "error" in kernel:
        return str(kernel["error"])
    return (
        f"sm_{kernel['architecture']}, {kernel['registers']} registers, "
        f"{kernel['shared_bytes']} B shared, {kernel['local_bytes']} B local, "
        f"up to {kernel['max_threads']} threads"
    )
