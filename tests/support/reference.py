"""The reference: fair-esm 2.0.0 on seeded weights, one unpadded sequence at a time; and our error against it."""

import argparse
from pathlib import Path

import esm
import numpy as np
import torch

from seqmill.embedding.pooling import mean_over_residues
from seqmill.index.letters import ESM2_ALPHABET, ProteinLetters
from seqmill.model.elementwise import EAGER
from seqmill.model.encoder import pack_weights
from seqmill.model.esm2 import ESM2
from seqmill.model.pack import Pack
from seqmill.model.weights import load_weights
from seqmill.spec.architectures import Esm2Architecture
from seqmill.spec.models import find_model
from sequences import random_sequences, relative_error

ALPHABET = esm.data.Alphabet.from_architecture("ESM-1b")
# Hidden dimensions that `plant_outliers` makes large, and their values in the last layer.
OUTLIERS = {3: 1000.0, 77: -2000.0, 150: 4000.0, 201: -8000.0}


def fair_esm_model(architecture: Esm2Architecture, seed: int = 7) -> esm.ESM2:
    """Return a fair-esm model with seeded, nontrivial weights (no zero bias, no unit norm)."""
    torch.manual_seed(seed)
    model = esm.ESM2(
        num_layers=architecture.num_layers,
        embed_dim=architecture.hidden_dim,
        attention_heads=architecture.num_heads,
        alphabet=ALPHABET,
        token_dropout=architecture.token_dropout,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "embed_tokens" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


@torch.no_grad()
def plant_outliers(model: esm.ESM2) -> esm.ESM2:
    """Make the `OUTLIERS` channels of the residual stream grow from the second block on; changes the model.

    Trained transformers have such channels (Dettmers et al. 2022, arXiv:2208.07339; Sun et al. 2024,
    arXiv:2402.17762), and layer norms that compensate for them. Here every fc2 from the second block on
    adds an equal share, 5 % of which varies with the token. As training would, each later layer norm
    shrinks the outliers to about 1 and restores the spread and the center of the other channels, so
    that these still decide the output.
    """
    channels, reached = list(OUTLIERS), torch.tensor(list(OUTLIERS.values()))
    others = torch.ones(model.embed_dim, dtype=torch.bool)
    others[channels] = False
    share = reached / (model.num_layers - 1)
    for layer in model.layers[1:]:
        # With seeded weights, the values from fc2 have a spread of about 0.6.
        layer.fc2.weight[channels] *= (0.05 * share.abs() / 0.6)[:, None]
        layer.fc2.bias[channels] += share

    def make_up_for_outliers(norm: torch.nn.LayerNorm, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].flatten(0, -2)
        normalized = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
        norm.weight[others] /= normalized[:, others].std(dim=1).mean()
        norm.bias[others] -= norm.weight[others] * normalized[:, others].mean()
        norm.weight[channels] /= normalized[:, channels].pow(2).mean(dim=0).sqrt().clamp(min=1)

    norms = [norm for layer in model.layers for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)]
    hooks = [norm.register_forward_pre_hook(make_up_for_outliers) for norm in [*norms, model.emb_layer_norm_after]]
    fair_esm_hidden(model, random_sequences([500], seed=1)[0])
    for hook in hooks:
        hook.remove()
    return model


def save_checkpoint(model: esm.ESM2, path: Path) -> Path:
    """Save a model like fair-esm's released .pt files: prefixed keys, the shape in a Namespace."""
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = "encoder." if name.startswith(("lm_head", "contact_head")) else "encoder.sentence_encoder."
        state[prefix + name] = tensor
    namespace = argparse.Namespace(
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
    )
    torch.save({"cfg": {"model": namespace}, "model": state}, path)
    return path


@torch.no_grad()
def fair_esm_hidden(model: esm.ESM2, sequence: str) -> np.ndarray:
    """Return the last layer's hidden states, cls and eos included: (length + 2, hidden_dim)."""
    tokens = torch.tensor([[ALPHABET.cls_idx, *ALPHABET.encode(sequence), ALPHABET.eos_idx]])
    result = model(tokens, repr_layers=[model.num_layers])
    return result["representations"][model.num_layers][0].numpy()


def one_pack(sequences: list[str]) -> Pack:
    """Return the sequences, with cls and eos, as one pack in the given order."""
    before, after = ESM2_ALPHABET.before, ESM2_ALPHABET.after
    tokens = [before + ProteinLetters().tokens(sequence.encode()) + after for sequence in sequences]
    lengths = np.array([len(t) for t in tokens], np.int64)
    return Pack.from_tokens(np.frombuffer(b"".join(tokens), np.uint8), lengths)


def packed_hidden_and_means(checkpoint: Path, sequences: list[str], dtype: torch.dtype, attention: str):
    weights = load_weights(find_model(str(checkpoint)))
    # With PyTorch's attention, all else is PyTorch's too; one of our kernels does its elementwise steps as well.
    elementwise = EAGER if attention == "sdpa" else attention
    model = ESM2(weights.architecture, weights.tensors, dtype, max(map(len, sequences)) + 2, attention, elementwise)
    if attention != "sdpa":
        pack_weights(model)
    pack = one_pack(sequences)
    hidden = model(pack)
    per_sequence = np.split(hidden.numpy(), np.cumsum(pack.lengths)[:-1])
    return per_sequence, mean_over_residues(hidden, pack).numpy()


def worst_errors(
    reference: list[np.ndarray], checkpoint: Path, sequences: list[str], dtype: torch.dtype, attention: str = "sdpa"
):
    """Return the worst relative error per token matrix and per mean, and the worst cosine of the means.

    `reference` are the hidden states of each sequence, see `fair_esm_hidden`.
    """
    hidden, means = packed_hidden_and_means(checkpoint, sequences, dtype, attention)
    hidden_errors, mean_errors, cosines = [], [], []
    for expected, found, mean in zip(reference, hidden, means, strict=True):
        expected_mean = expected[1:-1].mean(axis=0)
        hidden_errors.append(relative_error(found, expected))
        mean_errors.append(relative_error(mean, expected_mean))
        cosines.append(mean @ expected_mean / np.linalg.norm(mean) / np.linalg.norm(expected_mean))
    return max(hidden_errors), max(mean_errors), min(cosines)
