"""ProtT5's and ProstT5's weights from a Hugging Face folder: safetensors, or a pickle; the decoder is left out."""

from pathlib import Path
from typing import Any

from seqmill.model.t5 import RMS_NORM_EPS, parameter_shapes
from seqmill.model.tensor_files import Naming, Tensors, load_folder, read_architecture
from seqmill.spec.architectures import T5Architecture
from seqmill.spec.models import CONFIG

NAMING = Naming(
    prefix=r"^transformer\.",
    whole={
        "embed": "shared",
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "final_norm": "encoder.final_layer_norm",
    },
    layer="encoder.block.{}.",
    parts={
        "attention_norm": ("layer.0.layer_norm",),
        "qkv": ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
        "out": ("layer.0.SelfAttention.o",),
        "ffn_norm": ("layer.1.layer_norm",),
        "up": ("layer.1.DenseReluDense.wi",),
        "down": ("layer.1.DenseReluDense.wo",),
    },
    ignored=r"^(decoder|lm_head)\.|^encoder\.embed_tokens\.weight$",
)
SIZES = ("num_layers", "d_model", "num_heads")
SETTINGS = {"feed_forward_proj": "relu", "is_gated_act": False, "layer_norm_epsilon": RMS_NORM_EPS}


def open_folder(path: Path) -> tuple[T5Architecture, Tensors]:
    """Open a Hugging Face folder; returns and raises as `seqmill.model.weights.open_weights`."""
    architecture = read_architecture(path / CONFIG, T5Architecture, _own_fields, SETTINGS, "T5", SIZES)
    state, file = load_folder(path, "weights of T5")
    tied = "encoder.embed_tokens.weight"  # to the decoder's; a file may have either name
    if "shared.weight" not in state and tied in state:
        state["shared.weight"] = state[tied]
    return architecture, NAMING.match(state, parameter_shapes(architecture), file, "T5")


def _own_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocabulary": config["vocab_size"],
        "key_dim": config["d_kv"],
        "feed_forward_dim": config["d_ff"],
        "buckets": config.get("relative_attention_num_buckets", 32),
        "max_distance": config.get("relative_attention_max_distance", 128),
    }
