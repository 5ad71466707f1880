"""transformers' models with attn_implementation="seqkern" agree with its own attention."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.gptj import modeling_gptj

from seqkern import ops
from seqkern.errors import UserError
from seqkern.integrations import transformers as integration

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}
WINDOW = {"sliding_window": 5}

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None,
        bos_token_id=1, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=0.4
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **WINDOW, query_pre_attn_scalar=8),
}  # fmt: skip
WIDE = {"head_dim": 264}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
#: Heads wider than our kernel's, or with values of another width.
UNFIT: dict[str, Any] = {
    "llama-wide": lambda: transformers.LlamaConfig(**{**SIZES, **WIDE}),
    "mistral-wide": lambda: transformers.MistralConfig(**{**SIZES, **WIDE}, **WINDOW),
    "gemma2-wide": lambda: transformers.Gemma2Config(
        **{**SIZES, **WIDE}, **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=0.4
    ),
    "deepseek": lambda: transformers.DeepseekV3Config(**{**SIZES, **LATENT}),
}
PEERS = {name: ["eager", "sdpa"] if name != "gemma2" else ["eager"] for name in CONFIGS}
CASES = [(name, peer) for name in CONFIGS for peer in PEERS[name]]

PLAIN: dict[str, Any] = {
    key: value
    for key, value in SIZES.items()
    if key not in ("num_key_value_heads", "head_dim", "vocab_size")
}
BART: dict[str, Any] = {
    "d_model": 32, "max_position_embeddings": 64,
    **{f"{part}_{key}": value for part in ("encoder", "decoder")
       for key, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
XGLM = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
#: The class and the sizes of a model of each family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("LMHeadModel", GPT),
    "GPTJ": ("ForCausalLM", {**GPT, "rotary_dim": 4}),
    "GPTBigCode": ("ForCausalLM", GPT),
    "GPTNeoX": ("ForCausalLM", PLAIN),
    "Llama": ("ForCausalLM", PLAIN),
    "OPT": ("ForCausalLM", {**OPT, "word_embed_proj_dim": 32}),
    "Phi": ("ForCausalLM", PLAIN),
    "StableLm": ("ForCausalLM", {**PLAIN, "num_key_value_heads": 2}),
    "Cohere": ("ForCausalLM", PLAIN),
    "Olmo2": ("ForCausalLM", PLAIN),
    "Bert": ("ForMaskedLM", PLAIN),
    "Roberta": ("ForMaskedLM", PLAIN),
    "Bart": ("ForConditionalGeneration", BART),
    "MBart": ("ForCausalLM", BART),
    "Whisper": ("ForCausalLM", {**BART, "max_target_positions": 64}),
    "T5": ("ForConditionalGeneration", T5),
    "Bloom": ("ForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("ForCausalLM", PLAIN),
    "XGLM": ("ForCausalLM", XGLM),
    "GPTNeoXJapanese": ("ForCausalLM", PLAIN),
    "Mpt": ("ForCausalLM", MPT),
    "MegatronBert": ("ForMaskedLM", PLAIN),
    "BigBirdPegasus": ("ForCausalLM", BART),
}
#: Why families are refused.
OWN = {
    "Bloom": "BloomAttention does not use transformers' attention interface",
    "Falcon": "FalconAttention does not use",
    "XGLM": "XGLMAttention does not use",
    "GPTNeoXJapanese": "GPTNeoXJapaneseAttention does not use",
    "Mpt": "MptAttention does not use",
    "MegatronBert": "MegatronBertSelfAttention does not use",
    "BigBirdPegasus": "its _supports_sdpa and _supports_attention_backend are False",
}
# In the last versions for Python 3.10 (5.20) it has attention of its own.
if not hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
    OWN["GPTJ"] = "GPTJAttention does not use"


@pytest.fixture(autouse=True)
def _registered() -> None:
    integration.register()


def model(name: str, implementation: str) -> Any:
    """The model with large weights, so that what a query sees matters."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        {**CONFIGS, **UNFIT}[name](), attn_implementation=implementation, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.dim() == 2 and "embed" not in key and "wte" not in key:
                parameter.normal_(std=0.25)
    return made


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Tokens [3, 12] and which of them exist."""
    tokens = torch.randint(2, 61, (3, 12))
    lengths = torch.tensor([12, 7, 3])[:, None]
    exists = torch.arange(12) < lengths
    if side == "left":
        exists = exists.flip(1)
    return tokens.where(exists, 0), exists


class Seen:
    """Counts the calls that reach our kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        kernel = ops.causal_attention

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(kwargs)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(ops, "causal_attention", counted)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.mark.parametrize(("name", "peer"), CASES)
def test_logits_loss_and_gradients(name: str, peer: str, seen: Seen) -> None:
    tokens = torch.randint(2, 61, (2, 11))
    results = []
    for implementation in ("seqkern", peer):
        m = model(name, implementation)
        out = m(tokens, labels=tokens)
        out.loss.backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([out.logits, out.loss, *grads])
    assert len(seen.calls) == 2  # a call per layer
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batch(name: str, side: str, seen: Seen) -> None:
    tokens, exists = padded(side)
    results = []
    for implementation in ("seqkern", "eager"):
        m = model(name, implementation)
        out = m(tokens, attention_mask=exists.long(), labels=tokens.where(exists, -100))
        out.loss.backward()
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([out.logits[exists], *grads])
    assert len(seen.calls) == 2
    assert all(call["cu_seqlens"].tolist() == [0, 12, 19, 22] for call in seen.calls)
    # Logits at the boundary of padding enter transformers' loss: compared is what exists.
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_in_the_middle(name: str) -> None:
    """A window counts positions, so only without one may the holes be closed."""
    tokens, exists = padded("left")
    exists[0, 4:6] = False
    logits = [
        model(name, implementation)(tokens, attention_mask=exists.long()).logits[exists]
        for implementation in ("seqkern", "eager")
    ]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation(name: str, padding: bool, seen: Seen) -> None:
    tokens, exists = padded("left")
    if not padding:
        tokens, exists = tokens[:1], exists[:1]
    ids = [
        model(name, implementation).generate(
            tokens, attention_mask=exists.long(), max_new_tokens=8, do_sample=False
        )
        for implementation in ("seqkern", *PEERS[name])
    ]
    assert ids[0].shape[1] == 20
    assert all(torch.equal(ids[0], other) for other in ids[1:])
    # Without padding every step is ours, with it the prompt alone.
    assert len(seen.calls) == (2 if padding else 2 * 8)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_static_cache(name: str) -> None:
    tokens = torch.randint(2, 61, (2, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    static, dynamic = (
        model(name, "seqkern").generate(tokens, cache_implementation=kind, **options)
        for kind in ("static", "dynamic")
    )
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompt_in_two_parts(name: str, seen: Seen) -> None:
    """More than one new token over a cache: the last query stands at the last key."""
    tokens = torch.randint(2, 61, (2, 11))
    m = model(name, "seqkern")
    whole = m(tokens).logits
    first = m(tokens[:, :7], use_cache=True)
    second = m(tokens[:, 7:], past_key_values=first.past_key_values).logits
    assert len(seen.calls) == 6
    torch.testing.assert_close(second, whole[:, 7:], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", UNFIT)
def test_heads_that_no_kernel_takes(name: str, parts: int, seen: Seen) -> None:
    """Torch's attention, but with the window, and the last query at the last key."""
    tokens = torch.randint(2, 61, (2, 12))
    logits = []
    for implementation in ("seqkern", "eager"):
        m = model(name, implementation)
        out = m(tokens[:, : 12 // parts], use_cache=True)
        if parts == 2:
            out = m(tokens[:, 6:], past_key_values=out.past_key_values)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-4)
    assert seen.calls == []


def test_custom_mask_is_torchs(seen: Seen) -> None:
    tokens = torch.randint(2, 61, (2, 6))
    see = torch.ones(6, 6).tril().bool()
    see[5, 1] = False
    mask = torch.where(see, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 6, 6)
    logits = [
        model("llama", implementation)(tokens, attention_mask=mask).logits
        for implementation in ("seqkern", "eager")
    ]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-4)
    assert seen.calls == []


def test_bidirectional_model_is_torchs(seen: Seen) -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32,
    )  # fmt: skip
    tokens, exists = padded("right")
    outputs = []
    for implementation in ("seqkern", "eager"):
        torch.manual_seed(0)
        m = transformers.BertModel._from_config(config, attn_implementation=implementation).eval()
        outputs.append(m(tokens, attention_mask=exists.long()).last_hidden_state[exists])
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=2e-4)
    assert seen.calls == []


def tiny(name: str, implementation: str) -> Any:
    """A model of `FAMILIES`, with large weights."""
    kind, sizes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    )
    made = getattr(transformers, f"{name}{kind}")._from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    )
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.dim() == 2 and "embed" not in key and "wte" not in key:
                parameter.normal_(std=0.25)
    return made.eval()


