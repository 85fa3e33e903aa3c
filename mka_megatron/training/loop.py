"""One training run: data, model, engine, resume, steps, evaluations, checkpoints, summary.

Every rank runs the same code; rank 0 alone holds a Monitor and a display. The position in the data is the
number of consumed samples, global_batch_size per step, and nothing else; the checkpoint holds it.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch, DataError
from mka_megatron.data.loader import Prefetcher, ValidBatches, train_batches, valid_batches
from mka_megatron.data.ngram import bigram_nll
from mka_megatron.data.prepare import prepare
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups, rng
from mka_megatron.parallel.groups import Topology
from mka_megatron.planning.cluster import peak_flops
from mka_megatron.planning.flops import model_flops
from mka_megatron.training import profile
from mka_megatron.training.engine import Engine, NonFiniteError, StepResult, construction_context
from mka_megatron.training.host import memory_gib
from mka_megatron.training.interrupt import Interrupt
from mka_megatron.training.monitor import Monitor
from mka_megatron.training.norms import parameter_count, parameter_norm
from mka_megatron.training.progress import Display
from mka_megatron.training.records import Evaluation, StepRecord, perplexity
from mka_megatron.training.saving import Saver
from mka_megatron.training.start import begins_at, check_output, rank_0_first, resume
from mka_megatron.training.summary import Summary, Throughput, metrics, rows
from mka_megatron.training.watchdog import Watchdog

_BIGRAM_TOKENS = 1_000_000_000  # minutes of counting
_COLLECTIVE_LIMIT = 2  # times engine.timeout_seconds: the watchdog is to find a hang first, and say where it is

log = logging.getLogger(__name__)


class RankLostError(RuntimeError):
    """Another rank is gone, and with it the connection to it; the message is one sentence."""


def train(config: Config) -> Summary:
    """Run `config` to its end, or to the step boundary after a signal.

    Args:
        config: a validated configuration.

    Raises:
        ConfigError, DataError, CheckpointError: the run cannot start; one sentence says what to change.
        PeerFailedError: rank 0 raised one of these while this rank waited.
        NonFiniteError: too many consecutive steps without a finite loss and gradient.
        RankLostError: another rank died.
    """
    check_output(config.training)
    limit = config.engine.timeout_seconds
    topology = groups.initialize(config.parallel, _COLLECTIVE_LIMIT * limit, config.training.seed)
    rng.seed_host(config.training.seed)
    try:
        profile.check(config.logging.memory_snapshot_steps, topology.device)
        with Watchdog(Path(config.training.output_dir), topology.rank, topology.world_size, limit) as watchdog:
            try:
                return Run(config, topology, watchdog).run()
            except RuntimeError as error:
                if not _connection_lost(error):
                    raise
                raise RankLostError(
                    f"another rank was lost in {watchdog.doing} ({_reason(error)}), and its own message says why; "
                    "a new start goes on from the newest checkpoint."
                ) from error
    finally:
        groups.destroy()


@dataclass
class Tally:
    """Training steps of this process so far."""

    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    flops: float = 0.0

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        self.skipped += record.skipped
        self.tokens += record.processed
        self.seconds += record.seconds
        self.data_seconds += record.data_seconds
        self.flops += record.flops

    def throughput(self) -> Throughput:
        """The figures so far."""
        return Throughput(self.steps, self.tokens, self.seconds, self.data_seconds, self.flops)


class Run:
    """The parts of a run, built in order by the constructor, and the loop over them."""

    def __init__(self, config: Config, topology: Topology, watchdog: Watchdog) -> None:
        self.config, self.topology, self.watchdog = config, topology, watchdog
        self.began = time.monotonic()
        self.output_dir = Path(config.training.output_dir)
        rank_0 = topology.rank == 0
        limit = timedelta(seconds=_COLLECTIVE_LIMIT * config.engine.timeout_seconds)
        # Agreement between hosts must not wait behind the device's stream.
        self.host_group = dist.new_group(backend="gloo", timeout=limit) if topology.world_size > 1 else None
        self.display = Display(config.training.steps, bar=config.logging.progress) if rank_0 else None
        if self.display is not None:
            self.display.line(f"preparing data in {config.data.cache_dir}")
        bars = rank_0 and sys.stderr.isatty()
        watchdog.note("the data preparation")
        self.data = rank_0_first(
            lambda: prepare(config.data, vocab_size=config.model.vocab_size, progress=bars, note=watchdog.note_alone), topology
        )
        self.valid = self._valid_batches(topology.dp_rank, topology.dp_size)
        watchdog.note("the building of the model")
        construction = construction_context(config, topology)
        self.model = build_model(config, topology, self.data.vocab_size, construction)
        self.parameters = parameter_count(self.model, topology)
        self.engine = Engine(config, self.model, topology, watchdog.note)
        self.flops = model_flops(config, self.data.vocab_size)
        self.peak_flops = device_peak(config, topology.device)
        watchdog.note("the reading of a checkpoint")
        self.checkpoint, state = resume(self.engine, config.training, self.data.tokenizer)
        self.saver = Saver(
            self.engine,
            self.output_dir,
            config.training.keep_last,
            self.host_group,
            background=config.training.async_save,
            published=self._published,
        )
        if self.engine.segments is not None:
            self.engine.segments.open()
        self.first_step = self.engine.step
        self.consumed_samples: int = state["consumed_samples"] if state else 0
        self.evaluations = [Evaluation(**entry) for entry in state["evaluations"]] if state else []
        self.bad_from: int | None = state.get("bad_from")  # first sample of the bad steps before this one, if any
        self.begun_at: str | None = begins_at(config.training) or state.get("begun_at")
        self.tally = Tally()
        self.train_loss: float | None = None
        self.monitor = self._monitor(self.display) if self.display is not None else None

    def run(self) -> Summary:
        """All remaining steps, then the summary."""
        try:
            self._introduce()
            signalled = self._train()
            if signalled is None:
                self._evaluate()
            return self._finish(signalled)
        except NonFiniteError:  # on every rank at the same step
            self.saver.finish()
            raise
        finally:
            if self.monitor is not None:
                self.monitor.close()
            self.engine.close()

    def _train(self) -> signal.Signals | None:
        """Steps up to the last, or to the boundary after a signal, which is returned."""
        training, report = self.config.training, self.config.logging
        with Interrupt(self.host_group) as interrupt, self._train_batches() as batches:
            micro_batches: Sequence[Batch] = ()
            while self.engine.step < training.steps:
                step = self.engine.step + 1
                began = time.perf_counter()
                if not micro_batches:
                    self.watchdog.note(f"the reading of the batch of step {step}")
                    micro_batches = next(batches)
                fetched = time.perf_counter()
                self.watchdog.note(f"step {step}")
                with profile.step_profile(
                    step,
                    report.profile_steps,
                    report.memory_snapshot_steps,
                    self.output_dir / "profile",
                    self.topology.rank,
                ):
                    result, failure = self._step(micro_batches)
                self._book(result, micro_batches, time.perf_counter() - began, fetched - began)
                if failure is not None:
                    self._log(result)
                    raise failure
                if self.engine.segments is None or self.engine.segments.next == 0:
                    self.consumed_samples += training.global_batch_size
                    micro_batches = ()
                last = step == training.steps
                self.watchdog.note(f"the end of step {step}")
                self.saver.poll()
                signalled = interrupt.agreed()
                if signalled or last or step % report.interval == 0:
                    self._log(result)
                if not signalled and (last or due(step, training.eval_interval)):
                    self._evaluate()
                    signalled = interrupt.agreed()
                if signalled or last or due(step, training.save_interval):
                    self._save()
                if signalled or last:
                    self.saver.finish()
                if signalled and not last:
                    return signalled
        return None

    def _step(self, micro_batches: Sequence[Batch]) -> tuple[StepResult, NonFiniteError | None]:
        """One step, and the error that ends the run once it is booked."""
        first, last = self._samples()
        try:
            return self.engine.train_step(micro_batches), None
        except NonFiniteError as error:
            begin = first if self.bad_from is None else self.bad_from
            return error.result, NonFiniteError(
                f"{error}; they were samples {begin} to {last} in data order: resume from the last checkpoint with a lower "
                "training.learning_rate, or look at these samples, which a resume without a change meets again.",
                error.result,
            )

    def _samples(self) -> tuple[int, int]:
        """First and last sample of the step's global batch, in data order."""
        return self.consumed_samples, self.consumed_samples + self.config.training.global_batch_size - 1

    def _book(
        self, result: StepResult, batches: Sequence[Batch], seconds: float, data_seconds: float
    ) -> None:
        config, segments = self.config, self.engine.segments
        share = 1 if segments is None else segments.per_step / segments.count
        tokens = sum(end - begin for batch in batches for _, begin, end in batch.documents.spans)
        pairs = sum(self.flops.pairs(batch.documents.spans) for batch in batches)
        record = StepRecord(
            step=self.engine.step,
            samples=self._samples(),
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=result.tokens,
            processed=round(share * config.training.global_batch_size * config.data.sequence_length),
            skipped=result.skipped,
            seconds=seconds,
            data_seconds=data_seconds,
            flops=share * self.flops.training(tokens, pairs) / (self.topology.tp_size * self.topology.cp_size),
        )
        self.tally.add(record)
        if self.monitor is not None:
            self.monitor.step(record)
        if not self.engine.bad_steps:
            self.bad_from = None
        elif result.bad:
            self.bad_from = record.samples[0] if self.bad_from is None else self.bad_from
            if self.monitor is not None:
                self.monitor.bad_step(record, self.engine.bad_steps)

    def _log(self, result: StepResult) -> None:
        norm = parameter_norm(self.model, self.topology)
        gates = self._gates()
        if self.monitor is not None:
            means = self.monitor.log(
                self.engine.step,
                loss_scale=result.loss_scale,
                params_norm=norm,
                memory=memory_gib(self.topology.device),
                gates=gates,
                tiers=None if self.engine.segments is None else self.engine.segments.statistics(),
                recall_distances=self.model.recall_distances(),
            )
            self.train_loss = means["loss"]

    def _gates(self) -> list[tuple[list[float], float]]:
        """Per gated layer, of the last forward: mean share of each level and mean entropy, over the whole rows."""
        found = []
        for shares, entropy in self.model.route_statistics():
            both = torch.cat((shares, entropy[None]))
            dist.all_reduce(both, group=self.topology.cp_group)
            *means, last = (both / self.topology.cp_size).tolist()
            found.append((means, last))
        return found

    def _evaluate(self) -> None:
        if not self.data.valid or (self.evaluations and self.evaluations[-1].step == self.engine.step):
            return
        began = time.perf_counter()
        result = self.engine.evaluate(self.watchdog.over(self.valid, f"the evaluation after step {self.engine.step}"))
        evaluation = Evaluation(
            step=self.engine.step,
            loss=result.loss,
            perplexity=perplexity(result.loss),
            tokens=result.tokens,
            consumed_samples=self.consumed_samples,
            seconds=time.perf_counter() - began,
        )
        self.evaluations.append(evaluation)
        if self.monitor is not None:
            self.monitor.evaluation(evaluation)
            self.monitor.save_metrics(
                metrics(self._summary(None, None, self._peak()), self.config, self.peak_flops)
            )

    def _save(self) -> None:
        self.watchdog.note(f"the checkpoint of step {self.engine.step}")
        state = {
            "consumed_samples": self.consumed_samples,
            "bad_from": self.bad_from,
            "begun_at": self.begun_at,
            "evaluations": [asdict(item) for item in self.evaluations],
            "tokenizer": None if self.data.tokenizer is None else self.data.tokenizer.name,
            "tokenizer_fingerprint": None if self.data.tokenizer is None else self.data.tokenizer.fingerprint,
        }
        self.saver.save(self.engine.step, state)

    def _published(self, path: Path) -> None:
        self.checkpoint = path
        if self.monitor is not None:
            self.monitor.say(f"step {self.engine.step}/{self.config.training.steps} | saved {path}")

    def _finish(self, signalled: signal.Signals | None) -> Summary:
        peak = torch.tensor(self._peak(), dtype=torch.float64)
        if self.host_group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.host_group)
        self.watchdog.close()  # what follows is rank 0's
        bigram = self._bigram() if self.monitor is not None and signalled is None else None
        summary = self._summary(signalled, bigram, float(peak))
        if self.monitor is not None:
            self.monitor.save_metrics(metrics(summary, self.config, self.peak_flops))
            title = f"{self.config.attention.variant}, {self.output_dir}"
            self.monitor.finish(title, rows(summary, self.config))
            if signalled is not None:
                again = " with training.resume=auto" if self.config.training.resume == "none" else ""
                self.monitor.say(
                    f"interrupted by {signalled.name} at step {summary.step}, "
                    f"saved {self.checkpoint}; the same command{again} resumes it"
                )
        return summary

    def _bigram(self) -> float | None:
        """Nats per token of the bigram model; None where there is nothing to count or far too much."""
        tokens = sum(corpus.tokens for corpus in self.data.train)
        if not self.data.valid or tokens > _BIGRAM_TOKENS:
            return None
        try:
            return bigram_nll(self.data.train, self._valid_batches(0, 1), self.data.vocab_size)
        except DataError as error:
            log.warning("no bigram baseline: %s", error)
            return None

    def _peak(self) -> float:
        return max(memory_gib(self.topology.device).values())

    def _summary(
        self, signalled: signal.Signals | None, bigram_loss: float | None, peak_memory_gib: float
    ) -> Summary:
        return Summary(
            step=self.engine.step,
            interrupted=signalled.name if signalled else None,
            resumed_from=self.first_step or None,
            skipped_steps=self.tally.skipped,
            train_loss=self.train_loss,
            evaluations=tuple(self.evaluations),
            bigram_loss=bigram_loss,
            parameters=self.parameters,
            peak_memory_gib=peak_memory_gib,
            throughput=self.tally.throughput(),
            wall_seconds=time.monotonic() - self.began,
            checkpoint=str(self.checkpoint) if self.checkpoint else None,
            metrics=str(self.output_dir / "metrics.json"),
        )

    def _introduce(self) -> None:
        if self.monitor is None:
            return
        config, topology = self.config, self.topology
        per_token = self.flops.training_per_token(config.data.sequence_length)
        self.monitor.say(
            f"{config.attention.variant}: {self.parameters:,} parameters, {per_token / 1e6:,.1f} MFLOP per token; "
            f"{topology.world_size} x {topology.device.type} (tensor {topology.tp_size} x context "
            f"{topology.cp_size} x data {topology.dp_size}), "
            f"{torch.get_num_threads()} threads each; ZeRO {config.engine.zero_stage}, {self.engine.optimizer_name}, "
            f"{config.training.precision}"
        )
        self.monitor.say(
            f"data: {sum(corpus.tokens for corpus in self.data.train):,} training tokens, "
            f"{sum(corpus.tokens for corpus in self.data.valid):,} held out, vocabulary {self.data.vocab_size:,}"
        )
        if self.first_step:
            self.monitor.say(f"resumed from {self.checkpoint} at step {self.first_step}")
        self.monitor.start(self.first_step)

    def _monitor(self, display: Display) -> Monitor:
        config = self.config
        return Monitor(
            self.output_dir,
            display=display,
            tensorboard=config.logging.tensorboard,
            resumed_step=self.first_step,
            global_batch_size=config.training.global_batch_size,
            devices=self.topology.world_size,
            peak_flops=self.peak_flops,
        )

    def _train_batches(self) -> Prefetcher[tuple[Batch, ...]]:
        config, topology = self.config, self.topology
        return train_batches(
            self.data.train,
            self.data.weights,
            config.data,
            chunk_size=config.memory_hierarchy.l1.chunk_size,
            seed=config.training.seed,
            consumed_samples=self.consumed_samples,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
        )

    def _valid_batches(self, dp_rank: int, dp_size: int) -> ValidBatches:
        config = self.config
        return valid_batches(
            self.data.valid,
            config.data,
            chunk_size=config.memory_hierarchy.l1.chunk_size,
            eval_batches=config.training.eval_batches,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )


def _connection_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because the other side is gone; gloo has no exception of its own."""
    if isinstance(error, dist.DistNetworkError):
        return True
    # our own exceptions may name a path with such a folder
    own = type(error) is not RuntimeError and not isinstance(error, dist.DistError)
    return not own and any(mark in str(error) for mark in ("/gloo/", "remote process exited"))


def _reason(error: RuntimeError) -> str:
    """What a communication library says, without the place in its source and its advice."""
    return str(error).splitlines()[0].rpartition("] ")[2].split(". ")[0]


def due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps (0: never) is done after `step`."""
    return interval > 0 and step % interval == 0


def device_peak(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s that utilisation is measured against; None on a CPU, in fp32, or for an unknown GPU."""
    if device.type != "cuda" or config.training.precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
