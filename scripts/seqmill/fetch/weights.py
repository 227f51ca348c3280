"""Fetches released weights: checks digests, tests what the model computes, then renames the files and records them."""

import logging
import os
import shutil
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import WeakFileLock
from msgspec.structs import replace

from seqmill.base.commands import command
from seqmill.base.files import fsync, sha256_of_file, write_json
from seqmill.base.imports import importing_much
from seqmill.errors import SeqmillError
from seqmill.fetch.download import Pace, Unreachable, download, stated_on_hub
from seqmill.model.weights_record import record_path
from seqmill.spec.models import CONFIG, MODELS, ModelSource, released_at
from seqmill.spec.released import RELEASED, FileFact, Release, WeightsSource, release_of, why_not_as_published
from seqmill.version import __version__

URL_VARIABLE = "SEQMILL_WEIGHTS_URL"  # a mirror, for sites without internet

log = logging.getLogger(__name__)


def fetch_weights(name: str, output: Path, facts: Path = RELEASED, pace: Pace | None = None) -> None:
    """Fetch a released model's weights unless they exist: ESM-2's file, or another model's folder of files.

    OUTPUT.part keeps what was received, and the next call continues it. Before it is renamed, its files must have the
    published digests (or, where there are none, those that Hugging Face states for the pinned commit), and the model
    must compute the published numbers (`fetch.self_test`). A record of it is written to the same folder
    (`model.weights_record`).

    Args:
        output: the .pt file to write, or the folder for the files.
        facts: the JSON file of released models.

    Raises:
        SeqmillError: unknown name, no network, not on the server, or not what was published.
    """
    release = release_of(name, facts)
    part = output.with_name(output.name + ".part")
    output.parent.mkdir(parents=True, exist_ok=True)
    is_folder = released_at(name, output).is_folder
    fetch = _fetch_folder if is_folder else _fetch_file
    with WeakFileLock(output.with_name(f".{output.name}.lock")):
        if all(path.exists() for path in ([output / file for file in release.files] if is_folder else [output])):
            log.info("%s is there already", output)
            return
        sources, pace = release.sources, pace or Pace()  # the sources share its patience
        if (mirror := os.environ.get(URL_VARIABLE)) is not None:
            sources = [replace(sources[0], url=mirror.rstrip("/"), repository=None)]
        for following, source in zip([*sources[1:], None], sources, strict=True):
            try:
                fetch(name, release, source, part, output, pace)
                return
            except Unreachable as error:
                if following is None:
                    again = command("fetch", name, "--output", str(output.absolute()))
                    raise Unreachable(
                        f"{error}. Run `{again}` where there is internet, and copy the result if that is another disk; "
                        f"or set {URL_VARIABLE} to a mirror"
                    ) from error
                log.warning("%s; trying %s", error, following.name)


def _fetch_file(name: str, release: Release, source: WeightsSource, part: Path, output: Path, pace: Pace) -> None:
    """Fetch ESM-2's .pt, or a folder of safetensors that is converted to it."""
    if source.repository is None:
        ((file, fact),) = source.files.items()
        _receive(name, source, file, fact, part, pace)
    else:
        folder = output.with_name(f"{output.name}.folder.part")
        part = output.with_name(f"{output.name}.converted.part")  # the other .part keeps what was received of the .pt
        _receive_folder(name, source, folder, pace)
        _convert(ModelSource(name, "folder", MODELS[name], folder), part)
        shutil.rmtree(folder)
    _test_and_record(released_at(name, part), release, source, {output.name: part})
    _move(part, output)


def _convert(folder: ModelSource, part: Path) -> None:
    with importing_much():
        from seqmill.model.esm2_weights import save_checkpoint
        from seqmill.model.weights import open_weights
    from seqmill.spec.architectures import Esm2Architecture

    architecture, parts = open_weights(folder)
    assert isinstance(architecture, Esm2Architecture)
    save_checkpoint(architecture, parts, part)


