"""Training: the loop, and what happens around it."""

import math
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from lance_device.board import advice_note, choose_board
from lance_device.cache_plan import open_features
from lance_device.checkpoint import write_checkpoint
from lance_device.evaluate import Evaluation, evaluate
from lance_device.features import Batch, Features, Unmetered
from lance_device.graphs import load_graph, load_prefix
from lance_device.keeper import Keeper
from lance_device.live import Reporter
from lance_device.measure import PhaseMeter
from lance_device.numerics import MOST_IN_A_ROW, RATE_FACTORS
from lance_device.optimizer import SGD
from lance_device.pace import Pacer
from lance_device.probe import HealthProbe, MemoryProbe
from lance_device.progress import history_row, step_view
from lance_device.protect import warning_of
from lance_device.run_data import Absentees, open_images
from lance_device.run_folder import RunFolder
from lance_device.run_log import RunLog, TrainResult
from lance_device.run_setup import Run, TrainRequest, check_request, make_checkpoint, open_run
from lance_device.schedule import PLATEAU, SCHEDULES
from lance_device.session import interrupt_graphs
from lance_device.step import TrainingStep, training_step
from lance_device.step_graphs import StepOutcome
from lance_device.stop import StopRequest, stop_on_signals
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset
from lance_edge.errors import (
    CheckpointError,
    Interrupted,
    LanceError,
    NumericalError,
    PlatformError,
    StorageError,
)
from lance_edge.images import Part
from lance_edge.names import LOGITS
from lance_edge.profiles import HistoryRow
from lance_edge.screening import steady

Float = NDArray[np.float32]

TOO_LITTLE_MEMORY = "not enough memory; close other programs, use a smaller --micro-batch, or --memory-limit"


def train(request: TrainRequest, reporter: Reporter) -> TrainResult:
    """Train from a package as asked for, and leave a complete run folder, however it ends.

    Raises:
        LanceError: of the kind that fits; all but `StorageError` leave the last complete step in `last.npz`, or
            say that memory ran out while a step was applied, so that it holds an earlier one.
    """
    with (
        Bundle(request.artifact, request.signed_sha256) as bundle,
        RunFolder(request.out).held(create=not request.resume),
    ):
        check_request(request, bundle)
        dataset, skipped = open_images(request, bundle, reporter.note)
        absentees = Absentees(reporter.note)
        request_to_stop = StopRequest()
        dataset = steady(dataset, absentees.report, request_to_stop.check)  # large images take seconds a batch
        run = open_run(request, bundle, dataset)
        absentees.take_down(run, dataset, skipped)
        with (
            stop_on_signals(reporter.note, interrupt_graphs, request_to_stop) as stop,
            closing(_features(run, bundle, dataset, reporter)) as features,
        ):
            training = Training(request, run, bundle, dataset, features, reporter)
            absentees.begin(run, features.stop_keeping)
            result = training.run(stop)
            features.close(discard=run.cache.is_own)
            return result


def _features(run: Run, bundle: Bundle, dataset: Dataset, reporter: Reporter) -> Features:
    options = run.options
    reporter.note(f"feature cache {options.cache}: {run.cache_reason}")
    prefix = load_prefix(bundle, run.variant, options.threads, options.micro_batch)
    return open_features(run.cache, options, prefix, dataset, reporter.note)


