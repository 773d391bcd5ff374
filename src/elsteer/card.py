"""The model card of a landscape: README.md with the hub's front matter."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from elsteer.models import Fingerprint
from elsteer.steering.rule import SteeringRule

__all__ = ["landscape_card"]

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_APART = {"figures", "license"}  # entries of the provenance that have a place of their own
_LONGEST = 200


def landscape_card(
    *, name: str, rule: SteeringRule, fingerprint: Fingerprint, provenance: dict[str, Any], method: str
) -> str:
    """The text of README.md. name: a hub id or a folder, as in `Landscape.from_pretrained(name)`.

    provenance: as in `Landscape`; "figures" are rows of {"name", "value", "low", "high", "n", "note"}, all but the first two
    optional, shown as a table; the other entries are listed as they are.
    """
    base = _hub_model(fingerprint)
    front = ModelCardData(
        library_name="elsteer",
        base_model=base,
        license=str(provenance.get("license") or "apache-2.0"),
        tags=["elsteer", "energy-landscape-steering", "activation-steering", "over-refusal", "safety"],
        pipeline_tag="text-generation",
    )
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True)
    text = files("elsteer").joinpath("templates/card.md.j2").read_text(encoding="utf-8")
    return template.from_string(text).render(
        front=front.to_yaml(),
        title=name if _is_hub_id(name) else Path(name).name,
        name=json.dumps(_place(name)),
        base=base,
        model=_shown(fingerprint),
        load=json.dumps(base or "path/to/the/model") + _pin(fingerprint),
        revision=fingerprint.revision,
        fingerprint=fingerprint,
        thinking={None: "the template's default", True: "on", False: "off"}[fingerprint.thinking],
        rule=rule,
        method=method,
        gates=sorted((rule.gates or {}).items()),
        made=[(_cell(key), _cell(_words(entry))) for key, entry in provenance.items() if key not in _APART],
        figures=_figures(provenance.get("figures")),
    )


def _is_hub_id(name: str | None) -> bool:
    return name is not None and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _place(name: str) -> str:
    """What to read it by: a hub id or a folder below the current one as it is, of another its last part alone."""
    path = Path(name)
    below = not path.is_absolute() and ".." not in path.parts
    return name if below else path.name


def _hub_model(fingerprint: Fingerprint) -> str | None:
    """The model's hub id; None where it is a local one."""
    return fingerprint.name if _is_hub_id(fingerprint.name) and not fingerprint.is_local else None


def _shown(fingerprint: Fingerprint) -> str:
    """The model's name; of a local folder only its last part, as the rest is nobody's business."""
    if fingerprint.name is None:
        return fingerprint.architecture
    return _hub_model(fingerprint) or Path(fingerprint.name).name


def _pin(fingerprint: Fingerprint) -> str:
    """The revision as an argument, where only the package registry has that model."""
    return f", revision={json.dumps(fingerprint.pin)}" if fingerprint.pin else ""


def _figures(rows: Any) -> list[dict[str, str]]:
    """Cells of the table, by column. What is not a figure is left out: the provenance is free text to us."""
    rows = rows if isinstance(rows, list) else []
    return [
        {
            "name": _cell(str(row["name"])),
            "value": _number(row["value"]),
            "interval": f"{_number(row['low'])} to {_number(row['high'])}" if _has_interval(row) else "",
            "n": _cell(str(row.get("n") or "")),
            "note": _cell(str(row.get("note") or "")),
        }
        for row in rows
        if isinstance(row, dict) and "name" in row and isinstance(row.get("value"), int | float)
    ]


def _has_interval(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(limit), int | float) for limit in ("low", "high"))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _words(value: Any) -> str:
    """An entry of the provenance in a line."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_words(entry)}" for key, entry in value.items())
    elif isinstance(value, list):
        text = ", ".join(map(_words, value))
    else:
        text = f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}… (whole in config.json)"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
