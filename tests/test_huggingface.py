"""Models of transformers with fastattn's attention: the same numbers and gradients as with their own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.backends.cpu import CpuBackend
from fastattn.integrations import huggingface

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LENGTH, VOCABULARY = 11, 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, LENGTH))


def _padding(side: str) -> Tensor:
    """(2, LENGTH): a few tokens of the first sequence are padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, (slice(None, 4) if side == "left" else slice(7, None))] = 0
    return mask


def _encoder() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "attention_mask": _padding("right")}


def _decoder() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "attention_mask": _padding("left")}


def _unpadded() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def _both() -> dict[str, Tensor]:
    return {**_encoder(), "decoder_input_ids": _tokens()[:, :6]}


def _image(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


# Class, configuration's keywords, and what makes the inputs.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "Bert": ("Model", {**SIZES, **NO_DROPOUT, "vocab_size": VOCABULARY}, _encoder),
    "ModernBert": (
        "Model",
        {**SIZES, "vocab_size": VOCABULARY, "local_attention": 4, "pad_token_id": 0, "cls_token_id": 1,
         "sep_token_id": 2, "num_hidden_layers": 4},
        _encoder,
    ),
    "GPT2": (
        "LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        _decoder,
    ),
    "Llama": ("ForCausalLM", GROUPED, _decoder),
    "Llama without padding": ("ForCausalLM", GROUPED, _unpadded),
    "Mistral": ("ForCausalLM", {**GROUPED, "sliding_window": 4}, _decoder),
    "Qwen3": ("ForCausalLM", {**GROUPED, "head_dim": 8}, _decoder),
    "Gemma2": (
        "ForCausalLM",
        {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.5},
        _decoder,
    ),
    "GptOss": (
        "ForCausalLM",
        {**GROUPED, "head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        _decoder,
    ),
    "T5": (
        "Model",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
         "dropout_rate": 0.0},
        _both,
    ),
    "Bart": (
        "Model",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
         "dropout": 0.0, "max_position_embeddings": 32},
        _both,
    ),
    "ViT": ("Model", {**SIZES, **NO_DROPOUT, "image_size": 16, "patch_size": 4}, _image(16)),
    "Swin": (
        "Model",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "drop_path_rate": 0.0},
        _image(32),
    ),
}  # fmt: skip


def _model(name: str, attention: str = "eager", **more: Any) -> torch.nn.Module:
    kind, keywords, _ = MODELS[name]
    stem = name.split()[0]
    config = getattr(transformers, f"{stem}Config")(**{**keywords, **more})
    torch.manual_seed(1)
    model = getattr(transformers, f"{stem}{kind}")._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights leave attention almost uniform
            parameter.normal_(std=1.0 if parameter.dim() == 1 else 0.2)
    return model.eval()


