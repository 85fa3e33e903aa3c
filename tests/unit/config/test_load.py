"""Layers, overrides, types and old keys."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mka_megatron.config.load import ConfigError, load_config
from mka_megatron.config.schema import Config, SourceConfig


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def sentence(*args: object, **kwargs: object) -> str:
    """The message of the ConfigError that load_config raises: one sentence on one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 600
    return text


def test_nothing_gives_the_defaults() -> None:
    assert load_config() == Config()


def test_layers_merge_in_order(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "training: {steps: 50, seed: 1, learning_rate: 0.5}\ndata: {train: [{path: a}, {path: b}]}")
    write(tmp_path, "sub/b.yaml", "base: ../a.yaml\ntraining: {steps: 60}\ndata: {train: [{path: c}]}")
    write(tmp_path, "c.yaml", "training: {seed: 2}")
    top = write(tmp_path, "top.yaml", "base: [sub/b.yaml, c.yaml]\ntraining: {warmup_steps: 5}")
    last = write(tmp_path, "last.yaml", "training: {learning_rate: 1.e-1}")
    config = load_config([top, last], ["training.warmup_steps=6"])
    training = config.training
    assert (training.steps, training.seed, training.learning_rate, training.warmup_steps) == (60, 2, 0.1, 6)
    assert config.data.train == (SourceConfig("c"),)  # lists replace, they do not append


def test_a_base_may_be_shared_but_not_circular(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "training: {steps: 70}")
    write(tmp_path, "l.yaml", "base: root.yaml")
    write(tmp_path, "r.yaml", "base: root.yaml")
    assert load_config(write(tmp_path, "diamond.yaml", "base: [l.yaml, r.yaml]")).training.steps == 70
    write(tmp_path, "x.yaml", "base: y.yaml")
    write(tmp_path, "y.yaml", "base: ./x.yaml")
    text = sentence(tmp_path / "x.yaml")
    assert "circle" in text and "y.yaml" in text and "remove" in text


def test_bases_must_not_multiply(tmp_path: Path) -> None:
    """Thirty files that each name the next one twice would be a billion layers."""
    for at in range(30):
        write(tmp_path, f"{at}.yaml", f"base: [{at + 1}.yaml, {at + 1}.yaml]")
    write(tmp_path, "30.yaml", "training: {steps: 70}")
    text = sentence(tmp_path / "0.yaml")
    assert "30.yaml" in text and "more than 100" in text


@pytest.mark.parametrize(("text", "parts"), [
    ("base: nowhere.yaml", ("nowhere.yaml", "named by base", "does not exist")),
    ("base: 3", ("base in", "3", "file name")),
    ("base: [[a]]", ("base in", "file name")),
    ("- a\n- b", ("mapping",)),
    ("just text", ("just text", "mapping")),
    ("training: {steps: 1", ("line 1", "not valid YAML")),
    ("training:\n  steps: 5\n  steps: 6", ("line 3", "steps", "twice")),
    ("training: &t {steps: 5}\ndata: *t", ("line 2", "aliases")),
    ("model: !!python/object:os.system {}", ("not valid YAML",)),
    ("? [a]\n: b", ("not valid YAML",)),
    ("[" * 5000, ("not valid YAML",)),
    ("training: {steps: !!binary aGk=}", ("line 1", "tags")),
    ("training: !!set {steps}", ("line 1", "tags")),
    ("training: {steps: !!bool x}", ("line 1", "tags")),
    ("a: 0x" + "f" * 6000, ("line 1", "6002 digits")),
    ('a: "\\ud800"', ("line 1", "surrogate")),
    ("training: {steps: 0100}", ("training.steps is 0100", "an integer")),
    ("training: {steps: 1:30}", ("training.steps is 1:30", "an integer")),
])
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    message = sentence(write(tmp_path, "bad.yaml", text))
    assert all(part in message for part in parts), message


