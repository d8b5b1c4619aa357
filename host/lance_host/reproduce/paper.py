"""The published values, from `paper.toml`: the one place where they stand."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

SOURCE = "lance"


@dataclass(frozen=True)
class Published:
    """A number as printed; `relation` is `is`, or `below` where only a bound was printed.

    `needs` are the options of a study with which its own number can be compared.
    """

    value: float
    relation: str
    source: str
    needs: Mapping[str, Any]

    def differences(self, study: object) -> list[str]:
        """`batch size 16, not 128`: what of a study is not as published; of none, the number stands beside."""
        return [
            f"{name.replace('_', ' ')} {getattr(study, name)}, not {value}"
            for name, value in self.needs.items()
            if getattr(study, name) != value
        ]


def published(
    claim: str, quantity: str, model: str, dataset: str, method: str, layers: int | None, setting: str = ""
) -> Published | None:
    """What was printed for this cell; `None` where nothing is at hand."""
    document = _document()
    for entry in document["value"]:
        asked = {"claim": claim, "quantity": quantity, "model": model, "dataset": dataset, "setting": setting}
        if all(entry.get(key, value) == value for key, value in asked.items()):
            value = entry["values"].get(method, {}).get(str(layers))
            if value is not None:
                needs = entry.get("needs", document["needs"][quantity])
                return Published(value, entry.get("relation", "is"), document["sources"][SOURCE], needs)
    return None


def source() -> str:
    """Whose numbers these are."""
    return str(_document()["sources"][SOURCE])


@cache
def _document() -> dict[str, Any]:
    text = (resources.files("lance_host") / "reproduce" / "paper.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
