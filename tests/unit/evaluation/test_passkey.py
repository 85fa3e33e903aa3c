"""The passkey task: the published text, honoured bounds, and the score."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from mka_megatron.evaluation.passkey import Passkey, found, prompt

# Of run_test.py in the authors' repository, written down once more.
TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there."
GARBAGE = " ".join(
    ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 2000
)


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311


def words(text: str) -> int:
    """A crude tokenizer: a word is one token and a character of anything else too; not additive at cuts."""
    return len(re.findall(r"\w+|[^\w ]", text))


def letters(text: str) -> int:
    return len(text.encode())


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 88), (89, 90), (91, 3000), (178, 179), (5000, 0)])
def test_the_text_is_the_published_one(before: int, after: int) -> None:
    expected = [
        TASK,
        GARBAGE[:before],
        "The pass key is 4711. Remember it. 4711 is the pass key.",
        GARBAGE[:after],
        "What is the pass key? The pass key is",
    ]
    assert prompt(4711, before, after) == "\n".join(expected)


@pytest.mark.parametrize("count", [words, letters])
@pytest.mark.parametrize(("length", "distance"), [(900, 0), (900, 512), (2000, 1600), (1024, 700)])
def test_length_and_distance_are_honoured(count, length: int, distance: int) -> None:
    task, rng = Passkey(count, length, distance), seeded(0)
    trials, shares = [task.trial(rng) for _ in range(150)], []
    for trial in trials:
        line = f"The pass key is {trial.key}. Remember it. {trial.key} is the pass key."
        before, after = trial.prompt.split(line)
        assert length - 20 < count(trial.prompt) <= length
        assert trial.distance == count(after) >= distance
        assert trial.response == f" {trial.key}"
        task_line, garbage = before.removesuffix("\n").split("\n")
        assert task_line == TASK and GARBAGE.startswith(garbage)
        shares.append(len(garbage) / len(trial.prompt))
    # at any depth that is left
    assert min(shares) < 0.1 * max(shares)
    assert min(trial.distance for trial in trials) < distance + 0.1 * (length - distance)


def test_keys_cover_their_range() -> None:
    task, rng = Passkey(words, 200), seeded(1)
    keys = [task.trial(rng).key for _ in range(400)]
    assert min(keys) >= 1 and max(keys) <= 50000
    assert min(keys) < 1000 and max(keys) > 49000 and len(set(keys)) > 390


def test_trials_depend_on_the_generator_only() -> None:
    task = Passkey(words, 300, 60)
    first = [task.trial(rng) for rng in (seeded(5) for _ in range(3))]
    assert first == [task.trial(rng) for rng in (seeded(5) for _ in range(3))]
    assert len(set(first)) == 1 and first[0] != task.trial(seeded(6))


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="length 300 leaves no room for a key 290 tokens back"):
        Passkey(words, 300, 290)
    with pytest.raises(ValueError, match="length 20 "):
        Passkey(words, 20)


@pytest.mark.parametrize(
    ("continuation", "right"),
    [(" 123", True), (" 123. Remember", True), ("123", True), (" 1234", False), (" 12", False), ("", False),
     (" is", False), (" 0123", False), (" 9 or 123", False), ("\n123\n456", True)],
)  # fmt: skip
def test_the_first_number_has_to_be_the_key(continuation: str, right: bool) -> None:
    assert found(continuation, 123) is right


TINY = [
    "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.num_attention_heads=2",
    "model.num_kv_heads=2", "model.head_dim=16", "routing.gate_hidden_size=8", "memory_hierarchy.l1.chunk_size=16",
    "memory_hierarchy.l1.window=32", "data.sequence_length=288", "training.steps=5", "training.warmup_steps=1",
]  # fmt: skip


def test_the_tool_reports_what_it_says(topology, tmp_path: Path) -> None:
    from mka_megatron.config.load import load_config
    from tools import passkey

    config = load_config("configs/run/passkey.yaml", [*TINY, f"training.output_dir={tmp_path}"])
    figures = passkey.measure(config, 3, 0, topology)
    assert list(figures["accuracy"]) == [
        "with L3", "with L3, 64-bit codes", "with L3, 128-bit codes", "with L3, 256-bit codes",
        "with L3, exact selection", "the same weights, L3 hidden", "trained without L3"]  # fmt: skip
    assert all(sum(cell[1] for cell in row.values()) == 3 for row in figures["by_windows_back"].values())
    assert all(0 < value <= 1 for table in figures["recall"].values() for value in table.values())
    assert "| 64 bits x 1 |" in passkey.table(figures)


def test_the_answer_begins_a_chunk(tmp_path: Path) -> None:
    from mka_megatron.config.load import load_config
    from mka_megatron.data.packing import Packing
    from mka_megatron.data.prepare import prepare
    from tools import passkey

    config = load_config("configs/run/passkey.yaml", [*TINY, f"training.output_dir={tmp_path}"])
    tokenizer = passkey.passkey_tokenizer(tmp_path / "tokenizer")
    trials, sources = passkey.write_data(config, tokenizer, 20, 0, tmp_path / "data")
    data = prepare(passkey.stage_data(config, sources[-1], tokenizer, tmp_path), progress=False)
    packing = Packing(data.valid[0], sequence_length=288, chunk_size=16, split_documents=False, seed=None)
    assert len(packing) == len(trials) == 20
    for number, trial in enumerate(trials):
        row = packing.row(number)
        prompt_tokens = tokenizer.encode([trial.prompt])[0]
        begin = -(-len(prompt_tokens) // 16) * 16
        assert row.tokens[: len(prompt_tokens)].tolist() == prompt_tokens
        assert row.padding[len(prompt_tokens) : begin].all() and not row.padding[begin]
        answer = [*tokenizer.encode([trial.response])[0], tokenizer.eos_id]
        assert row.tokens[begin : begin + len(answer)].tolist() == answer
        assert len(answer) == 2 + len(str(trial.key))  # a blank, the digits one by one, the end
        assert row.labels[row.labels >= 0].tolist() == answer
        assert row.labels[len(prompt_tokens) - 1] == answer[0]