def test_missing_unreadable_and_odd_files(tmp_path: Path) -> None:
    assert "does not exist" in sentence(tmp_path / "none.yaml")
    assert "is a directory" in sentence(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\xfe")
    assert "UTF-8" in sentence(tmp_path / "latin.yaml")
    (tmp_path / "nul.yaml").write_bytes(b"a: \x00")
    assert "not valid YAML" in sentence(tmp_path / "nul.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (1 << 19))
    assert "524288 bytes, too many" in sentence(tmp_path / "big.yaml")
    (tmp_path / "long.yaml").write_bytes(b"#" * (1 << 17))
    assert "has 131072 characters" in sentence(tmp_path / "long.yaml")
    assert "does not exist" in sentence("/dev/zero")  # not a regular file: never read
    assert "does not exist" in sentence("a\0b")


@pytest.mark.parametrize(("override", "parts"), [
    ("model.num_layer=3", ("model.num_layer", "did you mean model.num_layers")),
    ("num_layers=3", ("num_layers", "did you mean model.num_layers")),
    ("modle.num_layers=3", ("modle", "did you mean model")),
    ("model.rope.thetta=3", ("did you mean model.rope.theta",)),
    ("training.zzz=3", ("training.zzz", "training has steps")),
    ("data.train=[{pat: x}]", ("data.train[0].pat", "did you mean data.train[0].path")),
    ("data.train=[{weight: 1}]", ("data.train[0].path", "missing")),
    ("training.steps=x", ("training.steps is x", "an integer")),
    ("training.steps=1.5", ("training.steps is 1.5", "an integer")),
    ("training.steps=true", ("training.steps is true", "an integer")),
    ("training.steps=", ("training.steps is null", "an integer")),
    ("training.steps=[1]", ("training.steps is [1]", "an integer")),
    ("training.steps={a: 1}", ("training.steps", "an integer")),
    ("training.steps.a=1", ("training.steps", "an integer")),
    ("training=3", ("training is 3", "a mapping")),
    ("model.vocab_size=a", ("model.vocab_size is a", "an integer or null")),
    ("attention.variant=flash", ("attention.variant is flash", "mha, mqa, gqa, mla, mka, fastmka or blockmka")),
    ("engine.zero_stage='1'", ("engine.zero_stage is 1", "0, 1, 2 or 3")),
    ("logging.progress=1", ("logging.progress is 1", "true or false")),
    ("training.output_dir=7", ("training.output_dir is 7", "a string")),
    ("data.train=7", ("data.train is 7", "a list of mappings")),
    ("data.train=[7]", ("data.train[0] is 7", "a mapping")),
    ("logging.profile_steps=[1, a]", ("logging.profile_steps[1] is a", "an integer")),
    ("logging.profile_steps=3", ("logging.profile_steps is 3", "a list of integers")),
    ("memory_hierarchy.l1.placement=dram", ("memory_hierarchy.l1.placement is dram", "hbm")),
    ("training.learning_rate=.nan", ("training.learning_rate", "finite")),
    ("training.learning_rate=.inf", ("training.learning_rate", "finite")),
    ("training.seed=99999999999999999999", ("training.seed", "at most")),
    ("training.output_dir=''", ("training.output_dir is ''", "printable")),
    ('training.output_dir="a\\0b"', ("training.output_dir", "printable")),
    ("training.steps", ("training.steps", "section.key=value")),
    ("=3", ("section.key=value",)),
    ("training..steps=3", ("section.key=value",)),
    (".".join(["a"] * 3000) + "=3", ("a.a.a.", "section.key=value")),
    ("training.steps={", ("training.steps", "not valid YAML")),
])
def test_a_bad_override_is_one_sentence(override: str, parts: tuple[str, ...]) -> None:
    message = sentence((), [override])
    assert all(part in message for part in parts), message


def test_the_sentence_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "training: {steps: many}")
    top = write(tmp_path, "top.yaml", "base: base.yaml\ntraining: {seed: 2}")
    assert "base.yaml" in sentence(top) and "top.yaml" not in sentence(top)
    assert "the command line" in sentence((), ["training.steps=many"])


def test_values_as_people_write_them() -> None:
    config = load_config((), ["training.learning_rate=1e-3", "training.min_learning_rate=1E-4", "training.clip_grad=1",
                              "training.output_dir=2024-01-31", "training.resume=none", "model=",
                              "logging.profile_steps=[3, 4]", "data.valid=[]", "model.vocab_size=null"])
    assert (config.training.learning_rate, config.training.min_learning_rate) == (1e-3, 1e-4)
    assert isinstance(config.training.clip_grad, float) and config.training.output_dir == "2024-01-31"
    assert config.logging.profile_steps == (3, 4)


@pytest.mark.parametrize(("text", "expected"), [
    ("corpus.txt", (SourceConfig("corpus.txt"),)),
    ("[a, b]", (SourceConfig("a"), SourceConfig("b"))),
    ("[{path: a, weight: 2}, b]", (SourceConfig("a", 2.0), SourceConfig("b"))),
    ("{path: a, text_key: body}", (SourceConfig("a", 1.0, "body"),)),
])
def test_source_shorthands(text: str, expected: tuple[SourceConfig, ...]) -> None:
    assert load_config((), [f"data.train={text}"]).data.train == expected


def test_old_memory_keys(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mka_megatron"):
        config = load_config((), ["memory_hierarchy.hbm_enabled=false", "memory_hierarchy.dram_staging=false",
                                  "memory_hierarchy.ssd_tier_path=null"])
    assert config.memory_hierarchy.l2.enabled is False
    assert config.memory_hierarchy.l3.enabled is False
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and all("deprecated" in line and "\n" not in line for line in lines)
    assert ["l2.enabled" in lines[0], "l3.dram_pool_gib" in lines[1], "ssd_spill_path" in lines[2]] == [True] * 3


@pytest.mark.parametrize(("override", "parts"), [
    ("memory_hierarchy.ssd_tier_path=/scratch", ("memory_hierarchy.ssd_spill_path is /scratch", "l3.placement")),
    ("memory_hierarchy.dram_staging=true", ("data.pad_documents_to_chunks is false", "l3.enabled")),
    ("memory_hierarchy.dram_staging=lots", ("memory_hierarchy.dram_staging is lots", "GiB")),
    ("memory_hierarchy.dram_staging=-1", ("memory_hierarchy.dram_staging is -1", "GiB")),
    ("memory_hierarchy.hbm_enabled=1", ("memory_hierarchy.hbm_enabled is 1", "true or false")),
    ("memory_hierarchy.ssd_tier_path=5", ("memory_hierarchy.ssd_spill_path is 5", "a string")),
])
def test_old_memory_keys_are_refused_by_name(override: str, parts: tuple[str, ...]) -> None:
    message = sentence((), [override])
    assert all(part in message for part in parts), message


def test_an_old_and_a_new_key_must_agree(tmp_path: Path) -> None:
    both = write(tmp_path, "both.yaml", "memory_hierarchy: {hbm_enabled: true, l2: {enabled: false}}")
    assert "one setting" in sentence(both)
    same = write(tmp_path, "same.yaml", "memory_hierarchy: {hbm_enabled: false, l2: {enabled: false}}")
    assert load_config(same).memory_hierarchy.l2.enabled is False
    # a later layer wins whichever spelling it uses
    assert load_config(same, ["memory_hierarchy.l2.enabled=true"]).memory_hierarchy.l2.enabled is True
