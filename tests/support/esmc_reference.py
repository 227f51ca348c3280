"""ESM C by transformers' `EsmcModel` on seeded weights, one unpadded sequence at a time.

`GOLDEN` holds numbers computed by the esm package, which can't share an environment with fair-esm. To compute them
again, with Python 3.12, esm 3.4.1.post1, and this folder and `scripts` on the PYTHONPATH:

1. Create `EsmcModel(EsmcConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=3))` of `esm.models.esmc`, and
   call `load_state_dict(published_to_native(seeded_state()))` (`esm.models.esmc.checkpoint_layout`), which is strict,
   and then `.double().eval()`.
2. Or execute the file `esm/models/esmc.py`, which the folder of that name hides and which has the code of the first
   releases; create `ESMC(128, 2, 3, EsmSequenceTokenizer(), use_flash_attn=False)` (`esm.tokenization`), and load
   `older_layout(seeded_state())`, without the head. Both give the same bits.
3. Run each of `random_tokens(GOLDEN_LENGTHS)` by itself.
4. A sequence's row has the first three values and the norm of its mean over the residues, and the last three values of
   its last token, in `last_hidden_state` (1) or `embeddings` (2).
5. `GOLDEN_BLOCKS` has, for the second sequence, the norms of the means of each of (2)'s `hidden_states`, and of its
   `embeddings`.

Made with torch 2.13.0 (CPU), transformers 5.23.0, and NumPy 2.5.5.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import EsmcConfig, EsmcModel

from seqmill.spec.architectures import EsmcArchitecture

SMALL = EsmcArchitecture(num_layers=3, hidden_dim=128, num_heads=2)
CLS, EOS, LETTERS = 0, 2, dict(zip("LAGVSERTIDPKQNFYMHWCXBUZO", range(4, 29), strict=True))  # as in ESM-2
GOLDEN_LENGTHS = [700, 64, 64, 3, 1]  # residues
GOLDEN = [
    (
        [-1.342048683019818, -0.8740420365837441, 0.5408815683759328],
        8.155512742997827,
        [-0.6009907512488252, 0.29373188464390226, -1.622552072088386],
    ),
    (
        [-0.6356009983812108, -0.5573840865513658, 0.19616267427414052],
        8.687731136274309,
        [-1.004675003097279, 0.030266419027226026, -0.28919846296933593],
    ),
    (
        [-0.41038663834398315, -0.6512484060395862, 0.7032329369107095],
        7.894131059010252,
        [-1.347631808321898, -0.23277764114364616, -0.793386558599933],
    ),
    (
        [0.19941566005610492, -0.3715367730426318, -1.036566151529863],
        9.122970339343773,
        [-1.6383918369430956, -0.7168650134161363, 0.8580549249114165],
    ),
    (
        [-1.7373895656641987, -0.6467549895219737, -0.611851494098517],
        11.300760377742671,
        [-1.3798469022545439, 0.2801241492034808, 1.3387486622002294],
    ),
]
GOLDEN_BLOCKS = [15.121050944618897, 30.853632343518267, 44.73753299864196], 8.687731136274309

State = dict[str, torch.Tensor]


def shapes(architecture: EsmcArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by transformers' names, which the published safetensors have too."""
    d, ffn = architecture.hidden_dim, architecture.ffn_dim
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (architecture.vocabulary, d), "norm.weight": (d,)}
    for number in range(architecture.num_layers):
        layer = f"layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = found[f"{layer}{name}.bias"] = (d,)
        for name in ("q_norm", "k_norm"):
            found[f"{layer}self_attn.{name}.weight"] = (d,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{layer}self_attn.{name}.weight"] = (d, d)
        for name in ("gate_proj", "up_proj"):
            found[f"{layer}mlp.{name}.weight"] = (ffn, d)
        found[f"{layer}mlp.down_proj.weight"] = (d, ffn)
    return found


def seeded_state(architecture: EsmcArchitecture = SMALL, seed: int = 7) -> State:
    """Return nontrivial float32 weights (no zero bias, no unit norm); NumPy's PCG64 gives the same ones everywhere."""
    state = {}
    for name, shape in shapes(architecture).items():
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = np.float32(0.1) * values + np.float32(name.endswith("norm.weight"))
        elif name != "embed_tokens.weight":
            values *= np.float32(shape[1] ** -0.5)
        state[name] = torch.from_numpy(values)
    return state


def seeded_model(architecture: EsmcArchitecture = SMALL, state: State | None = None) -> EsmcModel:
    """Return transformers' model with `seeded_state`, or with another state."""
    config = EsmcConfig(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.hidden_dim,
        intermediate_size=architecture.ffn_dim,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
    )
    model = EsmcModel(config)
    model.load_state_dict(seeded_state(architecture) if state is None else state, assign=True)
    return model.eval()


def save_folder(
    folder: Path, architecture: EsmcArchitecture = SMALL, state: State | None = None, shard: str = "50GB"
) -> Path:
    """Save a folder of safetensors as transformers does, in files of up to `shard`."""
    seeded_model(architecture, state).save_pretrained(folder, max_shard_size=shard)
    return folder


def older_layout(state: State) -> State:
    """Return the tensors by the names of the esm package's first releases, without their head."""
    renamed = {"embed.weight": state["embed_tokens.weight"], "transformer.norm.weight": state["norm.weight"]}
    joined = {
        "attn.layernorm_qkv.0.weight": ["input_layernorm.weight"],
        "attn.layernorm_qkv.0.bias": ["input_layernorm.bias"],
        "attn.layernorm_qkv.1.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
        "attn.q_ln.weight": ["self_attn.q_norm.weight"],
        "attn.k_ln.weight": ["self_attn.k_norm.weight"],
        "attn.out_proj.weight": ["self_attn.o_proj.weight"],
        "ffn.0.weight": ["post_attention_layernorm.weight"],
        "ffn.0.bias": ["post_attention_layernorm.bias"],
        "ffn.1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "ffn.3.weight": ["mlp.down_proj.weight"],
    }
    for number in {name.split(".")[1] for name in state if name.startswith("layers.")}:
        for new, old in joined.items():
            parts = [state[f"layers.{number}.{name}"] for name in old]
            renamed[f"transformer.blocks.{number}.{new}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return renamed


def random_tokens(lengths: list[int], seed: int = 5) -> list[list[int]]:
    """Return seeded proteins of the given numbers of residues, all letters, as tokens with cls and eos."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return [[CLS, *generator.integers(4, 29, length).tolist(), EOS] for length in lengths]


def tokens_of(sequence: str) -> list[int]:
    """Return the tokens of a protein, with cls and eos."""
    return [CLS, *(LETTERS[letter] for letter in sequence), EOS]


@torch.no_grad()
def reference_hidden(model: EsmcModel, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the hidden states of each layer, (num_layers + 1, tokens, hidden_dim), the last after the final norm.

    The model keeps `dtype`; 16 bits change its weights.
    """
    found = model.to(dtype)(torch.tensor([tokens]), output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    return torch.cat(found.hidden_states)


def fused_layout(state: State) -> State:
    """Return the tensors by the names of the published folders of May 2026, with parts that no one reads.

    Their modules are Transformer Engine's: each has a state of no bytes, and those with a norm hold its tensors.
    """
    modules = {"attn.layernorm_qkv.1": "attn.layernorm_qkv", "attn.layernorm_qkv.0": "attn.layernorm_qkv.layer_norm"}
    modules |= {"ffn.0": "ffn.layer_norm", "ffn.1": "ffn.fc1", "ffn.3": "ffn.fc2"}
    found = {"lm_head.0.weight": torch.zeros(3, 3)}
    for name, tensor in older_layout(state).items():
        stem, kind = name.rsplit(".", 1)
        part = ".".join(stem.split(".")[3:])
        if part in modules:
            stem = stem.removesuffix(part) + modules[part]
        joint = "." if part in ("", "attn.layernorm_qkv.1") or part not in modules else "_"
        found[f"esmc.{stem}{joint}{kind}"] = tensor
    for number in {name.split(".")[3] for name in found if ".blocks." in name}:
        for module in ("attn.layernorm_qkv", "attn.out_proj", "ffn"):
            found[f"esmc.transformer.blocks.{number}.{module}._extra_state"] = torch.empty(0, dtype=torch.uint8)
    return found


def save_fused_folder(folder: Path, architecture: EsmcArchitecture = SMALL, state: State | None = None) -> Path:
    """Save a folder as those that `seqmill fetch` pins: `fused_layout`, and sizes by the names of that time."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(fused_layout(seeded_state(architecture) if state is None else state), folder / "model.safetensors")
    shape = {"d_model": architecture.hidden_dim, "n_heads": architecture.num_heads, "n_layers": architecture.num_layers}
    config = {
        "architectures": ["ESMCForMaskedLM"],
        "model_type": "esmc",
        "vocab_size": architecture.vocabulary,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
