"""Seeded weights of a model in the formats that the contenders read."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import EsmConfig, EsmForMaskedLM

import dnabert_reference
import esmc_reference
import t5_reference
from reference import fair_esm_model, save_checkpoint
from seqmill.model.esm2 import parameter_shapes
from seqmill.model.esm2_weights import FAIR_ESM, HUGGING_FACE
from seqmill.spec.architectures import Architecture, Esm2Architecture
from seqmill.spec.families import DNABERT_S, ESM2, ESMC


def save_weights(model: str, architecture: Architecture, folder: Path) -> None:
    """Save the same weights as MODEL.pt, hugging_face/, and esm_cpp.safetensors.

    Those of DNABERT-S as dnabert/, those of ESM C and T5 as hugging_face/ only.
    """
    if architecture.family == DNABERT_S:
        state = dnabert_reference.seeded_state(architecture)
        dnabert_reference.save_folder(state, architecture, folder / "dnabert")
        return
    if architecture.family != ESM2:
        reference = esmc_reference if architecture.family == ESMC else t5_reference
        reference.save_folder(folder / "hugging_face", architecture)
        return
    reference = fair_esm_model(architecture)
    save_checkpoint(reference, folder / f"{model}.pt")
    source = reference.state_dict()
    tensors = {
        f"esm.{other}": source[one]
        for parameter in parameter_shapes(architecture)
        for one, other in zip(FAIR_ESM.names_of(parameter), HUGGING_FACE.names_of(parameter), strict=True)
    }
    _save_for_transformers(architecture, tensors, folder / "hugging_face")
    # esm.cpp also wants the rotary frequencies and the language-model head, by the names of transformers 4.
    for layer in range(architecture.num_layers):
        name = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        tensors[name] = source[f"layers.{layer}.self_attn.rot_emb.inv_freq"]
    for name in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "bias"):
        tensors[f"lm_head.{name}"] = source[f"lm_head.{name}"]
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "esm_cpp.safetensors", metadata={"format": "pt"})


def _save_for_transformers(architecture: Esm2Architecture, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    config = EsmConfig(
        vocab_size=33,
        hidden_size=architecture.hidden_dim,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        intermediate_size=architecture.ffn_dim,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        mask_token_id=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    target = EsmForMaskedLM(config)
    target.load_state_dict({**target.state_dict(), **tensors})
    target.save_pretrained(folder)
