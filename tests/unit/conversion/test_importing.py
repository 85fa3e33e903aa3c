"""Import and strip: what is written, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.from_hf import read_model, read_sections
from mka_megatron.conversion import stream
from mka_megatron.conversion.families import expected, is_added
from mka_megatron.conversion.importing import import_model
from mka_megatron.conversion.stripping import strip_model
from mka_megatron.files import manifest
from tests.helpers.hf_checkpoints import FAMILIES, SHAPE, random_model, save
from tests.helpers.model_directories import contents, write_directory

BLOCK = ["attention.variant=blockmka", "memory_hierarchy.l1.window=256", "memory_hierarchy.l3.enabled=true"]


def load(directory):
    index = directory / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return {name: tensor for file in files for name, tensor in load_file(directory / file).items()}


def refused(tmp_path, source, *overrides, match, strip=False):
    """One sentence, and nothing is left beside the source."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=match) as caught:
        if strip:
            strip_model(source, tmp_path / "refused")
        else:
            import_model(source, tmp_path / "refused", [], overrides)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_strip_undoes_import_bit_for_bit(family, sharded, tmp_path):
    x = write_directory(tmp_path / "x", family, sharded)
    import_model(x, tmp_path / "ours")
    strip_model(tmp_path / "ours", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(x)


def test_strip_keeps_the_letters_of_files_written_by_hand(tmp_path):
    x = write_directory(tmp_path / "x", sharded=True)
    for name in ("config.json", "model.safetensors.index.json"):
        raw = json.loads((x / name).read_text())
        (x / name).write_text(json.dumps(dict(reversed(raw.items())), indent=4).replace("1e-06", "0.1e-5"))
    import_model(x, tmp_path / "ours")
    strip_model(tmp_path / "ours", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(x)


def test_strip_without_a_manifest_gives_equal_values(tmp_path):
    x = write_directory(tmp_path / "x", sharded=True)
    import_model(x, tmp_path / "ours")
    (tmp_path / "ours" / manifest.NAME).unlink()
    strip_model(tmp_path / "ours", tmp_path / "plain")
    found, wanted = contents(tmp_path / "plain"), contents(x)
    assert found.keys() == wanted.keys()
    for name in wanted:
        same = json.loads(found[name]) == json.loads(wanted[name]) if "json" in name else found[name] == wanted[name]
        assert same or name.endswith("index.json"), name
    index = "model.safetensors.index.json"
    assert json.loads(found[index])["weight_map"] == json.loads(wanted[index])["weight_map"]


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
def test_strip_rewrites_files_that_hold_both(family, tmp_path):
    """As `save_pretrained` writes a fine-tuned model of ours: all tensors in one file, and no manifest."""
    x = write_directory(tmp_path / "x", family)
    import_model(x, tmp_path / "ours", [], BLOCK)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_file(load(tmp_path / "ours"), mixed / "model.safetensors", {"format": "pt"})
    (mixed / "config.json").write_bytes((tmp_path / "ours" / "config.json").read_bytes())
    strip_model(mixed, tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
    found, wanted = load(tmp_path / "plain"), load(x)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("sharded", [False, True])
def test_what_an_import_holds(sharded, tmp_path):
    x, ours = write_directory(tmp_path / "x", "qwen2", sharded, torch.bfloat16), tmp_path / "ours"
    source = import_model(x, ours, [], BLOCK)
    assert source.left_out == ()
    base, found = load(x), load(ours)
    assert {name for name in found if not is_added(name)} == set(base)
    assert all(torch.equal(found[name], base[name]) for name in base)
    added = {name: tensor for name, tensor in found.items() if is_added(name)}
    assert {tensor.dtype for tensor in added.values()} == {torch.bfloat16, torch.int8}
    assert all(not tensor.any() for name, tensor in added.items() if "core_gate.fc2" in name)
    raw, plain = (json.loads((directory / "config.json").read_text()) for directory in (ours, x))
    changed = {"model_type": "mka_qwen2", "architectures": ["MKAQwen2ForCausalLM"]}
    assert {key: raw[key] for key in plain} == {**plain, **changed}
    assert set(raw) - set(plain) == {"auto_map", "mka"}
    attention, _, memory = read_sections(str(ours))
    assert attention.variant == "blockmka" and memory.l1.window == 256 and memory.l3.enabled
    assert read_model(str(ours)) == read_model(str(x))
    others = {name: data for name, data in contents(x).items() if "safetensors" not in name and name != "config.json"}
    assert {"generation_config.json", "tokenizer.json", "LICENSE", "additional_chat_templates/tools.jinja"} <= set(others)
    assert others.items() <= contents(ours).items()
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_a_default_import_has_beta_zero_and_the_seed_s_gates(tmp_path):
    x = write_directory(tmp_path / "x")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        import_model(x, tmp_path / name, seed=seed)
    a, b, c = (load(tmp_path / name) for name in "abc")
    betas = [tensor for name, tensor in a.items() if name.endswith("route.beta")]
    assert len(betas) == SHAPE["num_hidden_layers"] and not any(beta.any() for beta in betas)
    assert all(torch.equal(a[name], b[name]) for name in a)
    gates = [name for name in a if name.endswith("gate.fc1")]
    assert gates and not any(torch.equal(a[name], c[name]) for name in gates)
    assert not torch.equal(a[gates[0]], a[gates[1]])
    import_model(x, tmp_path / "d", [], ["routing.beta_init=0.5"])
    assert all(tensor.item() == 0.5 for name, tensor in load(tmp_path / "d").items() if name.endswith("route.beta"))


def test_the_manifest_lists_every_file(tmp_path):
    import_model(write_directory(tmp_path / "x", sharded=True), tmp_path / "ours", remote_code=lambda d: (d / "m.py").touch())
    listed = json.loads((tmp_path / "ours" / manifest.NAME).read_text())["files"]
    files = contents(tmp_path / "ours")
    assert set(listed) == set(files) - {manifest.NAME} and "m.py" in listed
    assert all(listed[name] == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()} for name in listed)
    manifest.verify(tmp_path / "ours")


@pytest.mark.parametrize("name", ["model-base.safetensors", "model-mka.safetensors", "config.json", "tokenizer.json"])
def test_flipped_bits_are_detected(name, tmp_path):
    ours = tmp_path / "ours"
    import_model(write_directory(tmp_path / "x"), ours)
    data = bytearray((ours / name).read_bytes())
    # a bit that keeps floats finite and JSON legible
    at = len(data) - 4 if "safetensors" in name else data.index(b"2")
    data[at] ^= 1
    (ours / name).write_bytes(data)
    with pytest.raises(ConfigError, match=f"{name} is damaged: its SHA-256"):
        manifest.verify(ours)
    if name not in ("model-mka.safetensors",):  # which strip does not read
        refused(tmp_path, ours, match="SHA-256|calls for|mka", strip=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_of_transformers(family, tmp_path):
    from mka_megatron.config.schema import ModelConfig

    model = random_model(family)
    model.save_pretrained(tmp_path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if family.endswith("-tied"):
        del wanted["lm_head.weight"]
    assert dict(expected(ModelConfig(**read_model(str(tmp_path))))) == wanted


def change(directory, edit):
    raw = json.loads((directory / "config.json").read_text())
    edit(raw)
    (directory / "config.json").write_text(json.dumps(raw))


def rewrite(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.norm.weight"
CASES = {
    "another architecture": (lambda d: change(d, lambda c: c.update(architectures=["MistralForCausalLM"])), "MistralForCausalLM"),
    "two architectures": (lambda d: change(d, lambda c: c.update(architectures=["Qwen2ForCausalLM"] * 2)), "architectures"),
    "another type": (lambda d: change(d, lambda c: c.update(model_type="llama")), "model_type is llama"),
    "quantised": (lambda d: change(d, lambda c: c.update(quantization_config={"bits": 4})), "quantization_config"),
    "own code": (lambda d: change(d, lambda c: c.update(auto_map={"AutoConfig": "x.Y"})), "auto_map"),
    "more layers than there are": (lambda d: change(d, lambda c: c.update(num_hidden_layers=1000)), "no tensor model.layers.2"),
    "layers beyond number": (lambda d: change(d, lambda c: c.update(num_hidden_layers=2**31 - 1)), "num_layers is 2147483647"),
    "fewer layers": (lambda d: change(d, lambda c: c.update(num_hidden_layers=1)), "has the tensor model.layers.1"),
    "another width": (lambda d: change(d, lambda c: c.update(intermediate_size=97)), "has the shape"),
    "negative heads": (lambda d: change(d, lambda c: c.update(num_attention_heads=-8)), "num_attention_heads"),
    "heads of no number": (lambda d: change(d, lambda c: c.update(num_key_value_heads="4")), "num_key_value_heads"),
    "an unknown scaling": (lambda d: change(d, lambda c: c.update(rope_parameters={"rope_type": "x"})), "rope_type is x"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not usable"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json is not usable"),
    "a config of 2 MiB": (lambda d: (d / "config.json").write_text('{"a": "' + "x" * 2**21 + '"}'), "larger than"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a missing tensor": (lambda d: rewrite(d, lambda t: t.pop(O_PROJ)), f"no tensor {O_PROJ}"),
    "an extra tensor": (lambda d: rewrite(d, lambda t: t.update(extra=torch.zeros(1))), "has the tensor extra"),
    "another shape": (lambda d: rewrite(d, lambda t: t.update({NORM: torch.zeros(65)})), f"tensor {NORM} has the shape"),
    "another dtype": (lambda d: rewrite(d, lambda t: t.update({NORM: t[NORM].bfloat16()})), f"tensor {NORM} is BF16"),
    "integers": (lambda d: rewrite(d, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()})), "I8"),
    "route tensors": (lambda d: rewrite(d, lambda t: t.update({"model.layers.0.self_attn.route.beta": torch.zeros(1)})), "route.beta"),
    "NaN": (lambda d: rewrite(d, lambda t: t[O_PROJ][3, 5:6].fill_(float("nan"))), f"tensor {O_PROJ} in .* not finite"),
    "infinity": (lambda d: rewrite(d, lambda t: t[NORM][-1:].fill_(-float("inf"))), f"tensor {NORM} in .* not finite"),
    "single file and index": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "both"),
    "a stray file": (lambda d: save_file({"x": torch.zeros(1)}, d / "adapter.safetensors"), "adapter.safetensors is not among"),
    "pickles only": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickle files only"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 5000), "damaged"),
    "a pipe": (lambda d: os.mkfifo(d / "vocab.txt"), "not an ordinary file"),
    "a link outside": (lambda d: (d / "vocab.txt").symlink_to(Path(__file__)), "leads to"),
    "a link to nowhere": (lambda d: (d / "vocab.txt").symlink_to("nothing"), "leads nowhere"),
    "a manifest that is none": (lambda d: (d / manifest.NAME).write_text("[]"), "not a JSON object"),
    "a manifest of files outside": (lambda d: (d / manifest.NAME).write_text(json.dumps(
        {"version": 1, "files": {"../x": {"bytes": 1, "sha256": "0" * 64}}})), "not a file of that directory"),
    "a manifest of another version": (lambda d: (d / manifest.NAME).write_text('{"version": 2}'), "version is 2"),
    "a file shorter than its manifest": (lambda d: (d / manifest.NAME).write_text(json.dumps(
        {"version": 1, "files": {"config.json": {"bytes": 1, "sha256": "0" * 64}}})), "config.json has .* bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_unusable_models_are_refused(case, tmp_path):
    damage, match = CASES[case]
    x = save(random_model("qwen2"), tmp_path / "a" / "x")
    damage(x)
    refused(tmp_path / "a", x, match=match)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin", "a\0.safetensors", "a\\b.safetensors"])
def test_an_index_names_files_of_its_directory(file, tmp_path):
    x = save(random_model("qwen2"), tmp_path / "a" / "x", sharded=True)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "a" / "x.safetensors")
    index = x / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(raw))
    refused(tmp_path / "a", x, match="must be a .safetensors file")


INDICES = {
    "a tensor in another file": lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]}),
    "an unlisted tensor": lambda m: m.pop("model.norm.weight"),
    "a file that is missing": lambda m: m.update({"more": "model-9.safetensors"}),
    "a tensor that is missing": lambda m: m.update({"more": m["model.norm.weight"]}),
    "empty": lambda m: m.clear(),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_says_what_the_files_hold(case, tmp_path):
    x = save(random_model("qwen2"), tmp_path / "a" / "x", sharded=True)
    index = x / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    INDICES[case](raw["weight_map"])
    index.write_text(json.dumps(raw))
    refused(tmp_path / "a", x, match="copy the model again")


def test_configurations_that_add_nothing_or_contradict_are_refused(tmp_path):
    x = save(random_model("qwen2"), tmp_path / "x")
    refused(tmp_path, x, "attention.variant=gqa", match="adds nothing")
    refused(tmp_path, x, "attention.variant=mla", match=r"attention\.variant")
    refused(tmp_path, x, "model.num_layers=3", match=r"model\.num_layers is 3")
    refused(tmp_path, x, "routing.scop=token", match=r"routing\.scope")
    refused(tmp_path, x, "attention.variant=blockmka", match=r"l1\.window")
    refused(tmp_path, x, match='no block "mka"', strip=True)
    import_model(x, tmp_path / "ours")
    refused(tmp_path, tmp_path / "ours", match="converted already")


def test_a_whole_run_s_file_may_be_given(tmp_path):
    run = Path(__file__).parents[3] / "configs" / "run" / "from_hf.yaml"
    import_model(save(random_model("qwen2"), tmp_path / "x"), tmp_path / "ours", [run], ["routing.scope=group"])
    attention, routing, _ = read_sections(str(tmp_path / "ours"))
    assert attention.variant == "fastmka" and routing.scope == "group"


def test_the_output_must_be_new_or_empty(tmp_path):
    x = save(random_model("qwen2"), tmp_path / "x")
    (tmp_path / "empty").mkdir()
    import_model(x, tmp_path / "empty")
    assert (tmp_path / "empty" / manifest.NAME).is_file()
    before = contents(tmp_path / "empty")
    for output, match in ((tmp_path / "empty", "is not empty"), (x, "is not empty"), (x / "config.json", "is a file")):
        with pytest.raises(ConfigError, match=match):
            import_model(x, output)
    assert contents(tmp_path / "empty") == before


def test_a_link_to_an_empty_directory_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    import_model(save(random_model("qwen2"), tmp_path / "x"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / manifest.NAME).is_file()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_cache_is_read_through_its_links(sharded, tmp_path):
    cache = tmp_path / "models--a--b"
    x = write_directory(tmp_path / "x", sharded=sharded)
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    for number, (name, data) in enumerate(contents(x).items()):
        (cache / "blobs" / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(cache / "blobs" / str(number), (snapshot / name).parent))
    import_model(snapshot, tmp_path / "ours")
    assert not any(path.is_symlink() for path in (tmp_path / "ours").rglob("*"))
    strip_model(tmp_path / "ours", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(x)


def test_other_formats_code_and_hidden_files_stay_behind(tmp_path):
    x = save(random_model("qwen2"), tmp_path / "x")
    for name in ("pytorch_model.bin", "model.gguf", "tf_model.h5", "training_args.bin", "modeling.py", ".hidden"):
        (x / name).write_text("x")
    (x / "original").mkdir()
    (x / "original" / "consolidated.00.pth").write_text("x")
    source = import_model(x, tmp_path / "ours")
    assert source.left_out == ("model.gguf", "modeling.py", "original", "pytorch_model.bin", "tf_model.h5", "training_args.bin")
    assert not set(contents(tmp_path / "ours")) & {*source.left_out, ".hidden"}


def test_frequencies_of_old_checkpoints_come_along(tmp_path):
    x = save(random_model("llama").bfloat16(), tmp_path / "x")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(x, lambda tensors: tensors.update({name: torch.ones(4)}))
    import_model(x, tmp_path / "ours")
    assert load(tmp_path / "ours")[name].dtype == torch.float32


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    x = write_directory(tmp_path / "x", sharded=True)
    written = 0

    def full(descriptor, target, count, offset):
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(descriptor, target, count, offset)

    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", full)
    refused(tmp_path, x, match="No space left on device; free some space")


def test_too_little_space_is_seen_beforehand(tmp_path, monkeypatch):
    from mka_megatron.conversion import publish

    x = write_directory(tmp_path / "x")
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(tmp_path, x, match=r"needs 0\.0 GiB")


def test_any_exception_leaves_nothing(tmp_path):
    x = write_directory(tmp_path / "x")

    def fail(directory):
        assert (directory / "config.json").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(x, tmp_path / "ours", remote_code=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_where_the_kernel_cannot_copy_between_files(tmp_path, monkeypatch):
    x = write_directory(tmp_path / "x", sharded=True)

    def refuse(*args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    import_model(x, tmp_path / "ours")
    strip_model(tmp_path / "ours", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(x)


def test_blocks_and_chunks_smaller_than_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 512)
    monkeypatch.setattr(stream, "BLOCK", 2048)
    x = write_directory(tmp_path / "x", "qwen3", sharded=True)
    import_model(x, tmp_path / "ours")
    manifest.verify(tmp_path / "ours")
    strip_model(tmp_path / "ours", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(x)
    y = save(random_model("qwen3"), tmp_path / "a" / "y")
    rewrite(y, lambda tensors: tensors[O_PROJ][-1, -1:].fill_(float("nan")))
    refused(tmp_path / "a", y, match=f"tensor {O_PROJ}")
