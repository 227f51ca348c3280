"""transformers' ESM-2 with the weights of a fair-esm model."""

import re
from typing import Any

import esm
from transformers import EsmConfig, EsmForMaskedLM, EsmModel

from reference import ALPHABET

# fair-esm's layer names, and those of transformers.
HUGGING_FACE_PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}


def hugging_face_name(name: str) -> str:
    if name == "embed_tokens.weight":
        return "embeddings.word_embeddings.weight"
    if name.startswith("emb_layer_norm_after."):
        return "encoder." + name
    _, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"encoder.layer.{layer}.{HUGGING_FACE_PARTS[part]}.{kind}"


def hugging_face_model(model: esm.ESM2, cls: type[EsmModel] | type[EsmForMaskedLM] = EsmModel) -> Any:
    """Return transformers' model with the weights of a fair-esm model."""
    config = EsmConfig(
        vocab_size=len(ALPHABET),
        pad_token_id=ALPHABET.padding_idx,
        mask_token_id=ALPHABET.mask_idx,
        num_hidden_layers=model.num_layers,
        hidden_size=model.embed_dim,
        num_attention_heads=model.attention_heads,
        intermediate_size=4 * model.embed_dim,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        token_dropout=model.token_dropout,
        emb_layer_norm_before=False,
    )
    found = cls(config)
    encoder = found if cls is EsmModel else found.esm
    outside = re.compile(r"^(lm_head|contact_head)\.|inv_freq$")
    state = {hugging_face_name(name): tensor for name, tensor in model.state_dict().items() if not outside.search(name)}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(re.match(r"pooler\.|contact_head\.|embeddings\.position_|rotary_embeddings\.", name) for name in missing)
    return found.eval()
