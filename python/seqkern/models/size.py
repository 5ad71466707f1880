"""How large a language model would be, before anything of it is made."""

from typing import Any

from seqkern.machine import in_words, require_memory

_BYTES_PER_LAYER = 16 << 10  # of the objects, without what is in the tensors


def count_parameters(name: str, sizes: dict[str, Any]) -> int:
    """The parameters of `build_model(name, sizes)`, of sizes of any size.

    Example:
        >>> count_parameters("lstm", {"vocab_size": 10, "hidden": 8, "layers": 1})
        746
    """
    V, H, layers, T = (int(sizes.get(n, 0)) for n in ("vocab_size", "hidden", "layers", "context"))
    if name == "gpt":
        head = 0 if sizes["tied"] else V * H
        return V * H + T * H + layers * (12 * H * H + 13 * H) + 2 * H + head
    gates = 4 if name == "lstm" else 1
    return V * H + layers * gates * (2 * H * H + 2 * H) + H * V + V


def check_fits(name: str, sizes: dict[str, Any], bytes_per_parameter: int) -> None:
    """Raise `UserError` for a model that this machine's memory cannot hold.

    Args:
        name: of the model.
        sizes: what `build_model` reads.
        bytes_per_parameter: those of gradients and the like included.
    """
    H, layers = sizes["hidden"], sizes["layers"]
    if H < 1 or layers < 1:
        return  # the model says so itself
    parameters = count_parameters(name, sizes)
    needed = parameters * bytes_per_parameter + layers * _BYTES_PER_LAYER
    shown = f"{parameters:,}" if parameters < 10**15 else "far too many"
    require_memory(
        needed,
        f"hidden {H} and layers {layers} make {shown} parameters, which need {in_words(needed)}",
        "take a smaller hidden or fewer layers",
    )


def check_batch_fits(batch_size: int, context: int, width: int, accumulate: int) -> None:
    """Raise `UserError` for a batch whose tokens and first layer alone fill the memory.

    Args:
        batch_size: B.
        context: T.
        width: bytes that the first layer's output takes per token; 0 where it is elsewhere.
        accumulate: parts a batch is taken in.
    """
    needed = batch_size * (context + 1) * 16 + batch_size // accumulate * context * width
    require_memory(
        needed,
        f"batch_size {batch_size} and context {context} need at least {in_words(needed)}",
        "take smaller ones",
    )
