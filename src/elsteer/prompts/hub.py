"""Rows of hub data sets. An unreachable hub is noticed within seconds: the hub's own client would retry for minutes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elsteer.errors import PromptError
from elsteer.prompts.formats import PlacedRow

__all__ = ["HubError", "hub_rows"]


class HubError(PromptError):
    """A data set that the hub did not give: `reason`, and the `remedy` other than reading a file instead."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}, and no file has that name: {remedy}, or give a file.")
        self.reason = reason
        self.remedy = remedy


def _http_errors() -> tuple[type[Exception], ...]:
    # The hub client's HTTP library differs between its versions; its errors are the bases of the client's own error.
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def hub_rows(
    hub_id: str, *, config: str | None, split: str, revision: str | None, options: Mapping[str, Any] | None = None
) -> list[PlacedRow]:
    """All rows of one split of a hub data set, read by the `datasets` library (which caches them).

    options: more arguments of its reader, such as {"delimiter": "\\t"}.
    Raises HubError if the hub does not answer, or the data set, its configuration or its split is missing or gated.
    """
    from huggingface_hub import constants

    from elsteer.models.hub import hub_problem  # it brings torch, which files of prompts do without

    problem = None if constants.is_offline_mode() else hub_problem()  # offline, what was downloaded before is read
    if problem is not None:
        raise HubError(
            f"{hub_id} could not be read, as {constants.ENDPOINT} {problem}",
            "check the connection, or set HF_HUB_OFFLINE=1 if it was downloaded before",
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    expected: tuple[type[Exception], ...] = (DatasetsError, *_http_errors(), OSError, ValueError, RuntimeError)
    try:
        data = load_dataset(hub_id, config, split=split, revision=revision, **(options or {}))
    except expected as error:
        raise _explain(error, hub_id, split) from error
    rows: list[dict[str, Any]] = data.to_list()
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _explain(error: Exception, hub_id: str, split: str) -> HubError:
    from huggingface_hub import constants

    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if len(text) > 240:
        text = text[:237] + "..."
    if constants.is_offline_mode():
        return HubError(f"{hub_id}, split {split}, was not downloaded before ({text})", "unset HF_HUB_OFFLINE")
    if "gated" in text.lower():
        return HubError(
            f"{hub_id} is gated, and this account has no access to it",
            f"ask for access on {constants.ENDPOINT}/datasets/{hub_id} and log in with `hf auth login`",
        )
    if "config name is missing" in text.lower():
        return HubError(f"{hub_id} has several configurations ({text})", f"choose one as {hub_id}:CONFIG")
    return HubError(
        f"the hub could not give {hub_id}, split {split} ({text})",
        "check the id, the configuration and the split",
    )
