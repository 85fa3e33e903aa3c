"""The training command in this process, with a loss of NaN in some steps: for each run of the JSON file, [output_dir,
arguments], what it printed and returned three times over: with the bad steps, the same again, and without them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch

from mka_megatron.training import __main__ as command
from mka_megatron.training.engine import Engine

BAD = (3, 6, 7, 8)


def told(out: Path, arguments: list[str], bad: set[int]) -> dict[str, object]:
    forward = Engine._forward

    def spoiled(self, batch, session):  # type: ignore[no-untyped-def]
        nll = forward(self, batch, session)
        return nll * torch.nan if self.model.training and self.step + 1 in bad else nll

    Engine._forward = spoiled  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as refused:
            code = command.main(arguments)
    finally:
        Engine._forward = forward  # type: ignore[method-assign]
    return {"code": code, "printed": printed.getvalue(), "refused": refused.getvalue(),
            "losses": (out / "losses.jsonl").read_text()}  # fmt: skip


if __name__ == "__main__":
    for directory, arguments in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(directory)
        turns = [told(out, arguments, set(bad)) for bad in (BAD, BAD, ())]
        (out / "told.json").write_text(json.dumps(turns))
