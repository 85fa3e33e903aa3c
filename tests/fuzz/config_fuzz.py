"""Mutated configurations: each is taken, or refused in one sentence, in time.

    python -m tests.fuzz.config_fuzz --count 20000 --seed 7      # one line of JSON; exit code 1 with the first fault

Every case is a folder of files made from the shipped ones by a seeded generator, read by one of the loaders that the
tools use. What is taken then goes to everything that a run computes from it before it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from mka_megatron.config.errors import ConfigError
from tests.fuzz.before_start import prepare, read
from tests.fuzz.cases import Case, make
from tests.fuzz.mutations import KEYS, SECTIONS

SECONDS = 2.0
"""Of the process, per case: a loaded machine does not count."""
EXTRA_BYTES = 768 << 20
"""Address space that all cases together may take beyond what the imports did."""
LONGEST_SENTENCE = 600


class TooLongError(Exception):
    """A case took more than SECONDS."""


def fault(message: str, case: Case) -> str | None:
    """What is wrong with a refusal, None where it is one sentence that says where to look."""
    if not message.isprintable():
        return "the message has line breaks or control characters"
    if not message.endswith(".") or message != message.strip():
        return "the message is not one sentence"
    if len(message) >= LONGEST_SENTENCE:
        return f"the message has {len(message)} characters"
    names = [*KEYS, *SECTIONS, *case.names, "Argument ", "the command line", " is not an option"]
    return None if any(name in message for name in names) else "the message names no key and no file"


def run(case: Case, folder: Path) -> tuple[str, str | None]:
    """(outcome, fault) of one case: valid or refused, and what is wrong about it."""
    try:
        with _time_limit(SECONDS):
            config = read(case, folder)
    except ConfigError as error:
        return "refused", _judged(error, case)
    except Exception:
        return "broken", traceback.format_exc()
    try:
        with _time_limit(SECONDS):
            prepare(config, case.world_size, whole_run=case.loader != "attention")
    except ConfigError as error:
        return "refused later", _judged(error, case)
    except Exception:
        return "broken", traceback.format_exc()
    return "valid", None


def _judged(error: ConfigError, case: Case) -> str | None:
    wrong = fault(str(error), case)
    return wrong and f"{wrong}: {str(error)!r}"


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TooLongError after so many seconds of the process."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def limit_memory() -> None:
    """A case that takes more ends in MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="cases are seed x 10^9 and the numbers after it")
    parser.add_argument("--only", type=int, help="run this case and print its files")
    parser.add_argument("--keep-going", action="store_true", help="report every fault, not the first alone")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    limit_memory()
    outcomes: Counter[str] = Counter()
    slowest, faults, began = 0.0, 0, time.monotonic()
    numbers = [arguments.only] if arguments.only is not None else range(arguments.count)
    for number in numbers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            case = make(random.Random(number + arguments.seed * 10**9), folder)  # noqa: S311
            if arguments.only is not None:
                print(case, *(f"--- {path.name}\n{path.read_bytes()[:3000]!r}" for path in folder.rglob("*") if path.is_file()), sep="\n")
            started = time.process_time()
            outcome, wrong = run(case, folder)
            slowest = max(slowest, time.process_time() - started)
            outcomes[outcome] += 1
            if wrong is not None:
                faults += 1
                print(f"case {number} of seed {arguments.seed}, {case.loader} {case.files} {case.overrides}: {wrong}", file=sys.stderr)
                if not arguments.keep_going:
                    return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"cases": len(numbers), **outcomes, "faults": faults, "slowest_s": round(slowest, 2), "peak_mib": peak,
                      "wall_s": round(time.monotonic() - began, 1)}))  # fmt: skip
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
