"""Landscapes on the Hugging Face Hub: finding and uploading, with one sentence instead of a traceback."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx or httpx2, as its version has it
    GatedRepoError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from elsteer.errors import LandscapeError
from elsteer.files import expanded
from elsteer.landscape_files import FILES
from elsteer.models.hub import hub_problem

__all__ = ["find", "upload"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = (HTTPError, OSError, ValueError)  # what the hub's client raises


def find(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local folder `path_or_id`, or the downloaded files of the hub's landscape of that id. Raises LandscapeError."""
    path, name = expanded(path_or_id), str(path_or_id)
    if path.is_file():
        raise LandscapeError(f"{name} is a file: give the folder of a landscape, or its hub id.")
    if path.is_dir() or path.with_name(f".{path.name}.old").is_dir():  # the latter: see landscape_files
        if revision is not None:
            raise LandscapeError(f"{name} is a folder here, which has no revisions: leave out the revision.")
        return path
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(name):
        raise LandscapeError(
            f"There is no landscape at {name}: give a folder that `elsteer fit` wrote, or a hub id owner/name."
        )
    problem = hub_problem()
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(FILES),
            token=token,
            cache_dir=cache_dir,
            endpoint=constants.ENDPOINT,
            local_files_only=problem is not None,
        )
    except _EXPECTED as error:
        raise LandscapeError(f"There is no folder {name}, and {_missing(error, problem, revision)}.") from error
    return Path(str(found))


def _missing(error: Exception, problem: str | None, revision: str | None) -> str:
    hub = f"the hub at {constants.ENDPOINT}"
    if problem is not None:
        return f"{hub} {problem}; it was not downloaded before either: check the name or the connection"
    if isinstance(error, GatedRepoError):
        return f"{hub} asks for permission for it: request it on its page and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} has none of that name that you may see: check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} has it without a revision {revision}: check the revision"
    return f"{hub} could not give it ({_first_line(error)}): try again later"


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, message: str) -> str:
    """Upload the landscape in `folder`, making the repository if it is not there; its address. Raises LandscapeError."""
    if not _HUB_ID.fullmatch(repo_id):
        raise LandscapeError(f"'{repo_id}' is no hub id of the form owner/name.")
    hub = f"the hub at {constants.ENDPOINT}"
    if (problem := hub_problem()) is not None:
        raise LandscapeError(f"{repo_id} was not uploaded, {hub} {problem}: try again when it is there.")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, allow_patterns=list(FILES))
    except LocalTokenNotFoundError as error:
        raise LandscapeError(f"{repo_id} was not uploaded, no token is there: log in with `hf auth login`.") from error
    except _EXPECTED as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise LandscapeError(
                f"{repo_id} was not uploaded, {hub} does not allow it with this token: log in with `hf auth login` as someone "
                "who may write there."
            ) from error
        raise LandscapeError(f"{repo_id} was not uploaded, {hub} said: {_first_line(error)}.") from error
    return str(address)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]
