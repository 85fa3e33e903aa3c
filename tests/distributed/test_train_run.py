"""The command from start to end: what it writes, and that the model learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import Run, Workplace

STEPS = 60


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(workplace: Workplace) -> Run:
    return workplace.start("full", "logging.profile_steps=[7]").finish()


@pytest.fixture(scope="module")
def board(run: Run) -> EventAccumulator:
    events = EventAccumulator(str(run.out / "tensorboard"))
    events.Reload()
    return events


def test_held_out_perplexity_falls_at_every_evaluation(run: Run) -> None:
    found = run.metrics()["evaluations"]
    assert [item["step"] for item in found] == [15, 30, 45, 60]
    assert [item["consumed_samples"] for item in found] == [60, 120, 180, 240]
    values = [item["perplexity"] for item in found]
    assert all(later < earlier for earlier, later in zip([384 / 2, *values], values, strict=False)), values
    for item in found:
        assert item["perplexity"] == pytest.approx(math.exp(item["loss"]))
        assert 0 < item["tokens"] <= 8 * 4 * 64


def test_metrics_sum_the_run_up(run: Run) -> None:
    metrics = run.metrics()
    assert (metrics["finished"], metrics["interrupted"], metrics["step"]) == (True, None, STEPS)
    assert metrics["resumed_from"] is None
    final = metrics["final"]
    assert final["valid_loss"] == metrics["evaluations"][-1]["loss"]
    last = [float.fromhex(loss) for _, loss, _ in run.losses()[-5:]]
    assert final["train_loss"] == pytest.approx(sum(last) / 5)
    # A bigram model of real text is better than chance and worse than knowing the text.
    assert 1 < final["bigram_perplexity"] < 384
    assert metrics["throughput"]["steps"] == STEPS
    assert metrics["throughput"]["tokens_per_second"] == pytest.approx(
        STEPS * 4 * 64 / metrics["throughput"]["seconds"]
    )
    assert metrics["config"]["model"]["hidden_size"] == 64
    assert {"python", "torch", "megatron-core", "deepspeed"} <= metrics["versions"].keys()
    assert metrics["peak_memory_gib"] > 0
    assert (run.out / "checkpoints" / "step-00000060").samefile(metrics["checkpoint"])


def test_the_checkpoint_names_its_tokenizer(run: Run) -> None:
    body = json.loads((run.out / "checkpoints/step-00000060/manifest.json").read_text())["body"]
    trained = Path(run.metrics()["config"]["data"]["cache_dir"], "tokenizers").glob("[!.]*")
    assert [body["state"]["tokenizer"]] == [str(path) for path in trained]


def test_every_step_is_in_the_loss_log(run: Run) -> None:
    found = run.losses()
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert float.fromhex(found[0][1]) == pytest.approx(math.log(384), rel=0.05)


def test_tensorboard_has_the_curves(run: Run, board: EventAccumulator) -> None:
    losses = {step: float.fromhex(loss) for step, loss, _ in run.losses()}
    points = {event.step: event.value for event in board.Scalars("lm loss")}
    assert list(points) == list(range(5, STEPS + 1, 5))
    for step, value in points.items():
        assert value == pytest.approx(sum(losses[step - i] for i in range(5)) / 5, rel=1e-6)
    validation = [(event.step, event.value) for event in board.Scalars("lm loss validation")]
    assert validation == [(step, pytest.approx(loss, rel=1e-6)) for step, loss, _ in run.evaluations()]
    for tag in ("lm loss validation ppl", "learning-rate", "grad-norm", "params-norm", "loss-scale", "batch-size",
                "iteration-time", "throughput", "throughput(tps)", "time_metrics/data_loading(s)",
                "memory/max_resident(GiB)", "gate/layer 01 entropy"):
        assert all(math.isfinite(event.value) for event in board.Scalars(tag)) and board.Scalars(tag), tag
    rates = [event.value for event in board.Scalars("learning-rate")]
    assert max(rates) == pytest.approx(5e-3) and rates[-1] == pytest.approx(2e-4)


def test_gate_shares_sum_to_one(board: EventAccumulator) -> None:
    for layer in range(2):
        shares = zip(*(board.Scalars(f"gate/layer {layer:02d} l{level} share") for level in (1, 2)), strict=True)
        assert all(sum(event.value for event in pair) == pytest.approx(1) for pair in shares)


def test_the_log_is_lines_and_ends_with_the_table(run: Run) -> None:
    text = run.text()
    assert "\r" not in text and "\x1b" not in text
    assert sum("tok/s" in line for line in text.splitlines()) == STEPS // 5
    for name in ("train loss", "held-out loss", "held-out perplexity", "bigram perplexity, same tokens",
                 "tokens per second", "time in training steps", "peak memory of a rank", "checkpoint"):
        assert any(line.startswith(f"│ {name} ") for line in text.splitlines()), name


def test_the_chosen_step_has_a_trace(run: Run) -> None:
    assert [path.name for path in (run.out / "profile").iterdir()] == ["step_0000007_rank0.json"]
    events = json.loads((run.out / "profile" / "step_0000007_rank0.json").read_text())["traceEvents"]
    assert any("backward" in event.get("name", "").lower() for event in events)


def test_a_run_that_begins_at_anothers_checkpoint_goes_on_with_its_own(run: Run, workplace: Workplace) -> None:
    """A requeued job has the command that began it."""
    there = run.out / "checkpoints" / "step-00000060"
    for begin, end in ((60, 64), (64, 66)):
        branch = workplace.start("branch", f"training.resume={there}", f"training.steps={end}").finish()
        assert branch.metrics()["resumed_from"] == begin
        assert [step for step, _, _ in branch.losses()][-(end - begin):] == list(range(begin + 1, end + 1))


def test_a_damaged_checkpoint_takes_no_intact_ones_place(workplace: Workplace) -> None:
    few = ("training.keep_last=2", "training.eval_interval=0", "training.eval_batches=1")
    folder = workplace.start("damaged", *few, "training.steps=16").finish().out / "checkpoints"
    (folder / "step-00000016/manifest.json").write_text("damaged")
    again = workplace.start("damaged", *few, "training.steps=20", "training.save_interval=20").finish()
    assert again.metrics()["resumed_from"] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000020"]


def test_a_second_start_goes_on_from_the_end(run: Run, workplace: Workplace) -> None:
    before = run.losses(), run.evaluations()
    again = workplace.start("full").finish()
    assert (again.losses(), again.evaluations()) == before
    assert again.metrics()["resumed_from"] == STEPS
    assert again.metrics()["final"]["bigram_loss"] is not None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.global_batch_size=3", "training.global_batch_size is 3"),  # refused before the ranks meet
        ("data.train=[{path: /nowhere/at/all}]", "data.train[0].path: '/nowhere/at/all'"),  # by rank 0, the other waits
    ],
)
def test_a_refusal_is_said_once(override: str, sentence: str, workplace: Workplace) -> None:
    run = workplace.start("refused", override, ranks=2)
    assert run.wait() != 0
    assert run.text().count(sentence) == 1
    assert "mka_megatron/training/loop.py" not in run.text()  # no traceback of ours


def test_two_ranks_that_share_rows_report_what_one_does(workplace: Workplace) -> None:
    """Losses, evaluation and the gates' mean shares; roundoff apart."""
    short = ("training.steps=6", "training.eval_interval=0", "training.save_interval=0", "logging.interval=6")
    one = workplace.start("alone", *short).finish()
    two = workplace.start("shared", *short, "parallel.context_parallel=2", ranks=2).finish()
    losses = [[float.fromhex(loss) for _, loss, _ in each.losses()] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    final = [each.metrics()["final"] for each in (one, two)]
    assert final[1]["valid_tokens"] == final[0]["valid_tokens"]
    assert final[1]["valid_loss"] == pytest.approx(final[0]["valid_loss"], rel=1e-6)
    boards = [EventAccumulator(str(each.out / "tensorboard")) for each in (one, two)]
    for each in boards:
        each.Reload()
    tags = [tag for tag in boards[0].Tags()["scalars"] if "route" in tag or "gate" in tag]
    assert tags
    for tag in tags:
        alone, shared = (each.Scalars(tag)[-1].value for each in boards)
        assert shared == pytest.approx(alone, rel=1e-5), tag
