"""Every kind of source gives its documents; every bad one gives a sentence."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mka_megatron.config.schema import SourceConfig
from mka_megatron.data.batch import DataError
from mka_megatron.data.readers import JsonLines, TextFile
from mka_megatron.data.sources import Source, open_source
from tests.helpers import corpora

TEXTS = ["first\ndocument\r\n", "zweites — Dokument", "  ", "4"]


def opened(path: object) -> Source:
    return open_source(SourceConfig(str(path)), "data.train[0].path")


def texts(path: object, key: str = "text") -> list[str]:
    return [text for (text,) in opened(path).records((key,))]


def refused(path: object, message: str, keys: tuple[str, ...] = ("text",)) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(opened(path).records(keys))
    assert "\n" not in str(caught.value)


def test_text_files_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").write_text("no")
    names = ["a.txt", "b.md", "sub/c.txt", "sub/d"]
    for name, text in zip(names, TEXTS, strict=True):
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "sub/empty.txt").touch()
    assert texts(tmp_path) == TEXTS
    assert texts(tmp_path / "**/*.txt") == [TEXTS[0], TEXTS[2]]
    assert texts(tmp_path / "b.md") == [TEXTS[1]]


def test_parquet_jsonl_and_mixed_directories(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "text": TEXTS}), tmp_path / "b.parquet", row_group_size=1)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "x": 1}) for text in TEXTS) + "\n\n")
    (tmp_path / "a.jsonl").open("a").write('{"text": ""}\n')  # an empty document is none
    assert texts(tmp_path / "b.parquet") == TEXTS
    assert texts(tmp_path / "a.jsonl") == TEXTS
    assert texts(tmp_path) == TEXTS * 2


def test_parquet_is_streamed(tmp_path: Path) -> None:
    """A row is there before the rows after it are read."""
    pq.write_table(pa.table({"text": ["x" * 1000] * 50_000}), tmp_path / "b.parquet", row_group_size=1000, compression="none")
    before = pa.total_allocated_bytes()
    records = opened(tmp_path / "b.parquet").records(("text",))
    next(records)
    assert pa.total_allocated_bytes() - before < 20_000_000


def test_hugging_face_data_sets_on_disk(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS, "other": [text.upper() for text in TEXTS]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert texts(f"hf:{tmp_path / 'one'}") == TEXTS
    assert texts(f"hf:{tmp_path / 'splits'}") == TEXTS
    assert texts(f"hf:{tmp_path / 'splits'}::test") == [TEXTS[1]]
    assert texts(f"hf:{tmp_path / 'one'}", "other")[0] == TEXTS[0].upper()
    assert opened(f"hf:{tmp_path / 'one'}").fingerprint == opened(f"hf:{tmp_path / 'one'}").fingerprint
    refused(f"hf:{tmp_path / 'splits'}::dev", "split dev")
    refused(f"hf:{tmp_path / 'nothing'}", "cannot be loaded")
    refused(f"hf:{tmp_path / 'one'}", "no column 'txt' among text, other", ("txt",))


def test_a_megatron_prefix(tmp_path: Path) -> None:
    prefix = corpora.write(tmp_path / "x", [[1, 2]])
    for name in (prefix, prefix + ".bin", prefix + ".idx"):
        assert opened(name).prefix == prefix


def test_the_standard_library() -> None:
    source = opened("stdlib")
    names = [part.name for part in source.parts]
    assert names == sorted(names) and "json/__init__.py" in names
    assert not any("site-packages" in name or os.path.isabs(name) for name in names)
    whole = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    assert whole in texts("stdlib")


def test_a_lone_text_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {i} " + "x" * (i % 90) + "\n" for i in range(60_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    pieces = texts(tmp_path / "book.txt")
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces)
    assert 60 <= len(pieces) <= 64
    (tmp_path / "other.txt").write_text("x")
    assert len(texts(tmp_path)) == 2, "files of a directory are whole documents"


def test_long_lines_are_cut_without_breaking_characters(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("€" * 1000)
    pieces = [text for (text,) in TextFile(str(tmp_path / "x"), 64).read(("text",))]
    assert "".join(pieces) == "€" * 1000 and max(map(len, pieces)) == 128


def test_bad_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nothing*", r"data\.train\[0\]\.path: .*nothing\*' is no file")
    (tmp_path / "dir").mkdir()
    refused(tmp_path / "dir", "holds no data")
    (tmp_path / "empty.txt").touch()
    refused(tmp_path / "empty.txt", "holds no data")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    refused(tmp_path / "latin.txt", r"latin\.txt: not UTF-8")
    refused(tmp_path / "latin.txt", "a text file has no fields prompt, response", ("prompt", "response"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    refused(tmp_path / "bad.parquet", r"bad\.parquet: not a readable Parquet file")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    refused(tmp_path / "null.parquet", r"row 2: field 'text' holds NoneType")
    refused(tmp_path / "null.parquet", "no column 'body'", ("body",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'["text"]', "a JSON list"),
        (b'{"body": "a"}', "field 'text' is missing"),
        (b'{"text": 1}', "field 'text' holds int"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_json_line_is_numbered(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    refused(tmp_path / "x.jsonl", rf"x\.jsonl:3: .*{message}")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 40))
def test_damaged_json_lines_never_raise_anything_else(tmp_path: Path, noise: bytes, place: int) -> None:
    good = b'{"text": "one"}\n{"text": "two"}\n'
    path = tmp_path / "x.jsonl"
    path.write_bytes(good[:place] + noise + good[place:])
    try:
        assert all(isinstance(text, str) for (text,) in JsonLines(str(path)).read(("text",)))
    except DataError as error:
        assert str(error).startswith(f"{path}:")


def test_the_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        (tmp_path / root / "a.txt").write_text("text")
        os.utime(tmp_path / root / "a.txt", ns=(1, 1))
    first = opened(tmp_path / "one").fingerprint
    assert first == opened(tmp_path / "two").fingerprint, "where the directory lies does not matter"
    (tmp_path / "one/a.txt").write_text("more")
    assert opened(tmp_path / "one").fingerprint != first
    (tmp_path / "two/a.txt").rename(tmp_path / "two/b.txt")
    assert opened(tmp_path / "two").fingerprint != first
