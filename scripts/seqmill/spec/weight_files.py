"""The files in a Hugging Face folder from which a model's weights are read."""

from pathlib import Path

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"  # the format in which DNABERT-S is published


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which a folder's weights are read, an index before its files; empty if there are none.

    The choice is that of transformers: model.safetensors, else the safetensors index and its files, else
    pytorch_model.bin. Raise a SeqmillError if the index can't be read, or names a missing file.
    """
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    index = folder / SAFETENSORS_INDEX
    if not index.is_file():
        return [folder / PICKLED_WEIGHTS] if (folder / PICKLED_WEIGHTS).is_file() else []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise SeqmillError(f"{index}: damaged, or not an index of safetensors: it has no weight_map")
    for key, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SeqmillError(f"{index}: damaged: its weight_map has {shard!r} for {key}, not the name of a file")
    names = sorted(set(shards.values()))
    for name in names:
        if not (folder / name).is_file():
            raise SeqmillError(f"{folder / name}: no such file, but {index} names it; copy it there")
    return [index, *(folder / name for name in names)]