def _fetch_folder(name: str, release: Release, source: WeightsSource, part: Path, output: Path, pace: Pace) -> None:
    """Fetch the files that `output` lacks into the folder `part`."""
    source = _with_digests(name, source, pace)
    present = [file for file in source.files if (output / file).exists()]
    part.mkdir(exist_ok=True)
    for file in present:
        if wrong := why_not_as_published(output / file, source.files[file]):
            raise SeqmillError(f"{output / file}: not that of {name} as published: {wrong}; remove it and fetch it")
        (part / file).unlink(missing_ok=True)
        (part / file).symlink_to((output / file).resolve())  # the test needs a whole model
    _receive_folder(name, source, part, pace)
    _test_and_record(released_at(name, part), release, source, {file: part / file for file in source.files})
    output.mkdir(exist_ok=True)
    for file in source.files:  # an index of weights is the last one: it must not name missing files
        if file not in present:
            _move(part / file, output / file)
    shutil.rmtree(part)


def _with_digests(name: str, source: WeightsSource, pace: Pace) -> WeightsSource:
    """Return a source with the digests that Hugging Face states at its commit where no public page states them.

    Raise a SeqmillError if the source is a mirror, which nobody could check.
    """
    files = dict(source.files)
    for file in [file for file, fact in files.items() if not fact.is_pinned]:
        if source.repository is None:
            if file == CONFIG:
                continue  # all that is read from it must fit the model's known architecture
            raise SeqmillError(
                f"no public page states the digest of {name}'s {file}, so that of a mirror can't be checked: unset "
                f"{URL_VARIABLE} to fetch it from Hugging Face, or copy the folder {name} from where that is possible"
            )
        url = hf_hub_url(source.repository, file, revision=source.commit)
        size, digest = stated_on_hub(url, pace)
        kind = {64: "sha256", 40: "git_sha1"}.get(len(digest))
        if kind is None:
            raise SeqmillError(f"{url}: the server states no digest of this file, so it was not fetched")
        log.info("%s of %s at its pinned commit, as the server states: %s", kind, file, digest)
        files[file] = FileFact(size, **{kind: digest})
    return replace(source, files=files)


def _receive_folder(name: str, source: WeightsSource, folder: Path, pace: Pace) -> None:
    folder.mkdir(exist_ok=True)
    for file, fact in source.files.items():
        if not (folder / file).exists():
            part = folder / f"{file}.part"
            _receive(name, source, file, fact, part, pace)
            part.replace(folder / file)


def _receive(name: str, source: WeightsSource, file: str, fact: FileFact, part: Path, pace: Pace) -> None:
    """Download a file; remove it and raise a SeqmillError if it is not the published one."""
    if source.repository is not None:
        url = hf_hub_url(source.repository, file, revision=source.commit)
    else:
        is_folder = len(source.files) > 1
        url = f"{source.url}/{name}/{file}" if is_folder else f"{source.url}/{file}"
    log.info("fetching %s", url)
    download(url, part, fact.size, pace)
    if wrong := why_not_as_published(part, fact):
        part.unlink()
        raise SeqmillError(f"{url}: what was fetched is not {file} of {name} as published and was removed: {wrong}")


def _test_and_record(model: ModelSource, release: Release, source: WeightsSource, files: dict[str, Path]) -> None:
    """Test a fetched model and record its files by their final names; remove it if it is not the released one."""
    with importing_much():
        from seqmill.fetch.self_test import self_test
        from seqmill.index.bpe import BpeTokenizer
        from seqmill.model.weights import load_weights

    assert model.path is not None
    try:
        weights = load_weights(model)
        if model.tokenizer:
            BpeTokenizer.from_file(model.tokenizer, weights.architecture.vocabulary)
        tested = self_test(model, weights, release.published)
    except SeqmillError as error:  # a download can't continue from a bad file
        if model.path.is_dir():
            shutil.rmtree(model.path)
        else:
            model.path.unlink()
        raise SeqmillError(f"what was fetched is not {model.name} and was removed: {error}") from error
    log.info("%s: %s", model.name, tested)
    facts = {name: {"size": path.stat().st_size, "sha256": sha256_of_file(path)} for name, path in files.items()}
    record = {"model": model.name, "source": source.name, "digest": weights.digest, "self_test": tested}
    write_json(record_path(model), {**record, "seqmill": __version__, "files": facts})


def _move(part: Path, output: Path) -> None:
    fsync(part)
    part.replace(output)
    fsync(output.parent)
    log.info("%s: %d bytes, as published", output, output.stat().st_size)
