"""The command line of a benchmark whose settings are one dataclass."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


def settings_from_words(kind: type[ConfigT], doc: str) -> tuple[ConfigT, Path | None]:
    """The settings, each an option whose default is the dataclass's, and where `--json` wants the figures."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    for name, default in asdict(kind()).items():  # type: ignore[call-overload]
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    asked = vars(parser.parse_args())
    file = asked.pop("json")
    return kind(**asked), file


def show(figures: Mapping[str, Any], file: Path | None) -> None:
    """Write all of them where that was asked for, and print those that are single values."""
    if file:
        file.write_text(json.dumps(figures, indent=2))
    for name, value in figures.items():
        if not isinstance(value, Mapping | list):
            print(f"{name:<24} {round(value, 3) if isinstance(value, float) else value}")
