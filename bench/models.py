"""The `huggingface` suite: models of transformers with their own attention functions and with fastattn's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.modules import ModuleInputs, draw_padding
from fastattn.bench.scenario import Case, Shape
from fastattn.integrations import huggingface

LAYERS = 2
WINDOW = 256
# The attention function that each peer has.
FUNCTIONS = {"fastattn-hf": huggingface.NAME, "hf-sdpa": "sdpa", "hf-eager": "eager"}


def _sizes(shape: Shape) -> dict[str, Any]:
    width = shape.heads * shape.head_dim
    return {
        "hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": shape.heads,
        "intermediate_size": 4 * width, "vocab_size": 32, "max_position_embeddings": shape.query_length,
    }  # fmt: skip


def _decoder(shape: Shape) -> dict[str, Any]:
    return {**_sizes(shape), "num_key_value_heads": shape.heads // 4, "head_dim": shape.head_dim, "use_cache": False}


def _t5(shape: Shape) -> dict[str, Any]:
    """T5 1.1: with the first T5's ReLU, gradients in two precisions differ by whole terms where a sign does."""
    width = shape.heads * shape.head_dim
    return {
        "d_model": width, "d_kv": shape.head_dim, "d_ff": 2 * width, "num_layers": LAYERS, "num_heads": shape.heads,
        "vocab_size": 32, "dropout_rate": 0.0, "use_cache": False, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip


# Class, configuration, and whether sequences are padded.
MODELS: dict[str, tuple[str, Callable[[Shape], dict[str, Any]], bool]] = {
    "bert": (
        "BertModel",
        lambda shape: {**_sizes(shape), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        True,
    ),
    "llama": ("LlamaModel", _decoder, False),
    "mistral-window": ("MistralModel", lambda shape: {**_decoder(shape), "sliding_window": WINDOW}, False),
    "gemma2": ("Gemma2Model", lambda shape: {**_decoder(shape), "sliding_window": WINDOW, "pad_token_id": 0}, False),
    "t5": ("T5EncoderModel", _t5, True),
}
MODEL_SCENARIOS = tuple(MODELS)


@dataclass
class ModelInputs(ModuleInputs):
    """x (B, S, E), embeddings; the model with its eager attention holds the weights."""

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        mask = None if self.padding is None else (~self.padding).long()
        return module(inputs_embeds=x, attention_mask=mask).last_hidden_state

    def leaves(self, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        unused = ("embed", "shared", "pooler")  # tables of tokens, and a layer that no output comes from
        return {"x": x, **{n: p for n, p in module.named_parameters() if not any(word in n for word in unused)}}

    @property
    def is_encoder(self) -> bool:  # what stands at padded positions is nobody's business
        return True


def make_model_inputs(case: Case, device: torch.device | str, seed: int = 0) -> ModelInputs:
    """Random embeddings and weights; the first sequence of a padded batch is never padded."""
    import transformers

    name, configuration, padded = MODELS[case.scenario]
    shape, cls = case.shape, getattr(transformers, name)
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.query_length, shape.heads * shape.head_dim)
    x, grad_out = (torch.randn(size, generator=generator).to(device, case.dtype) for _ in range(2))
    padding = draw_padding(shape, generator).to(device) if padded else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(cls.config_class(**configuration(shape)), attn_implementation="eager")
    inputs = ModelInputs(case, x.requires_grad_(), padding, model.to(device, case.dtype), grad_out)
    inputs.grad_out = inputs.real(grad_out)
    return inputs


def prepare_model(peer: str, inputs: ModelInputs) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """A closure for one call, and the leaves it is differentiated by."""
    if peer not in FUNCTIONS:
        raise ValueError(f"{peer!r} is not an attention function of transformers")
    model = copy.deepcopy(inputs.stock)
    if peer == "fastattn-hf":
        huggingface.use(model)  # type: ignore[arg-type]
    else:
        model.set_attn_implementation(FUNCTIONS[peer])  # type: ignore[operator]

    def forward() -> Tensor:
        model.train(torch.is_grad_enabled())
        return inputs.call(model, inputs.x)

    return forward, inputs.leaves(model, inputs.x)


def model_flops(inputs: ModelInputs, direction: str) -> float:
    """2 for each weight of a linear layer and token, and 4·B·S²·E for the attention of a layer, whatever the masks
    hide; backward twice the former, 2.5 times the latter."""
    if direction == "both":
        return model_flops(inputs, "forward") + model_flops(inputs, "backward")
    batch, length, width = inputs.x.shape
    weights = sum(layer.weight.numel() for layer in inputs.stock.modules() if isinstance(layer, nn.Linear))
    products, scores = 2.0 * batch * length * weights, 4.0 * LAYERS * batch * length**2 * width
    return products + scores if direction == "forward" else 2.0 * products + 2.5 * scores