def agree(actual: Any, expected: Any) -> None:
    """On a batch, padded or not; and a decoder's first token does not see the last."""
    whole, exists = torch.randint(2, 61, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    changed = whole.clone()
    changed[:, -1] = 1
    batches = [(whole, exists), (changed, exists), padded("left"), padded("right")]
    logits: list[list[Tensor]] = []
    for m in (actual, expected):
        logits.append([])
        for tokens, exists in batches:
            options = {"attention_mask": exists.long(), "use_cache": False}
            if m.config.is_encoder_decoder:
                logits[-1].append(m(tokens, decoder_input_ids=whole, **options).logits)
            else:
                logits[-1].append(m(tokens, **options).logits[exists][None])
        if type(m).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            assert torch.equal(logits[-1][0][0, 0], logits[-1][1][0, 0])
    for one, other in zip(*logits, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=5e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OWN])
@torch.no_grad()
def test_families(name: str) -> None:
    agree(tiny(name, "seqkern"), tiny(name, "eager"))


@pytest.mark.parametrize("name", OWN)
def test_own_attention_is_refused(name: str) -> None:
    kind = f"{name}{FAMILIES[name][0]}"
    with pytest.raises(ValueError, match=rf"^{kind} does not support.*: {OWN[name]}"):
        tiny(name, "seqkern")


