"""Fine-tuning in one process: what a step computes, what a seed fixes, what a resume brings back, what is reported."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mka_megatron.config.fine_tune import FineTuneConfig, load_fine_tune
from mka_megatron.data.batch import IGNORE
from mka_megatron.data.prepare import prepare
from mka_megatron.hf import patch_model, training_model
from mka_megatron.hf.ranks import Ranks
from mka_megatron.hf.training import NonFiniteError, Run, fine_tune, learning_rate
from mka_megatron.hf.training_data import Inputs, evaluation_batches, training_batches
from tests.helpers.fine_tuning import FineTuning
from tests.helpers.launch import ROOT
from tests.helpers.numerics import assert_bitwise, assert_same

ALONE = Ranks(0, 1, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> FineTuning:
    return FineTuning(tmp_path_factory.mktemp("fine-tuning"))


def config(workplace: FineTuning, out: Path, *overrides: str) -> FineTuneConfig:
    return load_fine_tune(workplace.config, [f"output_dir={out}", *overrides])


def losses(out: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_hex"], line["grad_norm_hex"]) for line in lines]


@pytest.fixture(scope="module")
def full(workplace: FineTuning, tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run, and what it returned."""
    out = tmp_path_factory.mktemp("full")
    return out, fine_tune(config(workplace, out, "deterministic=true", "eval_ppl=true"))


@pytest.mark.parametrize("variant", ["gqa", "fastmka"])
def test_the_curve_is_a_plain_loops(variant: str, workplace: FineTuning, tmp_path: Path) -> None:
    """A loop of PyTorch and transformers alone, one document at a time in one batch of all micro-batches."""
    run = config(workplace, tmp_path, f"attention.variant={variant}", "weight_decay=0.1")
    fine_tune(run)
    found = torch.tensor([float.fromhex(loss) for _, loss, _ in losses(tmp_path)])
    norms = torch.tensor([float.fromhex(norm) for *_, norm in losses(tmp_path)])
    model = AutoModelForCausalLM.from_pretrained(workplace.model)
    if variant != "gqa":
        patch_model(model, run.architecture, run.seed)
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "bias" not in n and "decay" not in n]
    others = [p for p in model.parameters() if not any(p is each for each in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    data = prepare(replace(run.data, tokenizer=str(workplace.model)), progress=False)
    expected, expected_norms = [], []
    with training_batches(run, data, ALONE, 0) as batches:
        for step in range(6):
            rate = 3e-3 * (step + 1) / 2 if step < 2 else 3e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 4))
            total, labels = torch.zeros(()), 0
            for batch in next(batches):
                for row, begin, end in batch.documents.spans:
                    target = batch.labels[row, begin:end]
                    logits = model(batch.tokens[row : row + 1, begin:end]).logits[0]
                    total = total + F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
                    labels += int((target != IGNORE).sum())
            (total / labels).backward()
            expected.append(float(total.detach()) / labels)
            expected_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    terms = 4 * 4 * 64  # labels of a step, over a few steps
    assert_same(found, torch.tensor(expected).double(), terms)
    assert_same(norms, torch.tensor(expected_norms).double(), terms)
    assert found[-1] < found[0]


def test_the_rate_rises_to_the_peak_and_falls_to_the_floor(workplace: FineTuning, tmp_path: Path) -> None:
    run = config(workplace, tmp_path, "min_learning_rate=1e-4")
    rates = [learning_rate(step, 6, run) for step in range(6)]
    assert rates[:2] == [1.5e-3, 3e-3]
    assert rates == [rates[0], *sorted(rates[1:], reverse=True)]
    assert rates[-1] == pytest.approx(1e-4)


def test_equal_seeds_equal_bits(workplace: FineTuning, full: tuple[Path, dict], tmp_path: Path) -> None:
    fine_tune(config(workplace, tmp_path / "again", "deterministic=true"))
    assert losses(tmp_path / "again") == losses(full[0])
    fine_tune(config(workplace, tmp_path / "other", "deterministic=true", "seed=7"))
    assert losses(tmp_path / "other") != losses(full[0])
    torch.use_deterministic_algorithms(False)


