"""Finds a model on this disk, or fetches it. Imports no torch unless a released model is fetched."""

from dataclasses import replace
from pathlib import Path

from seqmill.errors import SeqmillError
from seqmill.spec.models import WEIGHTS_VARIABLE, ModelSource, find_model, is_hub_id, user_weights_folder
from seqmill.spec.released import RELEASED


def fetch_model(name: str, facts: Path = RELEASED) -> ModelSource:
    """Return a model whose files are on this disk, after fetching them if they are not.

    Missing files of a released model go to the user's folder (`user_weights_folder`). A model of the Hugging Face Hub
    goes to the Hub's own cache; its source is a folder, with `name` as its name. The Hub is asked each time, because
    its owner may have changed it; without a network the cached files serve.

    Args:
        name: anything that `find_model` takes, or owner/name of a model on the Hugging Face Hub.
        facts: the JSON file of released models.

    Raises:
        SeqmillError: no such model, no network, or not the files that were published.
    """
    if is_hub_id(name):
        from seqmill.fetch.hub import fetch_hub_folder

        return replace(find_model(str(fetch_hub_folder(name))), name=name)
    source = find_model(name)
    if source.kind != "released" or source.is_on_disk:
        return source
    from seqmill.fetch.weights import fetch_weights

    assert source.path is not None
    path = _user_folder() / source.path.name
    fetch_weights(source.name, path, facts)
    return replace(source, path=path)


def _user_folder() -> Path:
    try:
        return user_weights_folder()
    except RuntimeError as error:
        raise SeqmillError(f"no folder for weights: {error}; set {WEIGHTS_VARIABLE} to a folder of yours") from error
