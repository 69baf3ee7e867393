"""The configuration of a checkpoint, found without its weights."""

from __future__ import annotations

from pathlib import Path

from invarlock.core.paths import is_hub_id

CONFIG = "config.json"


def config_file(model_id: str, revision: str | None) -> Path | None:
    """``config.json`` of a folder or of an id on a hub, fetched alone where the network is on; None if there is none.

    Whoever loads the checkpoint tells what is wrong with it.
    """
    path = Path(model_id) / CONFIG
    if path.is_file() or not is_hub_id(model_id):
        return path if path.is_file() else None
    # Only here: start-up counts milliseconds.
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(model_id, CONFIG, revision=revision))
    except (OSError, ValueError):
        return None