def test_a_resumed_run_is_the_uninterrupted_one(workplace: FineTuning, full: tuple[Path, dict], tmp_path: Path) -> None:
    run = Run(config(workplace, tmp_path, "deterministic=true", "eval_ppl=true"), ALONE)
    steps = 0

    def stop_after_three() -> signal.Signals | None:
        nonlocal steps
        steps += 1
        return signal.SIGTERM if steps == 3 else None

    ranks = Ranks(0, 1, 1, torch.device("cpu"))
    ranks.stop = stop_after_three  # type: ignore[method-assign]
    run.ranks = ranks
    first = run.run()
    assert (first["interrupted"], first["finished"], first["step"]) == ("SIGTERM", False, 3)
    second = fine_tune(config(workplace, tmp_path, "deterministic=true", "eval_ppl=true"))
    assert second["resumed_from"] == 3
    assert losses(tmp_path) == losses(full[0])
    for key in ("train_mean_loss", "eval_perplexity", "eval_perplexity_start", "parameters", "finished"):
        assert second[key] == full[1][key], key
    third = fine_tune(config(workplace, tmp_path, "deterministic=true"))
    assert third["step"] == 6 and third["resumed_from"] == 6 and losses(tmp_path) == losses(full[0])
    torch.use_deterministic_algorithms(False)


def test_the_report(full: tuple[Path, dict]) -> None:
    out, metrics = full
    assert json.loads((out / "metrics.json").read_text()).items() >= metrics.items()
    found = [float.fromhex(loss) for _, loss, _ in losses(out)]
    assert metrics["train_mean_loss"] == pytest.approx(sum(found) / 6)
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert metrics["train_total_elapsed_s"] == pytest.approx(sum(line["seconds"] for line in lines))
    warm = lines[2:]  # two steps of warm-up
    assert metrics["train_throughput_tok_s"] == pytest.approx(
        sum(line["tokens"] for line in warm) / sum(line["seconds"] for line in warm))
    assert metrics["eval_perplexity"] < metrics["eval_perplexity_start"]
    assert metrics["eval_perplexity_start"] == pytest.approx(384, rel=0.05)  # a random model knows nothing
    if not torch.cuda.is_available():
        assert metrics["peak_gpu_memory_gb"] == 0.0
    assert metrics["peak_rss_gb"] > 0.1


def test_tensorboard_has_the_curves(full: tuple[Path, dict]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(full[0] / "tensorboard"))
    board.Reload()
    found = [float.fromhex(loss) for _, loss, _ in losses(full[0])]
    points = {event.step: event.value for event in board.Scalars("lm loss")}
    assert points == {step: pytest.approx((found[step - 2] + found[step - 1]) / 2) for step in (2, 4, 6)}
    assert [event.step for event in board.Scalars("lm loss validation ppl")] == [0, 6]


