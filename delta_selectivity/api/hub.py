"""Publish the results of an SAE in its Hugging Face Hub repository: files, page and model card in one commit.

push(files, "owner/sae", dry_run=True)     # return what would be written, without writing
"""

from __future__ import annotations

import difflib
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from delta_selectivity.errors import RequestError
from delta_selectivity.reporting.groups import File
from delta_selectivity.reporting.model_card import PAGE, body_of, model_index, with_results
from delta_selectivity.reporting.results import by_sae, is_baseline
from delta_selectivity.reporting.rows import find_sae
from delta_selectivity.reporting.study import Sae, Study, study_of
from delta_selectivity.system.hub_access import use_cache_if_unreachable

log = logging.getLogger(__name__)

FOLDER = "delta_selectivity"
"""Folder of the result files and the page in the repository."""
CARD = "README.md"
PAUSES = (1.0, 4.0)
"""Seconds before the second and the third attempt."""
CONFLICT = 412
"""HTTP status of a commit to a repository that has changed since it was read."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Push:
    """Files to write to a Hub repository."""

    repo: str
    files: dict[str, bytes]  # by path in the repository, the model card last
    card_before: str
    url: str | None = None  # of the commit; None: nothing was written

    def __str__(self) -> str:
        listed = [f"  {path} ({len(content) / 1000:.1f} kB)" for path, content in self.files.items()]
        if self.url is not None:
            return "\n".join([f"pushed to {self.repo}, in one commit: {self.url}", *listed])
        card = self.files[CARD].decode()
        change = difflib.unified_diff(self.card_before.splitlines(), card.splitlines(), CARD, CARD, lineterm="")
        return "\n".join([f"to {self.repo}, in one commit:", *listed, "", *change])


def push(files: Sequence[File], repo: str, sae: str | None = None, *, dry_run: bool = False) -> Push:
    """Publish the result files of one SAE with their page, and add a summary to the repository's model card.

    Everything is one commit on top of the revision that was read, so no partial update is visible. After a lost
    connection, the commit is retried twice. Stored scores are not published, nor are texts that were stored only
    because the run was set to keep all texts.

    Args:
        files: Result files, which may include those of other SAEs.
        repo: ``"owner/name"`` of an existing repository.
        sae: Its name, or a unique part of it; may be None if there is only one.
        dry_run: Return what would be written, without writing.

    Raises:
        RequestError: There is no token, or it has no write access; the repository does not exist; the Hub does not
            respond; the card's metadata cannot be extended.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(f"`push_to_hub` {repo!r}: OWNER/NAME is needed") from error
    if not isinstance(repo, str) or repo.count("/") != 1:
        raise RequestError(f"`push_to_hub` {repo!r}: OWNER/NAME is needed")
    token = get_token()
    if token is None and not dry_run:
        raise RequestError("`push_to_hub`: no token of the Hub: set HF_TOKEN, or log in with `hf auth login`")
    if not use_cache_if_unreachable():
        raise RequestError(f"`push_to_hub` {repo}: the Hub does not respond: check the connection")
    named = {name: files_of_sae for name, files_of_sae in by_sae(files).items() if not is_baseline(files_of_sae[0][1])}
    if not named:
        raise RequestError("`push_to_hub`: the files hold only baselines, and no SAE")
    study = study_of(named[find_sae(named, sae)])
    api = HfApi(token=token if token is not None else False)
    contents = _contents(study)
    return _with_retries(repo, lambda: _attempt(api, repo, study.saes[0], contents, dry_run))


def _contents(study: Study) -> dict[str, bytes]:
    """Return the files to publish, by path in the repository."""
    from delta_selectivity.reporting.output import write_page  # imports matplotlib

    contents: dict[str, bytes] = {}
    for path, _ in study.files:  # there may be several runs, such as for different layers
        names = (f"{FOLDER}/{path.stem}{'' if n == 1 else f'-{n}'}{path.suffix}" for n in itertools.count(1))
        contents[next(name for name in names if name not in contents)] = path.read_bytes()
    private = any(contents["_run"]["config"].get("keep_texts") == "all" for _, contents in study.files)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / PAGE
        write_page(study, page, with_rows=not private)
        return {**contents, f"{FOLDER}/{PAGE}": page.read_bytes()}


def _attempt(api: Any, repo: str, sae: Sae, contents: dict[str, bytes], dry_run: bool) -> Push:
    """Read the card, and commit on top of the revision that was read."""
    from huggingface_hub import CommitOperationAdd

    head = api.model_info(repo).sha
    before = _read_card(api, repo, head)
    url = f"{api.endpoint}/{repo}/blob/main/{FOLDER}/{PAGE}"
    index = model_index(sae, repo.partition("/")[2], url)
    card = with_results(before, index, body_of(sae, FOLDER))
    prepared = Push(repo, {**contents, CARD: card.encode()}, before)
    if dry_run:
        return prepared
    additions = [CommitOperationAdd(path, content) for path, content in prepared.files.items()]
    commit = api.create_commit(repo, additions, commit_message="Add results of Delta Selectivity", parent_commit=head)
    return replace(prepared, url=commit.commit_url)


def _read_card(api: Any, repo: str, revision: str) -> str:
    """Return the card unchanged; empty if there is none."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = f"{api.endpoint}/{repo}/resolve/{revision}/{CARD}"
    response = get_session().get(url, headers=build_hf_headers(token=api.token))
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError:
        return ""
    try:
        return bytes(response.content).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"`push_to_hub` {repo}: its {CARD} is not UTF-8; nothing was written") from error


def _with_retries(repo: str, attempt: Callable[[], Result]) -> Result:
    """Retry after a lost connection or a server error. Raises a one-line `RequestError`."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for pause in (*PAUSES, None):
        try:
            return attempt()
        except (HTTPError, ConnectionError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            is_temporary = status is None or status >= 500 or status in (CONFLICT, 429)
            if not is_temporary or pause is None:
                raise RequestError(f"`push_to_hub` {repo}: {_reason(status, error)}; nothing was written") from error
            log.info("%s: %s: retrying in %g s", repo, _reason(status, error), pause)
            time.sleep(pause)
        except ValueError as error:  # raised by the Hub client's validation of the card
            message = " ".join(str(error).split())
            raise RequestError(f"`push_to_hub` {repo}: {message}; nothing was written") from error
    raise AssertionError("the last attempt returns or raises")


def _reason(status: int | None, error: Exception) -> str:
    messages = {
        401: "the token is invalid, or there is no such repository",
        403: "the token has no write access",
        404: "there is no such repository, or the token has no access to it: create it first",
        CONFLICT: "the repository was changed at the same time",
        429: "the Hub's rate limit is reached",
    }
    if status is None:
        return f"the connection was lost ({type(error).__name__})"
    return messages.get(status, f"the Hub responds with status {status}")
