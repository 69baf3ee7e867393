"""Reports read back from disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invarlock.core.errors import UsageError, one_line
from invarlock.core.paths import absolute
from invarlock.reporting.report import FORMAT_VERSION


@dataclass(frozen=True)
class Run:
    """A report and the folder that it lies in."""

    report: Mapping[str, Any]
    folder: Path

    @classmethod
    def read(cls, path: Path) -> Run:
        """
        :param path: a run's folder, or its report.json.
        :raises UsageError: there is no report, or it is none of this format.
        """
        file = path / "report.json" if path.is_dir() else path
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{absolute(file)}: there is no report; name a run's folder or its report.json") from None
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {one_line(error)}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: is not a report: {one_line(error)}") from error
        version = report.get("format_version") if isinstance(report, dict) else None
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{file}: is not a report of format {FORMAT_VERSION}, its format_version is {version!r:.80}"
            )
        return cls(report, file.absolute().parent)
