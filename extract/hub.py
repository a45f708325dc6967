"""The hub: a repository of Hugging Face's, to a folder on this machine.

It is looked for in the cache first, so that an extraction works offline once the weights are there.
A revision that is pinned is the only one that is taken.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ctfm.extract.weight_files import tower_files, tower_shards, weight_files
from ctfm.store.errors import BackboneError

WANTED = ("*.safetensors", "*.json")
"""What is needed of a repository, unless a backbone says otherwise."""


def hub_folder(
    hub_id: str,
    *,
    revision: str | None,
    gated: bool,
    files: Sequence[str] = WANTED,
    tower: re.Pattern[str] | None = None,
    download: bool = True,
) -> Path:
    """The folder of a hub repository's weights and JSON files, from the cache or the hub.

    Args:
        hub_id: `organisation/name`.
        revision: Commit, tag or branch; None takes what the cache has, else the main branch.
        gated: Whether access has to be asked for; decides the advice of the message.
        files: Patterns of what is needed of it.
        tower: Matches the tensors that are needed; shards without any are not fetched.
        download: Whether the network may be used.

    Raises:
        BackboneError: If it is neither cached nor to be had; the message says how to get it.
    """
    cached = cached_folder(hub_id, revision=revision, files=files, tower=tower)
    if cached is not None:
        return cached
    if not download:
        raise BackboneError(
            f"the weights of {hub_id}{_at(revision)} are not in the hub cache, and nothing was "
            f"fetched: it is what you opened that names https://huggingface.co/{hub_id}. If you "
            "trust that, pass --allow-download; or pass --weights"
        )
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        return _download(hub_id, revision=revision, files=files, tower=tower)
    except GatedRepoError as error:
        raise BackboneError(
            f"the hub refused the weights of {hub_id}: {_access(hub_id)}"
        ) from error
    except (OSError, HFValidationError) as error:
        advice = f"{_access(hub_id)}. Without network" if gated else "without network"
        raise BackboneError(
            f"the weights of {hub_id}{_at(revision)} are not in the hub cache and could not be "
            f"downloaded ({type(error).__name__}): {advice}, download them elsewhere and pass "
            f"`--weights FOLDER`{_other_revision(hub_id, files, tower)}"
        ) from error


def _download(
    hub_id: str,
    *,
    revision: str | None,
    files: Sequence[str],
    tower: re.Pattern[str] | None,
) -> Path:
    from huggingface_hub import snapshot_download

    if tower is not None:
        about = snapshot_download(hub_id, revision=revision, allow_patterns=["*.json"])
        shards = tower_shards(Path(about), tower)
        files = files if shards is None else ("*.json", *sorted(shards))
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*files]))


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision}"


def _other_revision(hub_id: str, files: Sequence[str], tower: re.Pattern[str] | None) -> str:
    other = cached_folder(hub_id, revision=None, files=files, tower=tower)
    return "" if other is None else f". The cache holds another revision: {other}"


def cached_folder(
    hub_id: str,
    *,
    revision: str | None,
    files: Sequence[str] = WANTED,
    tower: re.Pattern[str] | None = None,
) -> Path | None:
    """The folder of a hub repository in the local cache if its weights are whole, else None.

    Never uses the network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=[*files], local_files_only=True
            )
        )
        if tower is not None:
            tower_files(folder, tower)
        elif tuple(files) == WANTED:
            weight_files(folder)
        elif not all(any(folder.glob(pattern)) for pattern in files):
            return None
    except (OSError, HFValidationError, BackboneError):
        return None
    return folder


def _access(hub_id: str) -> str:
    return (
        f"accept the licence at https://huggingface.co/{hub_id}, then log in with "
        "`hf auth login` or set HF_TOKEN"
    )
