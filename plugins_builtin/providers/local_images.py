"""A folder of images, or a file that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from invarlock.api import Record, hookimpl
from plugins_builtin.providers import media_files

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@hookimpl
def invarlock_documents(dataset: Any) -> Sequence[Record] | None:
    return media_files.read(dataset, "image", ENDINGS) if dataset.provider == "local_images" else None