@pytest.mark.parametrize("name", ["Bloom", "MegatronBert", "GPT2"])
@torch.no_grad()
def test_configuration_changed_by_hand(name: str) -> None:
    """Nobody can refuse it; a mask that any attention reads is right."""
    changed = tiny(name, "eager")
    changed.config._attn_implementation = "seqkern"
    agree(changed, tiny(name, "eager"))


@torch.no_grad()
def test_models_of_users(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """One of transformers' layers is taken; one with attention of its own makes masks complete."""

    class Reward(transformers.LlamaForCausalLM):
        pass

    sizes = SIZES | {"num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes)
    tokens = torch.randint(2, 61, (2, 6))
    reward = Reward._from_config(config, attn_implementation="seqkern").eval()
    reward(tokens)
    assert len(seen.calls) == 1

    own = ModuleType("a_users")
    monkeypatch.setitem(sys.modules, "a_users", own)
    own.OwnAttention = type("OwnAttention", (torch.nn.Module,), {"__module__": "a_users"})
    own.Own = type(
        "Own",
        (transformers.PreTrainedModel,),
        {"__module__": "a_users", "config_class": transformers.LlamaConfig},
    )
    monkeypatch.setattr(integration, "_attend", dict(integration._attend))
    with pytest.raises(ValueError, match=r"^Own does not support.*OwnAttention"):
        own.Own(transformers.LlamaConfig(**sizes, attn_implementation="seqkern"))
    own.Own(transformers.LlamaConfig(**sizes, attn_implementation="eager"))
    logits = reward(tokens).logits
    assert len(seen.calls) == 1
    reward.config._attn_implementation = "eager"
    torch.testing.assert_close(logits, reward(tokens).logits)


def test_unpickled_model_is_ours(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    m = tiny("GPT2", "seqkern")
    monkeypatch.setattr(integration, "_attend", {})  # of another process
    m(torch.randint(2, 61, (2, 6)))
    assert len(seen.calls) == 2


def test_registering_again_changes_nothing() -> None:
    before = transformers.PreTrainedModel.get_correct_attn_implementation
    integration.register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before


def test_compiles_whole() -> None:
    tokens = torch.randint(2, 61, (2, 6))
    m = model("llama", "seqkern")
    plain = m(tokens, use_cache=False).logits
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, plain)


def test_sinks_are_refused() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match='"seqkern" does not support s_aux'):
        integration.attention(torch.nn.Identity(), q, q, q, None, s_aux=torch.zeros(1))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers: pip install 'seqkern\["):
        integration.register()


def test_seqkern_does_not_import_it() -> None:
    code = "import sys, seqkern; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name: str, padded: bool) -> None:
    """Training and generation in 16 bits: rotary embeddings leave q and k in float32 there."""
    tokens = torch.randint(3, 61, (2, 9))
    mask, labels = torch.ones_like(tokens), tokens.clone()
    if padded:
        mask[0, :4] = 0
        labels[0, :5] = -100  # what padding predicts is nobody's
    losses = []
    for implementation in ("eager", "seqkern"):
        net = model(name, implementation)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            written = net.generate(tokens, attention_mask=mask, max_new_tokens=2, do_sample=False)
        assert written.shape == (2, 11)
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, atol=0.05, rtol=0.05)
