"""The tokenizer that goes with a training checkpoint: which directory has it, its size, its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, refuse, show
from mka_megatron.config.schema import Config
from mka_megatron.files.jsonfile import read_object
from mka_megatron.training.manifest import Checkpoint

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
         "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json", "generation_config.json")
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Tokenizer:
    """A directory of tokenizer files."""

    path: Path
    files: tuple[str, ...]

    @property
    def vocab_size(self) -> int | None:
        """Largest id + 1; None where there is no tokenizer.json."""
        ids = self._ids()
        return max(ids.values()) + 1 if ids else None

    def special(self) -> dict[str, int]:
        """`bos_token_id` and `eos_token_id`, where tokenizer_config.json names them."""
        if "tokenizer_config.json" not in self.files:
            return {}
        config, ids = read_object(self.path / "tokenizer_config.json", _LARGEST), self._ids()
        found = {}
        for name in ("bos_token", "eos_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in ids:
                found[f"{name}_id"] = ids[token]
        return found

    def _ids(self) -> dict[str, int]:
        if "tokenizer.json" not in self.files:
            return {}
        raw = read_object(self.path / "tokenizer.json", _LARGEST)
        model, added = raw.get("model"), raw.get("added_tokens")
        vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):  # unigram: [token, score] by id
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        for entry in added if isinstance(added, list) else []:
            if isinstance(entry, dict):
                ids[entry.get("content")] = entry.get("id")
        return {token: number for token, number in ids.items() if isinstance(token, str) and type(number) is int}


def find_tokenizer(config: Config, checkpoint: Checkpoint | None, given: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a run: `given`, data.tokenizer, the one `checkpoint` names, the only trained one, or init_from's.

    Args:
        config: of the run.
        checkpoint: of the run; None: there is none.
        given: directory that goes before all others.

    Returns:
        None where none of these directories is on this machine.

    Raises:
        ConfigError: there are no tokenizer files in `given`, or several trained ones that it could be.
    """
    if given is not None:
        found = _at(given)
        if found is None:
            raise ConfigError(f"{show(str(given))} has no tokenizer files; give the directory of a tokenizer.")
        return found
    if config.data.tokenizer is not None:
        return _at(Path(config.data.tokenizer))
    recorded = None if checkpoint is None else checkpoint.body["state"].get("tokenizer")
    if recorded is not None and (own := _at(Path(recorded))) is not None:
        return own
    trained = [each for each in map(_at, sorted(Path(config.data.cache_dir, "tokenizers").glob("*"))) if each is not None]
    if len(trained) > 1:
        raise refuse("data.tokenizer", None, f"{config.data.cache_dir}/tokenizers has {len(trained)} trained tokenizers; name "
                     "the run's own (--tokenizer)")
    if trained:
        return trained[0]
    return None if config.model.init_from is None else _at(Path(config.model.init_from))


def _at(path: Path) -> Tokenizer | None:
    files = tuple(name for name in FILES if (path / name).is_file())
    return Tokenizer(path, files) if files else None
