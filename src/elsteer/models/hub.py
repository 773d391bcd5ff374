"""The Hugging Face Hub: whether it answers, found out in seconds, and what of it lies in the local cache."""

from __future__ import annotations

import threading
from pathlib import Path

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache

from elsteer.errors import ModelError

__all__ = ["cached_snapshot", "hub_problem"]

PROBE_SECONDS = 4.0


def hub_problem() -> str | None:
    """Why the hub (HF_ENDPOINT) cannot be used now, in a few words, or None if it answers.

    One short request, given up after PROBE_SECONDS whatever hangs: name resolution, connection or answer. The hub's own
    client would try again for minutes. Nothing is sent where HF_HUB_OFFLINE is set.
    """
    if is_offline_mode():
        return "is switched off (HF_HUB_OFFLINE)"
    found: list[str | None] = []

    def probe() -> None:
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS - 0.5)
        except Exception as error:  # noqa: BLE001 - a proxy that is wrong raises what it likes, such as ImportError
            found.append(f"could not be reached ({error or type(error).__name__})")
        else:
            found.append(f"answered with error {answer.status_code}" if answer.status_code >= 500 else None)

    # A thread, because name resolution has no time limit of its own.
    thread = threading.Thread(target=probe, name="hub-probe", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return found[0] if found else f"did not answer within {PROBE_SECONDS:.0f} seconds"


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of the model in the local hub cache, at `revision` (default: main), or None."""
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError as error:  # the hub's validation of ids
        raise ModelError(f"'{name}' is no local file or folder, nor a hub id of the form owner/name.") from error
    return Path(config).parent if isinstance(config, str) else None
