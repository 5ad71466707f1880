"""The options of a training run, as the command line sets them and config.json keeps them."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from seqkern.data.tokenizers import TOKENIZERS
from seqkern.errors import UserError, require
from seqkern.models import MODELS
from seqkern.models.backends import BACKENDS
from seqkern.parallel import KINDS

DTYPES = ("float32", "bfloat16", "float64")

# What may differ when a run is resumed: it does not enter the computation. The text itself is
# compared by its digest, wherever it lies.
FREE_ON_RESUME = frozenset(
    {"data", "device", "save_every", "tensorboard", "parallel", "accumulate"}
)


@dataclass(frozen=True)
class RunConfig:
    """Every option of a run. Field names are the command line's options.

    Raises:
        UserError: a value outside its range.
    """

    model: str = "lstm"
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    tied: bool = True
    backend: str = "seqkern"

    data: str | None = None  # a text or a token file; None: the embedded text
    tokenizer: str | None = None  # None: char, or what a token file was made with
    vocab_size: int = 4096  # the most ids of a word or bpe vocabulary
    val_fraction: float = 0.1
    context: int = 128

    batch_size: int = 32
    steps: int = 2000
    lr: float = 2e-3
    min_lr_ratio: float = 0.1
    warmup: int | None = None  # None: a tenth of the steps, at most 100
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1  # parts of a batch, one after the other
    seed: int = 0

    device: str = "auto"
    dtype: str = "float32"
    compile: bool = False
    parallel: str = "ddp"  # with several processes
    eval_every: int = 200
    eval_tokens: int = 65536
    save_every: int = 200
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check what does not need the data; the models check their sizes themselves."""
        _one_of("model", self.model, MODELS)
        _one_of("backend", self.backend, BACKENDS)
        if self.tokenizer is not None:
            _one_of("tokenizer", self.tokenizer, TOKENIZERS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("parallel", self.parallel, KINDS)
        for name in ("context", "batch_size", "accumulate", "steps", "eval_every", "save_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        require(self.eval_tokens >= 0, f"eval_tokens must be at least 0, got {self.eval_tokens}")
        require(
            0 <= self.val_fraction < 1, f"val_fraction must be in [0, 1), got {self.val_fraction}"
        )
        require(0 < self.lr < float("inf"), f"lr must be above 0 and finite, got {self.lr}")
        require(
            0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}"
        )
        require(
            self.warmup is None or 0 <= self.warmup <= self.steps,
            f"warmup must be from 0 to the number of steps, {self.steps}, got {self.warmup}",
        )
        require(
            0 <= self.weight_decay < float("inf"),
            f"weight_decay must be at least 0 and finite, got {self.weight_decay}",
        )
        require(self.clip > 0, f"clip must be above 0 (inf: no clipping), got {self.clip}")
        require(0 <= self.seed < 2**63, f"seed must be in [0, 2**63), got {self.seed}")

    @property
    def warmup_steps(self) -> int:
        """The length of the warm-up."""
        return min(100, self.steps // 10) if self.warmup is None else self.warmup

    def sizes(self, vocab_size: int) -> dict[str, Any]:
        """What `build_model` reads."""
        names = ("context", "hidden", "layers", "heads", "dropout", "tied")
        return {"vocab_size": vocab_size, **{name: getattr(self, name) for name in names}}


def resumed(stored: RunConfig, given: dict[str, Any]) -> RunConfig:
    """The stored options with those of `given` that are free to change on resume.

    Raises:
        UserError: `given` has another value for an option that is not.
    """
    for name, value in given.items():
        before = getattr(stored, name)
        require(
            name in FREE_ON_RESUME or value == before,
            f"cannot resume with another configuration: --{name.replace('_', '-')} was {before}, "
            f"got {value}",
        )
    changed = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return RunConfig(**{**asdict(stored), **changed})


def config_from_json(parsed: dict[str, Any]) -> RunConfig:
    """The options as config.json keeps them; a run of another version may have others."""
    known = {field.name for field in fields(RunConfig)}
    unknown = sorted(set(parsed) - known)
    require(not unknown, f"options this version does not know: {', '.join(unknown)}")
    return RunConfig(**parsed)


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    require(
        device.type in ("cpu", "cuda"), f"device must be auto, cpu, cuda or cuda:N, got {name!r}"
    )
    require(
        device.type == "cpu" or (device.index or 0) < torch.cuda.device_count(),
        f"device {name} is not there: torch {torch.__version__} sees "
        f"{torch.cuda.device_count()} CUDA devices",
    )
    return device


def _one_of(name: str, value: str, choices: Any) -> None:
    require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
