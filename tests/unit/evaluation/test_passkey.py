"""The passkey task: the published text, honoured bounds, and the score."""

from __future__ import annotations

import random
import re

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
