"""Starting, resuming and opening a run folder."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from seqkern.checkpoint import has_checkpoint, load_checkpoint
from seqkern.config import RunConfig, config_from_json, resolve_device, resumed
from seqkern.data import (
    Corpus,
    TokenFile,
    Tokenizer,
    embedded_text,
    is_token_file,
    load_tokenizer,
    make_corpus,
    read_text,
    text_digest,
    train_tokenizer,
)
from seqkern.data.corpus import check_vocabulary, corpus_of_tokens
from seqkern.data.token_file import refuse_cut_token_file
from seqkern.errors import UserError, require
from seqkern.files import replace_content
from seqkern.metrics import read_metrics
from seqkern.models import LanguageModel, build_model
from seqkern.models.size import check_batch_fits, check_fits
from seqkern.parallel import Parallel
from seqkern.plot import PlotLabels, plot_losses
from seqkern.train import Trainer, load_parameters

VERIFIED_SIZE = 1 << 30  # bytes: two seconds

_OURS = ("config.json", "tokenizer.json", "metrics.csv", "loss.png", "tensorboard")
_TOKEN_NAMES = {"char": "character", "word": "word token", "bpe": "byte pair"}


def start_run(
    config: RunConfig,
    out: Path | None,
    prefix: str | None = None,
    parallel: Parallel | None = None,
) -> Trainer:
    """Make a run folder and a trainer at step 0.

    Args:
        config: the options.
        out: the folder; None makes `runs/<prefix>-<n>` with the first free n.
        prefix: by default model, tokenizer and the name of the text.
        parallel: the processes that train; this one alone by default.

    Raises:
        UserError: a wrong option or text, or a folder that holds something already. All of that
            is found before the folder is made.
    """
    from seqkern import __version__

    parallel = Parallel() if parallel is None else parallel

    def check() -> str:
        if out is not None:
            _check_free(out)
        return ""

    parallel.first(check)
    resolve_device(config.device)
    parallel.check_batch(config.batch_size, config.accumulate)
    source = _read(config)
    tokenizer, corpus = _prepared(source, config)
    _verify(source, parallel)
    config = replace(config, tokenizer=tokenizer.kind)
    sizes = config.sizes(tokenizer.vocab_size)
    # On the CPU each parameter has a gradient and AdamW's two moments; on a GPU it is made here.
    width = 8 if config.dtype == "float64" else 4
    here = resolve_device(config.device).type == "cpu"
    check_fits(config.model, sizes, 4 * width if here else 4)
    row = config.hidden * width if here else 0
    check_batch_fits(config.batch_size, config.context, row, config.accumulate)
    torch.manual_seed(config.seed)
    model = build_model(config.model, sizes, config.backend)
    name = "embedded" if config.data is None else Path(config.data).stem
    described = {
        "seqkern": __version__,
        "run": asdict(config),
        "model": {"name": config.model, "sizes": sizes},
        "text_sha256": corpus.digest,
        "unigram_entropy": corpus.unigram_entropy,
    }

    def make() -> str:
        run = _make_folder(out, prefix or f"{config.model}-{tokenizer.kind}-{name}")
        replace_content(run / "tokenizer.json", tokenizer.dumps().encode())
        replace_content(run / "config.json", json.dumps(described, indent=1).encode())
        return str(run)

    return Trainer(Path(parallel.first(make)), config, model, corpus, parallel)


def resume_run(run: Path, given: dict[str, Any], parallel: Parallel | None = None) -> Trainer:
    """The trainer of a run at its last checkpoint.

    Args:
        run: the folder.
        given: options the user gave again; they must be the stored ones, but for
            `seqkern.config.FREE_ON_RESUME`.
        parallel: the processes that train, in any number; this one alone by default.

    Raises:
        UserError: no such run, another configuration or text, or a damaged file.
    """
    described = _describe(run)
    require(
        has_checkpoint(run),
        f"there is no checkpoint in {run}, which was stopped before its first: the same command "
        "without --resume starts again",
    )
    config = resumed(config_from_json(described["run"]), given)
    source = _read(config)
    require(
        _digest(source) == described["text_sha256"],
        f"cannot resume: {config.data or 'the embedded text'} is not the text {run} was started "
        "with",
    )
    parallel = Parallel() if parallel is None else parallel
    corpus = _corpus(source, load_tokenizer(run / "tokenizer.json"), config)
    _verify(source, parallel)
    model = build_model(config.model, described["model"]["sizes"], config.backend)
    parallel.check_batch(config.batch_size, config.accumulate)
    trainer = Trainer(run, config, model, corpus, parallel)
    trainer.restore()
    return trainer


def load_run(
    run: str | Path, backend: str = "seqkern", device: str = "cpu"
) -> tuple[LanguageModel, Tokenizer]:
    """The model of a run's last checkpoint, in evaluation mode, and its tokenizer.

    Raises:
        UserError: no such run, or a damaged file.
    """
    folder = Path(run)
    described = _describe(folder)
    checkpoint = load_checkpoint(folder, parts=["model"])
    model = build_model(described["model"]["name"], described["model"]["sizes"], backend)
    model.to(next(iter(checkpoint.model.values())).dtype)
    load_parameters(model, checkpoint.model)
    return model.to(resolve_device(device)).eval(), load_tokenizer(folder / "tokenizer.json")


def read_config(run: Path) -> RunConfig:
    """The options a run was started with; `UserError` where there is no run, or a damaged one."""
    return config_from_json(_describe(run)["run"])


def draw_run(run: Path) -> None:
    """Draw loss.png from a run's metrics.csv and config.json."""
    described = _describe(run)
    options, name = described["run"], described["model"]["name"]
    token = _TOKEN_NAMES[options["tokenizer"]]
    text = Path(options["data"]).name if options["data"] else "Python's language reference"
    title = f"{name.upper()}, {options['layers']} x {options['hidden']}, on {text} ({run.name})"
    labels = PlotLabels(title, described["unigram_entropy"], token)
    plot_losses(read_metrics(run / "metrics.csv"), labels, run / "loss.png")