class Training:
    """A run at work."""

    def __init__(
        self,
        request: TrainRequest,
        run: Run,
        bundle: Bundle,
        dataset: Dataset,
        features: Features,
        reporter: Reporter,
    ) -> None:
        """Load the graphs and write the first files; the state on disk is complete from here on."""
        options = run.options
        self._request, self._run, self._bundle, self._dataset = request, run, bundle, dataset
        self._features, self._reporter = features, reporter
        self._step = training_step(bundle, run.variant, run.parameters, options.threads, features, run.targets)
        if run.is_resumed:
            _load_state(self._step, run)
        else:
            run.codec_state = self._step.state()
        self._predict = load_graph(bundle, run.variant, "predict", options.threads)
        self._sgd = SGD(options.momentum, options.weight_decay, options.clip)
        health = HealthProbe()
        self._pacer = Pacer(request.pace, health, reporter.note)
        if run.notes or not run.is_resumed:  # a damaged last.npz must never become previous.npz
            write_checkpoint(run.folder.last, make_checkpoint(run, bundle))
        if run.folder.write_split(dataset) and run.is_resumed:
            run.notes.append("split.csv was missing, damaged, or of other test images: it is written anew")
        memory = MemoryProbe()
        self._meter = PhaseMeter(memory)
        self._log = RunLog(request, run, bundle, dataset, memory, health)
        self._keeper = Keeper(run, bundle, self._log, self._meter, request.checkpoint_every)

    def run(self, stop: StopRequest) -> TrainResult:
        """The loop."""
        self._announce()
        try:
            self._evaluate_if_due(stop)  # a run that was stopped while it evaluated
            while not self._run.is_complete:
                self._train_step(stop)
                self._evaluate_if_due(stop)
                self._keeper.keep_copy_if_due()
                self._keeper.save_if_due()
                self._pause_if_owed(stop)
            self._keeper.save()
        except LanceError as error:
            raise self._wind_up(error) from None
        except MemoryError:
            raise self._wind_up(PlatformError(TOO_LITTLE_MEMORY)) from None
        return self._log.finish("finished")

    def _announce(self) -> None:
        dataset = self._dataset
        for note in self._run.notes:
            self._reporter.note(f"warning: {note}")
        if self._run.is_resumed:
            self._reporter.note(f"resuming after step {self._run.progress.step} of {self._run.total_steps}")
        else:  # a resumed run keeps its options
            values = self._request.values
            advice = advice_note(choose_board(values.get("board")), values, asdict(self._run.options))
            if advice is not None:
                self._reporter.note(advice)
        self._reporter.note(
            f"{self._bundle.manifest.model}, {self._run.variant.method}: {len(dataset.train)} training,"
            f" {len(dataset.validation)} validation, {len(dataset.test)} test images;"
            f" {self._run.total_steps} steps of {self._run.stream.batch_size}"
        )
        forgetting = warning_of(self._bundle.manifest, self._run.variant, self._run.protection)
        for text in (self._run.memory, forgetting):
            if text is not None:
                self._reporter.note(str(text))
        asked, batch = self._request.values.get("micro_batch"), self._run.stream.batch_size
        if asked is not None and asked > batch:
            self._reporter.note(f"micro-batch {batch}: a batch has no more images than that")
        if not len(dataset.validation):
            self._reporter.note("no validation images: best.npz will be the epoch of the lowest training loss")

    def _train_step(self, stop: StopRequest) -> None:
        run, number = self._run, self._run.progress.step
        batch = Batch(
            self._dataset.train,
            run.stream.indices(number),
            run.stream.flips(number),
            self._bundle.manifest.preprocessing,
            run.stream.dropout_seeds(number),
        )
        computed = self._features.computed
        try:
            outcome = self._step.run(batch, run.options.micro_batch, self._meter, stop.check)
            with self._meter.phase("update"):
                if run.protection is not None:
                    run.protection.project(outcome.gradients)
                update = (run.parameters, run.velocity, outcome.gradients, self._learning_rate(number))
                self._sgd.prepare(*update)
            codec_state = self._step.state()
        except NumericalError as error:
            if run.options.on_nan == "stop" or run.progress.skipped_in_a_row == MOST_IN_A_ROW:
                raise self._explain(error) from None
            with self._keeper.changing():
                outcome = self._skip(error)
                self._count(outcome, computed)
        else:
            with self._keeper.changing():
                with self._meter.phase("update"):
                    self._sgd.apply(*update)
                run.codec_state, run.progress.skipped_in_a_row = codec_state, 0
                self._count(outcome, computed)
        self._reporter.step(step_view(run, self._log))

    def _skip(self, error: NumericalError) -> StepOutcome:
        """Leave weights and momentum as they are and go on, as the options say."""
        run, progress = self._run, self._run.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        progress.rate_factor *= RATE_FACTORS[run.options.on_nan]
        self._reporter.note(
            f"warning: step {progress.step + 1}: {error}; not applied (--on-nan {run.options.on_nan}),"
            f" going on at {100 * progress.rate_factor:g} % of the learning rate"
        )
        self._step.load_state(run.codec_state)  # as the last good step left it
        return StepOutcome(math.nan, 0, {}, 0)

    def _pause_if_owed(self, stop: StopRequest) -> None:
        if self._pacer.owes_pause() and not self._run.is_complete:
            with self._meter.phase("pause"):
                self._pacer.pause(stop.check)
            self._log.pause(self._meter.take("pause"))

    def _learning_rate(self, step: int) -> float:
        options = self._run.options
        rate = SCHEDULES[options.schedule](options.lr, step, self._run.total_steps)
        return rate * self._run.progress.rate_factor * self._run.progress.plateau.factor

    def _count(self, outcome: StepOutcome, computed: int) -> None:
        """Take the step into progress and rows, so that all belongs together again; what it cost."""
        progress, stream = self._run.progress, self._run.stream
        progress.step += 1
        progress.epoch = stream.complete_epochs(progress.step)
        if math.isfinite(outcome.loss):
            progress.loss_sum += outcome.loss * stream.batch_size
            progress.correct += outcome.correct
            progress.samples += stream.batch_size
        progress.seconds = self._log.seconds()
        self._log.step(outcome, self._meter.take_step(), cached=self._features.computed == computed)

    def _evaluate_if_due(self, stop: StopRequest) -> None:
        progress, stream, every = self._run.progress, self._run.stream, self._run.options.eval_every
        is_end = progress.step == self._run.total_steps
        is_epoch = progress.step > 0 and stream.ends_epoch(progress.step)
        is_due = is_end or (is_epoch and every > 0 and progress.epoch % every == 0)
        if is_due and progress.evaluated_step < progress.step:
            self._evaluate(stop)

    def _evaluate(self, stop: StopRequest) -> None:
        progress, dataset = self._run.progress, self._dataset
        computed = self._features.computed
        with self._meter.phase("eval"):
            validation = self._evaluate_part(dataset.validation, stop.check)
            test = self._evaluate_part(dataset.test, stop.check)
        rate = self._learning_rate(progress.step - 1)
        row = history_row(self._run, self._log, rate, validation, test)
        samples, cached = len(dataset.validation) + len(dataset.test), self._features.computed == computed
        with self._keeper.changing():
            progress.evaluated_step = progress.step
            progress.loss_sum, progress.correct, progress.samples = 0.0, 0, 0
            progress.seconds = self._log.seconds()
            self._look_for_plateau(row)
            self._log.evaluation(row, samples, self._meter.take("eval"), cached)
        if row.best:
            self._keeper.remember_best(row)
        self._reporter.epoch(row)

    def _look_for_plateau(self, row: HistoryRow) -> None:
        options, plateau = self._run.options, self._run.progress.plateau
        if options.schedule != PLATEAU:
            return
        factor = plateau.factor
        loss = row.train_loss if row.validation_loss is None else row.validation_loss
        plateau.observe(loss, options.lr, options.patience, options.min_lr)
        if plateau.is_over or plateau.factor < factor:
            what = "the run ends here" if plateau.is_over else f"learning rate {options.lr * plateau.factor:g}"
            self._reporter.note(f"no lower loss in {options.patience} epochs: {what}")

    def _evaluate_part(self, part: Part, before_each: Callable[[], None]) -> Evaluation | None:
        return evaluate(self._logits, part, self._run.options.micro_batch, before_each)

    def _logits(self, part: Part, rows: slice) -> Float:
        """Of the present weights; images are as they are, never mirrored: `[N, classes]`."""
        indices = np.arange(rows.start, rows.stop)
        unflipped = np.zeros(len(indices), dtype=np.bool_)
        batch = Batch(part, indices, unflipped, self._bundle.manifest.preprocessing)
        boundary = self._features.boundary(batch, slice(0, len(batch)), Unmetered())
        return self._predict.run({**self._run.parameters, **boundary})[LOGITS]

    def _wind_up(self, error: LanceError) -> LanceError:
        """Save what is good, complete the files, and say how to go on."""
        if isinstance(error, StorageError):
            with suppress(StorageError):  # the disk is full: what was saved before still stands
                self._log.finish("failed", str(error))
            return error
        self._keeper.save()
        if self._keeper.lost:
            error = type(error)(f"{error}{self._keeper.lost}")
        if not isinstance(error, Interrupted):
            self._log.finish("failed", str(error))
            return error
        self._log.finish("interrupted")
        progress, folder = self._run.progress, self._run.folder
        return Interrupted(
            f"stopped after step {progress.step} of {self._run.total_steps}, which is in {folder.last};"
            f" continue with: {self._request.resume_command()}"
        )

    def _explain(self, error: NumericalError) -> NumericalError:
        options, step = self._run.options, self._run.progress.step
        return NumericalError(
            f"step {step + 1}: {error}; the step was not applied, the state after step {step} is in"
            f" {self._run.folder.last}; go on with --resume --on-nan halve-lr, or start again with a lower --lr"
            f" (this run: {options.lr:g})" + ("" if options.clip else " or with --clip 2")
        )


def _load_state(step: TrainingStep, run: Run) -> None:
    try:
        step.load_state(run.codec_state)
    except CheckpointError as error:
        raise CheckpointError(f"{run.folder.last}: {error}") from None
