"""What ops say of arguments of a wrong type: one line with op, argument, expectation and value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from every_op import block, randn
from mistakes import refused
from seqkern import nn, ops

V = "ValueError"
T = "TypeError"


def arguments(op: str, device: str) -> dict[str, Any]:
    """A right call of an op."""
    made: dict[str, Any]
    if op in ("cross_entropy", "linear_cross_entropy"):
        y = torch.tensor([0, 1, 2])
        made = {"logits": randn(3, 5), "target": y}
        if op == "linear_cross_entropy":
            made = {"hidden": randn(3, 4), "weight": randn(5, 4), "target": y}
    elif op in ("softmax", "log_softmax"):
        made = {"x": randn(3, 5)}
    elif op == "sample":
        made = {"logits": randn(3, 5)}
    elif op == "causal_attention":
        made = {"q": randn(2, 4, 5, 8), "k": randn(2, 2, 5, 8), "v": randn(2, 2, 5, 8)}
    elif op == "attention_step":
        made = {"q": randn(2, 4, 1, 8), "k_new": randn(2, 2, 1, 8), "v_new": randn(2, 2, 1, 8)}
        made |= {"k_cache": randn(2, 2, 6, 8), "v_cache": randn(2, 2, 6, 8)}
        made |= {"positions": torch.tensor([0, 3])}
    elif op == "linear_step":
        made = {"x": randn(2, 5), "weight": randn(6, 5), "bias": randn(6)}
    elif op == "decoder_step":
        made = {"x": randn(2, 1, 4), "parameters": block(4) + block(4)}
        made |= {"cache": torch.zeros(2, 2, 2, 2, 6, 2), "lengths": torch.tensor([0, 3])}
    else:
        is_cell = op.endswith("_cell")
        gates = {"lstm": 4, "gru": 3, "rnn": 1}[op.removesuffix("_cell")] * 4
        made = {"input": randn(3, 5) if is_cell else randn(2, 3, 5)}
        if "lstm" in op:
            made["state"] = (randn(3, 4), randn(3, 4))
        else:
            made["h" if is_cell else "h0"] = randn(3, 4)
        made |= {"w_ih": randn(gates, 5), "w_hh": randn(gates, 4)}

    def placed(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(placed(v) for v in value)
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: placed(value) for name, value in made.items()}


#: op, what is changed (a function of the right value, or the value), type, message after "op: ".
MISTAKES: list[tuple[str, dict[str, Any], str, str]] = [
    # None, a list, an array or a module in place of a tensor
    *(
        (op, {name: None}, T, rf"{name} must be a tensor, got None$")
        for op, names in {
            "cross_entropy": ["logits", "target"],
            "linear_cross_entropy": ["hidden", "weight", "target"],
            "softmax": ["x"],
            "log_softmax": ["x"],
            "sample": ["logits"],
            "causal_attention": ["q", "k", "v"],
            "attention_step": ["q", "k_new", "v_new", "k_cache", "v_cache", "positions"],
            "linear_step": ["x", "weight"],
            "decoder_step": ["x", "cache", "lengths"],
            "lstm": ["input", "w_ih", "w_hh"],
            "lstm_cell": ["input", "w_ih", "w_hh"],
            "gru_cell": ["input", "w_ih", "w_hh"],
            "rnn_cell": ["input", "w_ih", "w_hh"],
            "gru": ["input", "w_ih", "w_hh"],
            "rnn": ["input", "w_ih", "w_hh"],
        }.items()
        for name in names
    ),
    ("cross_entropy", {"logits": [[0.0, 1.0]]}, T, "logits must be a tensor, got list of 1$"),
    ("cross_entropy", {"target": [0, 1, 2]}, T, "target must be a tensor, got list of 3$"),
    ("cross_entropy", {"weight": [1.0] * 5}, T, "weight must be a tensor or None, got list of 5$"),
    ("softmax", {"x": np.zeros(3)}, T, "x must be a tensor, got ndarray$"),
    ("sample", {"logits": [[0.0]]}, T, "logits must be a tensor, got list of 1$"),
    ("sample", {"temperature": None}, T, "temperature must be a number or a tensor, got None$"),
    ("sample", {"temperature": [1.0]}, T, "temperature must be a number or a tensor, got list"),
    ("sample", {"token_counts": 3}, T, "token_counts must be a tensor or None, got 3$"),
    ("attention_step", {"q": 1.0}, T, "q must be a tensor, got 1.0$"),
    ("attention_step", {"counters": 0}, T, "counters must be a tensor or None, got 0$"),
    (
        "linear_cross_entropy",
        {"weight": torch.nn.Linear(4, 5)},
        T,
        "weight must be a tensor, got Linear; pass its weight$",
    ),
    *(
        (op, {"lengths": value}, T, f"lengths must be a tensor or None, got {words}$")
        for op in ("lstm", "gru", "rnn", "causal_attention")
        for value, words in (([1, 2, 2], "list of 3"), (np.array([1, 2, 2]), "ndarray"))
    ),
    # pairs of tensors
    (
        "lstm",
        {"state": lambda s: s[:1]},
        V,
        "state must be a pair of tensors or None, got tuple of 1$",
    ),
    ("lstm", {"state": lambda s: (*s, s[0])}, V, "state must be a pair .*, got tuple of 3$"),
    ("lstm", {"state": lambda s: (s[0], 1)}, T, r"state\[1\] must be a tensor, got 1$"),
    ("lstm", {"state": lambda s: s[0]}, V, r"state must be a pair .*, got float32 \[3, 4\]$"),
    ("lstm", {"state": 0}, T, "state must be a pair of tensors or None, got 0$"),
    ("lstm_cell", {"state": lambda s: s[:1]}, V, "state must be a pair .*, got tuple of 1$"),
    ("lstm_cell", {"state": lambda s: (*s, s[0])}, V, "state must be a pair .*, got tuple of 3$"),
    ("lstm_cell", {"state": lambda s: [s[0], 1.0]}, T, r"state\[1\] must be a tensor, got 1.0$"),
    ("gru_cell", {"h": lambda h: (h,)}, T, "h must be a tensor or None, got tuple of 1$"),
    ("rnn_cell", {"h": lambda h: (h, h)}, T, "h must be a tensor or None, got tuple of 2$"),
    ("rnn_cell", {"nonlinearity": "gelu"}, V, "nonlinearity must be 'tanh' or 'relu', got 'gelu'$"),
    (
        "attention_step",
        {"rotary": (randn(6, 2),) * 3},
        V,
        "rotary must be a pair of tensors or None, got tuple of 3$",
    ),
    (
        "attention_step",
        {"rotary": (randn(6, 2), None)},
        V,
        r"rotary must be a pair \(cos, sin\), got one$",
    ),
    ("decoder_step", {"parameters": 5}, T, "parameters must be a list of tensors, got 5$"),
    (
        "decoder_step",
        {"parameters": lambda p: [*p[:3], None, *p[4:]]},
        T,
        r"parameters\[3\] must be a tensor, got None$",
    ),
    # numbers
    ("cross_entropy", {"label_smoothing": None}, T, "label_smoothing must be a number, got None$"),
    (
        "cross_entropy",
        {"label_smoothing": "0.1"},
        T,
        "label_smoothing must be a number, got '0.1'$",
    ),
    ("cross_entropy", {"softcap": None}, T, "softcap must be a number, got None$"),
    ("cross_entropy", {"z_loss": 1j}, T, "z_loss must be a number, got 1j$"),
    ("cross_entropy", {"z_loss": 10**400}, T, r"z_loss must be a number, got 10+\.\.\.$"),
    ("cross_entropy", {"ignore_index": 1.5}, T, "ignore_index must be an integer, got 1.5$"),
    ("cross_entropy", {"return_lse": "yes"}, T, "return_lse must be True or False, got 'yes'$"),
    ("linear_cross_entropy", {"softcap": None}, T, "softcap must be a number, got None$"),
    (
        "linear_cross_entropy",
        {"chunk_bytes": "1"},
        T,
        "chunk_bytes must be an integer or None, got '1'$",
    ),
    (
        "linear_cross_entropy",
        {"chunk_bytes": 1e6},
        T,
        "chunk_bytes must be an integer or None, got 1000000.0$",
    ),
    ("causal_attention", {"dropout_p": None}, T, "dropout_p must be a number, got None$"),
    ("causal_attention", {"window": 2.5}, T, "window must be an integer or None, got 2.5$"),
    ("causal_attention", {"scale": "1"}, T, "scale must be a number or None, got '1'$"),
    ("attention_step", {"window": 2.5}, T, "window must be an integer or None, got 2.5$"),
    ("attention_step", {"softcap": None}, T, "softcap must be a number, got None$"),
    ("attention_step", {"scale": "1"}, T, "scale must be a number or None, got '1'$"),
    ("linear_step", {"eps": None}, T, "eps must be a number, got None$"),
    ("decoder_step", {"eps": None}, T, "eps must be a number, got None$"),
    ("sample", {"top_k": 1.5}, T, "top_k must be an integer or a tensor, got 1.5$"),
    (
        "sample",
        {"seed": 2**64 - 1},
        V,
        rf"seed must be in \[-2\*\*63, 2\*\*63\), got {2**64 - 1}$",
    ),
    # names of options
    *(
        (op, {"reduction": ["mean"]}, T, "reduction must be a string, got list of 1$")
        for op in ("cross_entropy", "linear_cross_entropy")
    ),
    ("linear_step", {"norm": ["rms_norm"]}, T, "norm must be a string or None, got list of 1$"),
    ("linear_step", {"activation": []}, T, "activation must be a string or None, got list of 0$"),
    ("decoder_step", {"activation": []}, T, "activation must be a string or None, got list of 0$"),
    ("sample", {"logprobs": ["model"]}, T, "logprobs must be a string, got list of 1$"),
    ("rnn", {"nonlinearity": ["relu"]}, V, "nonlinearity must be 'tanh' or 'relu', got "),
    ("causal_attention", {"scale": []}, T, "scale must be a number or None, got list of 0$"),
    (
        "cross_entropy",
        {"reduction": torch.ones(2, 2)},
        T,
        "reduction must be a string, got float32 ",
    ),
    (
        "decoder_step",
        {"parameters": torch.ones(())},
        T,
        "parameters must be a list of tensors, got",
    ),
    ("decoder_step", {"eps": float("nan")}, V, "eps must be at least 0, got nan$"),
    ("log_softmax", {"x": torch.ones(())}, V, r"x must be \[\.\.\., V\], got a scalar$"),
    # what no kernel takes
    (
        "cross_entropy",
        {"target": torch.zeros(3, 5, dtype=torch.float8_e5m2)},
        V,
        "target of class probabilities must be float32, float64, float16 or bfloat16, got float8_",
    ),
    (
        "softmax",
        {"x": torch.nested.nested_tensor([randn(2), randn(3)])},
        V,
        "x must be a dense .*, got a nested tensor$",
    ),
    (
        "linear_step",
        {"eps": torch.nested.nested_tensor([randn(2)])},
        V,
        "eps must be a dense .*, got a nested tensor$",
    ),
    (
        "cross_entropy",
        {"logits": lambda x: x.to_sparse()},
        V,
        "logits must be a dense tensor on the CPU or a GPU, got torch.sparse_coo on ",
    ),
    # shapes that are no shape at all
    (
        "attention_step",
        {"q": lambda q: q[0, 0, 0, 0]},
        V,
        r"q must be \[B, NH, S, D\], got float32 \[\]$",
    ),
    (
        "attention_step",
        {"q": lambda q: q[..., :0]},
        V,
        r"q must have a head width from 1 to 256, got float32 \[2, 4, 1, 0\]$",
    ),
    (
        "linear_step",
        {"x": lambda x: x[:, :0], "weight": lambda w: w[:, :0]},
        V,
        r"x must have at least one element in its last dimension, got float32 \[2, 0\]$",
    ),
    (
        "sample",
        {"token_counts": torch.ones(3, 4, dtype=torch.int64)},
        V,
        r"token_counts must be int32 or int64 \[3, 5\], got int64 \[3, 4\]",
    ),
    (
        "sample",
        {"presence_penalty": 1.0},
        V,
        r"token_counts must be given for penalties, int32 or int64 \[3, 5\], got none",
    ),
]


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    MISTAKES,
    ids=[f"{n}-{op}-{'-'.join(changed)}" for n, (op, changed, _, _) in enumerate(MISTAKES)],
)
@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_mistakes(
    backend: Any, op: str, changed: dict[str, Any], error: str, message: str, gradients: bool
) -> None:
    given = arguments(op, backend.device)
    if gradients and op in ("attention_step", "linear_step", "decoder_step", "sample"):
        pytest.skip("has none")
    if gradients:
        first = next(iter(given))
        given[first] = given[first].requires_grad_()
    for name, change in changed.items():
        is_function = callable(change) and not isinstance(change, torch.nn.Module)
        given[name] = change(given[name]) if is_function else change
        if isinstance(given[name], torch.Tensor):
            given[name] = given[name].to(backend.device)
        elif name == "rotary":
            given[name] = tuple(t if t is None else t.to(backend.device) for t in change)
    name = "attention" if op == "causal_attention" else op
    kind = {V: ValueError, T: TypeError}[error]
    refused(lambda: getattr(ops, op)(**given), kind, f"{name}: {message}")


@pytest.mark.parametrize(
    "op", ["cross_entropy", "lstm", "lstm_cell", "gru", "gru_cell", "rnn", "rnn_cell", "sample",
           "causal_attention", "attention_step", "linear_step", "decoder_step",
           "linear_cross_entropy", "softmax"]
)  # fmt: skip
def test_the_right_calls_are_right(backend: Any, op: str) -> None:
    getattr(ops, op)(**arguments(op, backend.device))


def test_what_the_dispatcher_takes_for_a_number_is_one() -> None:
    x, y = randn(3, 5), torch.tensor([0, 1, 2])
    expected = ops.cross_entropy(x, y, ignore_index=2, z_loss=1.0)
    for two, one in ((np.int64(2), np.float32(1)), (torch.tensor(2), torch.tensor(1.0))):
        made: Any = ops.cross_entropy(x, y, ignore_index=two, z_loss=one)  # type: ignore[call-overload]
        assert torch.equal(made, expected)
        # What is right is not blamed for what is wrong.
        wrong: Any = {"ignore_index": two, "z_loss": one, "softcap": None}
        refused(
            lambda wrong=wrong: ops.cross_entropy(x, y, **wrong),
            TypeError,
            "cross_entropy: softcap must be a number, got None$",
        )


def test_a_missing_argument_is_named_by_python() -> None:
    refused(ops.cross_entropy, TypeError, r"cross_entropy\(\) missing 2 required")  # type: ignore[arg-type]


def test_what_is_nobodys_mistake_stays_as_it_is() -> None:
    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            raise LookupError("odd\ntensor")

    with pytest.raises(LookupError, match="odd\ntensor") as raised:
        ops.softmax(randn(3).as_subclass(Odd))
    assert raised.value.__context__ is None


def test_a_cell_of_no_state_starts_at_zero(backend: Any) -> None:
    given = arguments("lstm_cell", backend.device)
    zeros = torch.zeros(3, 4, device=backend.device)
    found = ops.lstm_cell(**given | {"state": None})
    expected = ops.lstm_cell(**given | {"state": (zeros, zeros)})
    assert all(map(torch.equal, found, expected))
    for op in (ops.gru_cell, ops.rnn_cell):
        given = arguments(op.__name__, backend.device)
        assert torch.equal(op(**given | {"h": None}), op(**given | {"h": zeros}))


def test_losses_name_the_ops() -> None:
    refused(
        lambda: nn.CrossEntropyLoss()([[1.0]], torch.tensor([0])),
        TypeError,
        "cross_entropy: logits must be a tensor, got list of 1$",
    )
    refused(
        lambda: nn.LinearCrossEntropyLoss()(randn(1, 4), torch.nn.Linear(4, 5), torch.tensor([0])),
        TypeError,
        "linear_cross_entropy: weight must be a tensor, got Linear; pass its weight$",
    )