def test_the_checkpoint_is_a_model_of_transformers(full: tuple[Path, dict], workplace: FineTuning) -> None:
    from transformers import AutoTokenizer

    folder = full[1]["checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.mka["attention"]["variant"] == "fastmka"
    assert any(float(layer.self_attn.route.beta.detach()) != 0 for layer in model.model.layers)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == model.generation_config.pad_token_id


@pytest.mark.parametrize("stride", [None, 64, 16])
def test_perplexity_counts_every_label_once(stride: int | None, workplace: FineTuning, tmp_path: Path) -> None:
    """Against each document on its own, by transformers: in cut windows, or with all the context that fits."""
    run = config(workplace, tmp_path, "attention.variant=gqa", "eval_ppl=true", "max_steps=0", "batch_size=3",
                 f"eval_stride={'null' if stride is None else stride}")
    metrics = fine_tune(run)
    model = AutoModelForCausalLM.from_pretrained(workplace.model).eval()
    data = prepare(replace(run.data, tokenizer=str(workplace.model)), progress=False)
    total, labels = 0.0, 0
    if stride is None:  # rows are cut out of the packed documents: take them as they are, one document at a time
        pieces = [(batch.tokens[row, begin:end], batch.labels[row, begin:end])
                  for batch in evaluation_batches(run, data, ALONE) for row, begin, end in batch.documents.spans]
    else:
        pieces = []
        for corpus in data.valid:
            for document, count in enumerate(corpus.lengths.tolist()):
                ids = torch.from_numpy(corpus.read(document, 0, count))
                done = 0
                while done < count - 1:
                    end = min(count - 1, max(64, done + stride))
                    begin = max(0, end - 64)
                    label = ids[begin + 1 : end + 1].clone()
                    label[: done - begin] = IGNORE
                    pieces.append((ids[begin:end], label))
                    done = end
    with torch.no_grad():
        for tokens, label in pieces:
            total += float(F.cross_entropy(model(tokens[None]).logits[0].double(), label, ignore_index=IGNORE, reduction="sum"))
            labels += int((label != IGNORE).sum())
    everything = sum(int((corpus.lengths - 1).sum()) for corpus in data.valid)
    assert labels == everything
    found = torch.tensor([math.log(metrics["eval_perplexity"])], dtype=torch.float32)
    assert_same(found, torch.tensor([total / labels], dtype=torch.float64), 64)


def test_padding_is_the_end_of_text_and_a_document_of_its_own(workplace: FineTuning, tmp_path: Path) -> None:
    run = config(workplace, tmp_path, "eval_ppl=true", "eval_stride=16")
    data = prepare(replace(run.data, tokenizer=str(workplace.model)), progress=False)
    padded = [batch for batch in evaluation_batches(run, data, ALONE) if batch.documents.padding is not None]
    assert padded
    for batch in padded:
        inputs = Inputs.of(batch, eos_id=5)
        padding = batch.documents.padding
        assert bool((inputs.tokens[padding] == 5).all())
        assert bool((inputs.labels[padding] == IGNORE).all())
        assert inputs.count == int((~padding).sum())
        first = padding.long().argmax(dim=1)
        for row in range(len(padding)):
            if padding[row].any():
                assert inputs.positions[row, first[row] :].tolist() == list(range(64 - int(first[row])))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/train_hf.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_command_reports_json_on_stdout(workplace: FineTuning, tmp_path: Path) -> None:
    done = command(workplace.config, f"output_dir={tmp_path}", "max_steps=2", "eval_batches=2", "--eval-ppl")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout).keys() >= {
        "train_mean_loss", "train_total_elapsed_s", "train_throughput_tok_s", "peak_gpu_memory_gb", "eval_perplexity"}
    assert "validation ppl" in done.stderr and "step 2/2" in done.stderr


