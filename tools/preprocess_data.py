"""Tokenise text ahead of time into a Megatron dataset (.bin/.idx), in parallel.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen/Qwen2.5-7B --append-eod --workers 16

writes data/corpus_text_document.bin and .idx; name that prefix as a source (data.train), or give it to
Megatron-LM. With --sft, prompt/response records give data/corpus_sft_document.* and the loss mask beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mka_megatron.config.schema import SourceConfig
from mka_megatron.data.batch import DataError
from mka_megatron.data.encode import Report, write_dataset
from mka_megatron.data.sources import Source, document_fields, open_source
from mka_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, train_bpe

_SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    data = parser.add_argument_group("data")
    data.add_argument("--input", nargs="+", required=True, metavar="SOURCE",
                      help="text, JSON-lines or Parquet files, directories, globs, hf:<name>[:<config>[:<split>]] or stdlib")
    data.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY",
                      help="fields that hold a document; each gives a dataset of its own (default: text)")
    data.add_argument("--sft", action="store_true",
                      help="fields `prompt` and `response`; a loss mask keeps the loss on the response")
    tokens = parser.add_argument_group("tokenizer")
    tokens.add_argument("--tokenizer-type", default="HuggingFaceTokenizer",
                        choices=("HuggingFaceTokenizer", *_SENTENCE_PIECE, "ByteLevelBPE"),
                        help="ByteLevelBPE is trained on the input and saved as <output-prefix>_tokenizer")
    tokens.add_argument("--tokenizer-model", metavar="NAME",
                        help="Hugging Face directory or name, or SentencePiece .model file")
    tokens.add_argument("--vocab-size", type=int, metavar="N",
                        help="ByteLevelBPE: entries to train (default 4096); otherwise the model's, to check against")
    tokens.add_argument("--append-eod", action="store_true", help="end every document with the end-of-text token")
    output = parser.add_argument_group("output and run")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="without _<key>_document.bin")
    output.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that tokenise")
    output.add_argument("--log-interval", type=int, default=10000, metavar="N", help="documents between progress lines")
    return parser.parse_args(argv)


def _tokenizer(args: argparse.Namespace, sources: Sequence[Source]) -> Tokenizer:
    if args.tokenizer_type == "ByteLevelBPE":
        if args.tokenizer_model:
            raise DataError("--tokenizer-model: ByteLevelBPE is trained here; leave it out or use HuggingFaceTokenizer")
        directory = Path(args.output_prefix + "_tokenizer")
        directory.mkdir(parents=True, exist_ok=True)
        records = (record for key in args.json_keys for record in _records(sources, _fields(args, key)))
        train_bpe((text for record in records for text in record), args.vocab_size or 4096, str(directory))
        return HuggingFaceTokenizer(str(directory), "--tokenizer-model")
    if not args.tokenizer_model:
        raise DataError(f"--tokenizer-model: missing, and {args.tokenizer_type} needs it; name the tokenizer")
    load = SentencePieceTokenizer if args.tokenizer_type in _SENTENCE_PIECE else HuggingFaceTokenizer
    tokenizer = load(args.tokenizer_model, "--tokenizer-model")
    if args.vocab_size is not None and tokenizer.vocab_size > args.vocab_size:
        raise DataError(f"--vocab-size: {args.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; raise it")
    return tokenizer


def _fields(args: argparse.Namespace, key: str) -> tuple[str, ...]:
    return document_fields("sft" if args.sft else "pretrain", key)


def _records(sources: Sequence[Source], keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for source in sources:
        yield from source.records(keys)


def _reporter(interval: int) -> Report:
    began, done, written, due = time.monotonic(), 0, 0, interval

    def report(documents: int, characters: int) -> None:
        nonlocal done, written, due
        done, written = done + documents, written + characters
        if done >= due:
            seconds = max(time.monotonic() - began, 1e-9)
            print(f"processed {done} documents ({done / seconds:.0f} docs/s, {written / seconds / 1e6:.2f} MB/s)", flush=True)
            due = done - done % interval + interval

    return report


def _write(prefix: str, sources: Sequence[Source], keys: Sequence[str], tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """One dataset, under a temporary name until it is complete."""
    temporary = f"{prefix}.tmp-{os.getpid()}"
    suffixes = [".loss.bin", ".loss.idx", ".bin", ".idx"] if args.sft else [".bin", ".idx"]
    try:
        hashes = write_dataset(
            _records(sources, keys), temporary, tokenizer, workers=args.workers,
            append_eos=args.append_eod or args.sft, report=_reporter(args.log_interval),
        )
        if not len(hashes):
            raise DataError(f"--input: {', '.join(args.input)} holds no documents with {' and '.join(keys)}; add text")
        for suffix in suffixes:  # the .idx last: readers look for it
            os.replace(temporary + suffix, prefix + suffix)
    finally:
        for suffix in suffixes:
            Path(temporary + suffix).unlink(missing_ok=True)
    print(f"wrote {prefix}.bin and .idx: {len(hashes)} documents", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status. Errors are one sentence on stderr."""
    args = _arguments(argv)
    try:
        if args.workers < 1 or args.log_interval < 1:
            raise DataError("--workers, --log-interval: give at least 1")
        sources = [open_source(SourceConfig(path), "--input") for path in args.input]
        for source in sources:
            if source.prefix is not None:
                raise DataError(f"--input: '{source.path}' is tokenised already; name it in data.train as it is")
        Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(args, sources)
        for key in ["sft"] if args.sft else args.json_keys:
            _write(f"{args.output_prefix}_{key}_document", sources, _fields(args, key), tokenizer, args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
