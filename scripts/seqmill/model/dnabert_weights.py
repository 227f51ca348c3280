"""DNABERT-S's weights from a Hugging Face folder: safetensors, or the pickle in which it is published.

The names are those of the published code (MAGICS-LAB/DNABERT_S, `evaluate/model_codes/bert_layers.py`). Attention
biases are not stored.
"""

from pathlib import Path

from seqmill.model.dnabert_s import LAYER_NORM_EPS, parameter_shapes
from seqmill.model.tensor_files import Naming, Tensors, load_folder, read_architecture
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.models import CONFIG

NAMING = Naming(
    prefix=r"^bert\.",  # present if the file has a head on top of the encoder
    whole={
        "embed": "embeddings.word_embeddings",
        "token_type": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
    },
    layer="encoder.layer.{}.",
    parts={
        "qkv": ("attention.self.Wqkv",),
        "out": ("attention.output.dense",),
        "attention_norm": ("attention.output.LayerNorm",),
        "gated": ("mlp.gated_layers",),
        "down": ("mlp.wo",),
        "ffn_norm": ("mlp.layernorm",),
    },
    ignored=r"^(pooler|cls)\.|^embeddings\.(position|token_type)_ids$",
)


def open_folder(path: Path) -> tuple[DnabertArchitecture, Tensors]:
    """Open a Hugging Face folder; returns and raises as `seqmill.model.weights.open_weights`."""
    architecture = read_architecture(
        path / CONFIG,
        DnabertArchitecture,
        lambda config: {"vocabulary": config["vocab_size"], "token_types": config["type_vocab_size"]},
        {"layer_norm_eps": LAYER_NORM_EPS},
        "DNABERT-S",
    )
    state, file = load_folder(path, "weights of DNABERT-S")
    return architecture, NAMING.match(state, parameter_shapes(architecture), file, "DNABERT-S")