REFUSED = [
    ("warmup_step=3", "warmup_step in the command line is not a configuration key; did you mean warmup_steps."),
    ("learning_rate=fast", "learning_rate is fast in the command line: it must be a number."),
    ("tp_size=0", "tp_size is 0: it must be at least 1."),
    ("model.init_from=null", "model.init_from is null: there is nothing to fine-tune; give a Hugging Face directory or hub name."),
    ("attention.variant=mha", "attention.variant is mha: the weights of model.init_from have 2 KV heads"),
    ("attention.variant=blockmka", "memory_hierarchy.l1.window is null: the block core needs a window"),
    ("data.sequence_length=512", "data.sequence_length is 512: the model's max_position_embeddings is 256"),
    ("data.pad_documents_to_chunks=true", "data.pad_documents_to_chunks is true: here the model itself puts"),
    ("memory_hierarchy.l3.placement=ssd", "memory_hierarchy.l3.placement is ssd: fine-tuning keeps a whole sample"),
    ("eval_stride=65", "eval_stride is 65: tokens between the windows would not count"),
    ("min_learning_rate=1", "min_learning_rate is 1.0: it must be at most learning_rate (0.003)."),
    ("adam_beta2=1", "adam_beta2 is 1.0: it must be less than 1."),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_a_wrong_configuration_is_one_sentence(override: str, message: str, workplace: FineTuning, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        config(workplace, tmp_path, override)
    assert str(refusal.value).startswith(message)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_ranks_must_fit_tp_size(workplace: FineTuning) -> None:
    with pytest.raises(ValueError, match="tp_size is 2 but 3 processes were started: start a multiple of it"):
        load_fine_tune(workplace.config, ["tp_size=2"], world_size=3)
    with pytest.raises(ValueError, match="tp_size is 4: it must divide the model's 2 KV heads"):
        load_fine_tune(workplace.config, ["tp_size=4", "attention.variant=gqa"], world_size=4)


def test_a_damaged_checkpoint_is_refused(workplace: FineTuning, full: tuple[Path, dict], tmp_path: Path) -> None:
    for number, name in enumerate(("model.safetensors", "trainer_state.json")):
        out = tmp_path / str(number)
        shutil.copytree(full[0], out)
        file = out / "checkpoint-6" / name
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"is not intact: {name} is missing or damaged; remove that directory"):
            fine_tune(config(workplace, out))
    with pytest.raises(ValueError, match=r"resume is none: .*checkpoint-6 is there; move it away"):
        fine_tune(config(workplace, full[0], "resume=none"))


@pytest.mark.parametrize(("override", "what"), [
    ("attention.variant=gqa", r"attention\.variant"), ("attention.fuse=k", "attention"), ("seed=8", "seed 1234"),
    ("routing.gate_hidden_size=4", "routing"), ("gradient_accumulation=1", "samples per step 4"),
    ("data.sequence_length=32", r"data\.sequence_length 64"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(
    override: str, what: str, workplace: FineTuning, full: tuple[Path, dict], tmp_path: Path
) -> None:
    shutil.copytree(full[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=rf"written with another configuration \({what}\): set it back"):
        fine_tune(config(workplace, tmp_path, override))


def test_a_loss_that_is_not_finite_stops_the_run(workplace: FineTuning, tmp_path: Path) -> None:
    run = Run(config(workplace, tmp_path), ALONE)
    with torch.no_grad():
        run.model.model.norm.weight[3] = math.nan
    before = [parameter.clone() for parameter in run.model.parameters()]
    with pytest.raises(NonFiniteError, match="Step 1: the loss is nan and the gradient norm nan; go on from the start"):
        run.run()
    for parameter, old in zip(run.model.parameters(), before, strict=True):
        assert_bitwise(parameter, old)


def test_half_precision_and_checkpointed_layers_train(workplace: FineTuning, full: tuple[Path, dict], tmp_path: Path) -> None:
    """bf16 leaves the weights in fp32; layers computed again give the same bits."""
    fine_tune(config(workplace, tmp_path / "again", "gradient_checkpointing=true", "deterministic=true"))
    assert losses(tmp_path / "again") == losses(full[0])
    torch.use_deterministic_algorithms(False)
    metrics = fine_tune(config(workplace, tmp_path / "half", "precision=bf16"))
    kept = AutoModelForCausalLM.from_pretrained(metrics["checkpoint"], dtype="auto")
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.float32}
    assert losses(tmp_path / "half") != losses(full[0])
    assert metrics["train_mean_loss"] == pytest.approx(full[1]["train_mean_loss"], rel=0.01)


def test_a_large_vocabulary_is_worked_through_in_pieces(
    workplace: FineTuning, full: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_model, "_LOGITS", 384 * 50)  # 50 of 128 tokens at a time
    fine_tune(config(workplace, tmp_path))
    found, expected = (torch.tensor([float.fromhex(loss) for _, loss, _ in losses(out)]) for out in (tmp_path, full[0]))
    assert_same(found, expected.double(), 4 * 64)
