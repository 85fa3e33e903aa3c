"""Models by name: the files of a hub repository that conversion reads, downloaded into transformers' own cache."""

from __future__ import annotations

import re
from pathlib import Path

from mka_megatron.config.errors import ConfigError, show

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*"]
"""What is downloaded: never pickles or code."""
_ELSEWHERE = ["*/*.safetensors", "original/*", "onnx/*", "gguf/*"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local(model: str) -> Path:
    """The directory that `model` names: one on this machine, or the hub's model of that name, downloaded.

    Raises:
        ConfigError: it is neither, or cannot be downloaded.
    """
    path = Path(model)
    if path.exists():
        return path
    if not _NAME.fullmatch(model):
        raise ConfigError(f"{show(model)} does not exist and is no hub name (owner/model); give a directory or such a name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=FILES, ignore_patterns=_ELSEWHERE))
    except Exception as error:  # of the hub's client, the HTTP library or the network
        reason = type(error).__name__
        raise ConfigError(f"{model} is no directory and cannot be downloaded from the hub ({reason}); check the name and "
                          "the network, or give the directory of a downloaded model.") from None