def _inputs(name: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return MODELS[name][2]()


def _seen(name: str, out: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Outputs of tokens that are no padding: what padding itself becomes is nobody's business."""
    mask = inputs.get("attention_mask")
    return out[mask.bool()] if mask is not None and mask.shape == out.shape[:2] else out


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * max(1.0, expected.abs().max().item()))


def _run(name: str, model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """First output and the gradients of all parameters."""
    model.zero_grad()
    inputs = _inputs(name)
    out = _seen(name, model(**inputs)[0], inputs)
    torch.manual_seed(3)
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = _model(name)
    expected, gradients = _run(name, model)
    assert type(model).__name__ in huggingface.use(model).using
    found, ours = _run(name, model)
    call = fastattn.last_call()
    assert call is not None
    assert call.backend == "cpu"
    _close(found, expected)
    assert ours.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        _close(ours[parameter], gradient)


def test_what_the_kernels_are_given() -> None:
    """Nothing is written out that the kernels know a better word for, and no stage is dropped."""
    features = {}
    for name in ("Llama without padding", "Llama", "Gemma2", "GptOss", "T5", "Swin"):
        model = _model(name)
        huggingface.use(model)
        model(**_inputs(name))
        call = fastattn.last_call()
        assert call is not None
        features[name] = call.features
    assert features["Llama without padding"] == ["causal"]
    assert features["Llama"] == ["dense_mask"]
    assert features["Gemma2"] == ["softcap", "dense_mask"]
    assert features["GptOss"] == ["dense_mask", "sink"]
    assert "dense_bias" in features["T5"]
    assert "dense_bias" in features["Swin"]


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GptOss", "GPT2"])
def test_generation(name: str, cache: str | None) -> None:
    """Greedy tokens behind prompts of two lengths, past a sliding window, step by step with a cache."""
    texts = []
    for attention in ("eager", "fastattn"):
        huggingface.register()
        model = _model(name, attention)
        texts.append(
            model.generate(
                **_decoder_inputs(), max_new_tokens=9, do_sample=False, cache_implementation=cache, eos_token_id=None,
                pad_token_id=0, disable_compile=True,
            )
        )  # fmt: skip
    assert texts[0].shape == (2, LENGTH + 9)
    assert torch.equal(*texts)


def _decoder_inputs() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return _decoder()


@pytest.mark.parametrize("by_kernel", [True, False], ids=["kernel", "formula"])
@pytest.mark.parametrize("name", ["Bert", "Llama", "Gemma2", "GptOss", "T5"])
def test_weights(name: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `output_attentions` asks for, which "sdpa" does not give: from the kernel, or by the formula, as on GPUs."""
    model, inputs = _model(name), _inputs(name)
    expected = model(**inputs, output_attentions=True)
    huggingface.use(model)
    monkeypatch.setattr(CpuBackend, "gives_weights", by_kernel)
    found = model(**inputs, output_attentions=True)
    for kind in ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions"):
        if (theirs := getattr(expected, kind, None)) is not None:
            assert len(getattr(found, kind)) == len(theirs)
            for ours, layer in zip(getattr(found, kind), theirs, strict=True):
                _close(_seen(name, ours.transpose(1, 2), inputs), _seen(name, layer.transpose(1, 2), inputs))
    _close(_seen(name, found[0], inputs), _seen(name, expected[0], inputs))


def test_dropout() -> None:
    model = _model("Bert", attention_probs_dropout_prob=0.5).train()
    huggingface.use(model)
    inputs = _inputs("Bert")
    torch.manual_seed(0)
    first, second = model(**inputs)[0], model(**inputs)[0]
    call = fastattn.last_call()
    assert call is not None
    assert "dropout" in call.features
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(**inputs)[0], first)


def test_compile() -> None:
    """One graph, without breaks."""
    model = _model("Llama")
    huggingface.use(model)
    inputs = _inputs("Llama")
    expected = model(**inputs)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _close(_seen("Llama", compiled(**inputs)[0], inputs), _seen("Llama", expected, inputs))


def _bloom(attention: str) -> torch.nn.Module:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    torch.manual_seed(1)
    return transformers.BloomForCausalLM._from_config(config, attn_implementation=attention).eval()


def test_a_model_that_takes_no_function_stays_right() -> None:
    """Its masks stay what its own code reads."""
    inputs = _decoder_inputs()
    expected = _bloom("eager")(**inputs)[0]
    with pytest.raises(fastattn.UnsupportedError, match=r"BloomForCausalLM: .*AttentionInterface"):
        huggingface.use(_bloom("eager"))
    huggingface.register()
    assert torch.equal(_bloom("fastattn")(**inputs)[0], expected)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a transformers.PreTrainedModel, got Linear"):
        huggingface.use(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_report_and_way_back() -> None:
    model = _model("Llama")
    report = huggingface.use(model)
    assert str(report) == "using fastattn: LlamaForCausalLM, LlamaModel"
    assert not report.left
    assert huggingface.use(model) == report
    model.set_attn_implementation("sdpa")
    fastattn.attention(*torch.randn(3, 1, 1, 2, 4))
    before = fastattn.last_call()
    model(**_inputs("Llama"))
    assert fastattn.last_call() == before


def test_a_model_inside_that_takes_no_function_is_named() -> None:
    vision = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)
    text = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCABULARY)
    inner = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(vision), decoder=transformers.BloomForCausalLM(text)
    )
    report = huggingface.use(inner)
    assert "ViTModel" in report.using
    assert "AttentionInterface" in report.left["BloomForCausalLM"]
    assert "left BloomForCausalLM" in str(report)


# -- the function by itself, beside transformers' own for "sdpa" --


@st.composite
def _calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any], SimpleNamespace]:
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    torch.manual_seed(draw(st.integers(0, 999)))
    heads = kv_heads * group
    query = torch.randn(draw(st.sampled_from([1, batch])), queries, heads, 8).transpose(1, 2)
    key, value = (torch.randn(batch, kv_heads, keys, 8) for _ in range(2))
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    one = draw(st.booleans())
    mask = None
    if kind == "bool":
        mask = torch.rand(batch, 1 if one else heads, queries, keys) < 0.7
        mask[..., 0] = True
    elif kind == "float":
        mask = torch.randn(1 if one else batch, heads, queries, keys)
    causal = draw(st.sampled_from([None, True, False]))
    if keys < queries and kind == "none":
        causal = False  # rows that see nothing; no model asks for it
    bias = torch.randn(1, heads, queries, keys) if draw(st.booleans()) else None
    module = SimpleNamespace(num_key_value_groups=group, is_causal=draw(st.booleans()) and keys >= queries)
    options = {"scaling": draw(st.sampled_from([None, 1.0, 0.3])), "is_causal": causal, "position_bias": bias}
    return [query, key, value, mask], options, module  # type: ignore[list-item]


@settings(max_examples=200, deadline=None)
@given(_calls())
def test_like_sdpa(call: tuple[list[Tensor], dict[str, Any], SimpleNamespace]) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    operands, options, module = call
    batch = operands[1].shape[0]
    given_to_sdpa = [operands[0].expand(batch, -1, -1, -1), *operands[1:]]  # packed heads would not broadcast
    expected, _ = sdpa_attention_forward(module, *given_to_sdpa, **options)
    found, weights = huggingface.attention_forward(module, *operands, **options)
    assert weights is None
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
