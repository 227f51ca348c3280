"""Fetches models that others have published on the Hugging Face Hub, with huggingface_hub. Imports no torch."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from seqmill.errors import SeqmillError
from seqmill.fetch.download import is_trouble, trouble_of
from seqmill.fetch.retry import Patience, Transient, seconds_asked
from seqmill.spec.models import CONFIG, TOKENIZER, family_of_config
from seqmill.spec.weight_files import SAFETENSORS_INDEX, weight_files

SMALL_FILES = [CONFIG, TOKENIZER]
WEIGHTS = ["*.safetensors", SAFETENSORS_INDEX]
IN_FOLDERS = "*/*"  # seqmill reads no file of a subfolder


def fetch_hub_folder(name: str) -> Path:
    """Return the folder of a model in the Hub's cache; fetch it, or what has changed, if the Hub can be reached.

    It holds config.json, tokenizer.json if there is one, and safetensors with their index. Pickles are not fetched.

    Raises:
        SeqmillError: no such model, no access to it, no network, or no model that seqmill can read.
    """
    patience = Patience()
    folder = _fetch(name, SMALL_FILES, patience)
    try:
        family_of_config(folder)  # before gigabytes of another kind of model
        folder = _fetch(name, SMALL_FILES + WEIGHTS, patience)
        if not weight_files(folder):
            raise SeqmillError("it has no .safetensors files, and seqmill fetches no pickled weights")
    except SeqmillError as error:
        raise SeqmillError(f"model {name} of the Hugging Face Hub: {error}") from error
    return folder


def _fetch(name: str, files: list[str], patience: Patience) -> Path:
    where = f"model {name}: "
    try:
        while True:
            with _quiet():
                try:
                    return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=IN_FOLDERS))
                except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError) as error:
                    is_local = isinstance(error, LocalEntryNotFoundError) and error.__cause__
                    trouble = _trouble_of(error.__cause__ if is_local else error)
                    if not trouble or not patience.wait(f"model {name} of the Hugging Face Hub", trouble):
                        raise
    except GatedRepoError as error:
        raise SeqmillError(
            f"{where}its owner asks for consent: agree on https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise SeqmillError(
            f"{where}neither a folder here nor a public model on the Hugging Face Hub; check the name, or run "
            "`hf auth login` if the model is private"
        ) from error
    except HFValidationError as error:
        raise SeqmillError(f"{where}{str(error).partition(chr(10))[0]}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError) as error:
        cause = error.__cause__ or error
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        raise SeqmillError(
            f"{where}cannot be fetched from the Hugging Face Hub: {reason}. Fetch it where there is internet, and give "
            "its folder"
        ) from error


def _trouble_of(error: BaseException | None) -> Transient | None:
    """Return an error as a Transient if it may pass."""
    if isinstance(error, HfHubHTTPError) and is_trouble(error.response.status_code):
        reason = f"the server answers {error.response.status_code} {error.response.reason_phrase}"
        return Transient(reason, asked=seconds_asked(error.response.headers))
    found = trouble_of(error) if isinstance(error, httpx2.TransportError) else None
    return found if isinstance(found, Transient) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the libraries tell about each request; show progress bars on a terminal only."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    verbosity, hide_bars = get_verbosity(), not (sys.stderr.isatty() or are_progress_bars_disabled())
    set_verbosity_error()
    if hide_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if hide_bars:
            enable_progress_bars()
