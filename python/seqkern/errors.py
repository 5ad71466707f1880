"""The one kind of error that is the user's to mend."""

from torch import Tensor


class UserError(ValueError):
    """A wrong argument, file or option; the message is one line that says what to change.

    The command line prints the message alone and exits with code 2. Every other exception is a
    defect of seqkern's and keeps its traceback.
    """


def require(holds: bool, message: str) -> None:
    """Raise `UserError(message)` unless `holds`."""
    if not holds:
        raise UserError(message)


def check_tensor(name: str, value: object) -> None:
    """Raise `UserError` for what is no tensor."""
    require(isinstance(value, Tensor), f"{name} must be a tensor, got {type(value).__name__}")


def missing_extra(module: str, extra: str, purpose: str) -> UserError:
    """The error for an optional package that is not installed."""
    return UserError(f"{purpose} needs the package {module}: pip install 'seqkern[{extra}]'")