def _describe(run: Path) -> dict[str, Any]:
    """The parsed config.json."""
    require(run.is_dir(), f"there is no run folder {run}")
    path = run / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        described["run"]["tokenizer"], described["run"]["data"], described["run"]["layers"]
        described["model"]["name"], described["model"]["sizes"]["vocab_size"]
        described["text_sha256"], float(described["unigram_entropy"])
    except OSError as error:
        raise UserError(f"{run} is not a run folder: cannot read config.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not a run's of seqkern") from error
    parsed: dict[str, Any] = described
    return parsed


def _read(config: RunConfig) -> str | TokenFile:
    """The text, or the file of its tokens."""
    if config.data is None:
        return embedded_text()
    if not is_token_file(config.data):
        refuse_cut_token_file(config.data)
        return read_text(config.data)
    file = TokenFile(config.data)
    require(
        config.tokenizer in (None, file.tokenizer.kind),
        f"{config.data} holds the tokens of a {file.tokenizer.kind} tokenizer: leave --tokenizer "
        f"out, got {config.tokenizer}",
    )
    return file


def _verify(source: str | TokenFile, parallel: Parallel) -> None:
    """Compare a token file with what was written, where that takes a moment; the first process.

    Of larger ones the ids are checked as they are drawn.
    """

    def verify() -> str:
        if isinstance(source, TokenFile) and source.path.stat().st_size <= VERIFIED_SIZE:
            source.verify()
        return ""

    parallel.first(verify)


def _digest(source: str | TokenFile) -> str:
    return source.digest if isinstance(source, TokenFile) else text_digest(source)


def _prepared(source: str | TokenFile, config: RunConfig) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus; what is wrong with a text names its file."""
    try:
        if isinstance(source, TokenFile):
            tokenizer = source.tokenizer
        else:
            tokenizer = train_tokenizer(config.tokenizer or "char", source, config.vocab_size)
        corpus = _corpus(source, tokenizer, config)
        check_vocabulary(tokenizer)
    except UserError as error:
        if config.data is None:
            raise
        raise UserError(f"{config.data}: {error}") from error
    return tokenizer, corpus


def _corpus(source: str | TokenFile, tokenizer: Tokenizer, config: RunConfig) -> Corpus:
    if isinstance(source, TokenFile):
        return corpus_of_tokens(source, config.val_fraction, config.context)
    return make_corpus(source, tokenizer, config.val_fraction, config.context)


def _check_free(out: Path) -> None:
    """A folder is free when it is new, empty, or left by a run that never got to a checkpoint."""
    require(not has_checkpoint(out), f"{out} already holds a run: use --resume, or another --out")
    if not out.exists():
        return
    require(out.is_dir(), f"{out} is not a folder")
    foreign = [
        entry.name
        for entry in sorted(out.iterdir())
        if not (entry.name in _OURS or entry.name.startswith((".", "step-")) or entry.is_symlink())
    ]
    require(not foreign, f"{out} already holds other files ({', '.join(foreign[:3])})")


def _make_folder(out: Path | None, prefix: str) -> Path:
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        n = 1
        while True:
            run = Path("runs") / f"{prefix}-{n}"
            run.parent.mkdir(exist_ok=True)
            try:
                run.mkdir()
            except FileExistsError:
                n += 1
            else:
                return run
    except OSError as error:
        raise UserError(
            f"cannot make the run folder: {error.strerror}: {error.filename}"
        ) from error
