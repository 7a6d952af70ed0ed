"""One training run on one rank: look at the data, build, freeze, train, save."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from proxyv.data.collator import Collator, DummyImage
from proxyv.data.dataset import ConversationDataset, DataReport, check_rows, report_rows
from proxyv.data.failures import FailureLog
from proxyv.data.pipeline import ImagePipeline
from proxyv.data.readers import Source
from proxyv.data.sampler import GroupedSampler, LaneSampler, RowSampler
from proxyv.data.scan import ScanStopped, scan_rows
from proxyv.data.sources import open_source
from proxyv.files import write_text
from proxyv.provenance import git_commit, short_commit
from proxyv.train.adapters import plain_state, save_adapters
from proxyv.train.arguments import accumulation_steps, total_steps, training_arguments
from proxyv.train.build import (
    FINISHED,
    SETTINGS,
    Built,
    build,
    output_folder,
    resolve,
    starting_folder,
    starting_folder_if_any,
)
from proxyv.train.checkpoints import Checkpoints, find_checkpoints
from proxyv.train.config_files import settings_yaml
from proxyv.train.lock import only_run
from proxyv.train.progress import MetricsFile, Progress
from proxyv.train.settings import Settings, walk
from proxyv.train.signals import Interrupted, StopOnSignal, start_worker
from proxyv.train.stages import PartCount, count_parts, learning_rates
from proxyv.train.trainer import ProxyVTrainer

__all__ = ["identity", "open_data", "parts_table", "train"]

ORDER = "order.npz"
"""What the order of a run's rows goes by, where it goes by length: it stays as it was."""


def open_data(settings: Settings) -> Source:
    """Open the rows that the settings name."""
    data = settings.data
    return open_source(
        data.annotations,
        data.images,
        streaming=data.streaming,
        max_megapixels=data.max_megapixels,
        follow_links=data.follow_links,
        squared=data.image_aspect_ratio == "pad",
    )


def check_output(settings: Settings) -> Path:
    """Say where the run goes.

    Raises:
        ValueError: a finished run is there and may not be replaced, or this one starts from it.
    """
    folder = output_folder(settings)
    start = starting_folder_if_any(settings)
    if start is not None and start.resolve() == folder.resolve():
        raise ValueError(
            f"run.output_dir={folder} is also the run that this one starts from (model.init_from), "
            "which it would replace: choose another folder"
        )
    if (folder / FINISHED).is_file() and not settings.run.overwrite:
        raise ValueError(
            f"{folder} holds a finished run: set run.output_dir to another folder, or "
            "run.overwrite=true to replace it"
        )
    return folder


def parts_table(parts: list[PartCount], settings: Settings) -> list[str]:
    """What trains, with parameter counts and learning rates."""
    rates = learning_rates(settings.optim)
    lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}{'lr':>12}"]
    for part in parts:
        rate = f"{rates[part.part]:.2e}" if part.trainable else "frozen"
        lines.append(f"{part.part:<16}{part.total:>16,}{part.trainable:>16,}{rate:>12}")
    total, trainable = (sum(getattr(p, key) for p in parts) for key in ("total", "trainable"))
    return [*lines, f"{'all':<16}{total:>16,}{trainable:>16,}"]


def train(settings: Settings) -> Path:
    """Run a stage to its end on this rank; every rank of the group calls it.

    Where the folder holds a checkpoint of the same run, the run goes on from it.

    Returns:
        The run's folder, a complete ``from_pretrained`` folder.

    Raises:
        ValueError: settings or data that cannot be used.
        OSError: files that are not there, or that cannot be written.
        Interrupted: the run got SIGTERM, has saved a checkpoint and stopped.
    """
    began, stop = time.monotonic(), StopOnSignal()
    with stop.listening(), ExitStack() as held:
        settings = resolve(settings)
        folder, built, trainer = _prepare(settings, stop)
        if trainer.is_world_process_zero():
            held.enter_context(only_run(folder))
            check_output(settings)  # a run that was dying may have finished instead
        checkpoint = _begin(trainer, folder, settings)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if stop.stopped:
            raise Interrupted(stop.received, _stopped(stop.received, trainer, folder))
        summary = {
            "steps": trainer.state.global_step,
            "skipped_steps": trainer.skipped_steps,
            "rows": len(trainer.sampler),
            "loss": round(float(result.training_loss), 6)
            if checkpoint is None
            else _mean_loss(trainer.state.log_history),
            "seconds": round(time.monotonic() - began, 1),
        }
        save_run(trainer, built, folder, settings, summary)
        if trainer.is_world_process_zero():
            trainer.checkpoints.clear()
            print(f"done in {time.monotonic() - began:.0f} s: {folder}", flush=True)
    return folder


def _stopped(number: int, trainer: ProxyVTrainer, folder: Path) -> str:
    """What the user of a run that was told to stop reads."""
    saved = max((step for step, _ in find_checkpoints(folder)), default=None)
    onward = "begins anew, for no checkpoint could be saved"
    if saved is not None:
        onward = f"goes on from step {saved}"
    return (
        f"stopped by signal {number} after step {trainer.state.global_step}; "
        f"the same command {onward}"
    )


def _mean_loss(history: Iterable[Mapping[str, float]]) -> float | None:
    """Mean over the steps that were logged, for a run that was resumed; None without any.

    What the trainer itself gives then is the loss of the steps since, divided by all steps.
    """
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            # The mean since the entry before it, or since a resumption in between.
            total, last = total + entry["loss"] * (entry["step"] - last), int(entry["step"])
    return round(total / last, 6) if last else None


def _prepare(settings: Settings, stop: StopOnSignal) -> tuple[Path, Built, ProxyVTrainer]:
    """Look at folder and data, build the model, say what will happen."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    say = print if int(os.environ.get("RANK", "0")) == 0 else (lambda *_, **__: None)
    folder = check_output(settings)
    starting_folder(settings)
    accumulation = accumulation_steps(settings, ranks)
    source = open_data(settings)
    set_seed(settings.run.seed)
    built = build(settings)
    data = settings.data
    dataset = ConversationDataset(
        source,
        built.renderer,
        ImagePipeline.of(built.processor),
        data.max_length,
        data.limit,
        data.on_failure,
    )
    sampler, report = _order(settings, dataset, folder.parent / ".rows", ranks, stop)
    steps = total_steps(settings, len(dataset), ranks)
    if data.expected_rows not in (None, len(source)):
        say(f"note: {len(source):,} rows, where data.expected_rows={data.expected_rows:,}")
    say(f"stage {settings.stage.name} of {settings.model.name} -> {folder}")
    say("\n".join([*report.lines(), *parts_table(count_parts(built.model), settings)]))
    say(
        f"batch {settings.optim.global_batch} = {ranks} ranks x {settings.optim.micro_batch} rows "
        f"x {accumulation} accumulated; {steps:,} steps",
        flush=True,
    )
    return folder, built, _trainer(settings, built, dataset, sampler, folder, ranks, stop)


def _order(
    settings: Settings, dataset: ConversationDataset, cache: Path, ranks: int, stop: StopOnSignal
) -> tuple[RowSampler, DataReport]:
    """The order of rows; where it goes by length every row is measured, once for all runs.

    Raises:
        Interrupted: SIGTERM came meanwhile; what was measured is kept.
    """
    data, seed = settings.data, settings.run.seed
    if not data.group_by_length:
        report = check_rows(dataset, data.check_rows, data.max_unsupervised_share)
        blocks = dataset.source.blocks
        if blocks is None:
            return RowSampler(len(dataset), seed), report
        lanes = ranks * max(data.workers, 1)
        return LaneSampler(blocks[: len(dataset)], settings.optim.micro_batch, lanes, seed), report
    with only_run(cache, wait_seconds=math.inf):  # one rank measures, the others find its table
        try:
            facts = scan_rows(
                dataset,
                data.workers,
                cache,
                start_worker=partial(start_worker, None),
                stopped=lambda: bool(stop.received),
            )
        except ScanStopped as error:
            raise Interrupted(
                stop.received,
                f"stopped by signal {stop.received} in the look at the rows, {error}; the same "
                "command goes on from there",
            ) from error
    report = report_rows(dataset, facts, data.max_unsupervised_share)
    micro = settings.optim.micro_batch
    lengths, has_image = _begun_with(settings) or (facts["tokens"], facts["images"] > 0)
    return GroupedSampler(lengths, has_image, micro, ranks, seed), report


def _begun_with(settings: Settings) -> tuple[np.ndarray, np.ndarray] | None:
    """Lengths and kinds that the order of a run that goes on was made from.

    A row that could not be used then and can be now has others today, by which every row after it
    would have another place: some would be trained on twice and some never.
    """
    folder = output_folder(settings)
    path = folder / ORDER
    going_on = settings.run.resume and not (folder / FINISHED).is_file()
    if not (going_on and find_checkpoints(folder) and path.is_file()):
        return None
    with np.load(path, allow_pickle=False) as table:
        return table["lengths"], table["has_image"]


def _save_order(sampler: GroupedSampler, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez_compressed(partial, lengths=sampler.lengths, has_image=sampler.has_image)
    os.replace(partial, path)


def _begin(trainer: ProxyVTrainer, folder: Path, settings: Settings) -> str | None:
    """Make the folder ready, and find the checkpoint to go on from."""
    first = trainer.is_world_process_zero()
    replaced = (folder / FINISHED).is_file()
    trainer.accelerator.wait_for_everyone()
    if first:
        if replaced or not settings.run.resume:
            trainer.checkpoints.clear()
        (folder / FINISHED).unlink(missing_ok=True)
        trainer.checkpoints.remove_partial()
        write_text(folder / SETTINGS, _header() + settings_yaml(settings))
    trainer.accelerator.wait_for_everyone()
    checkpoint = trainer.checkpoints.latest()
    if checkpoint is None:
        trainer.failures.forget(remove=first)
        if first and isinstance(trainer.sampler, GroupedSampler):
            _save_order(trainer.sampler, folder / ORDER)
        trainer.accelerator.wait_for_everyone()
        return None
    if first:
        print(f"going on from {checkpoint}", flush=True)
    return str(checkpoint)


def _trainer(
    settings: Settings,
    built: Built,
    dataset: ConversationDataset,
    sampler: RowSampler,
    folder: Path,
    ranks: int,
    stop: StopOnSignal,
) -> ProxyVTrainer:
    built.model.train()
    run = settings.run
    if run.gradient_checkpointing:
        built.model.gradient_checkpointing_enable({"use_reentrant": False})
    metrics = [] if run.tracker == "none" else [MetricsFile(folder)]
    dummy = _dummy_image(built) if ranks > 1 else None
    trainer = ProxyVTrainer(
        settings,
        sampler,
        FailureLog(folder / "failures.txt"),
        checkpoints=Checkpoints(
            folder, run.keep_checkpoints, identity(settings, ranks), data=_data_facts(dataset)
        ),
        model=built.model,
        args=training_arguments(settings, folder, len(dataset), ranks),
        train_dataset=dataset,
        data_collator=Collator(_pad_token_id(built), dummy, describe=True),
        processing_class=built.processor,
        callbacks=[Progress(), *metrics, stop],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


_FREE_TO_CHANGE = ("run.", "data.workers", "data.prefetch", "data.check_rows", "data.expected_rows")
"""Settings that an interrupted run may go on with other values of; the seed is not among them."""


def identity(settings: Settings, ranks: int) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it."""
    fixed = {
        key: value
        for key, value, _ in walk(settings)
        if key == "run.seed" or not key.startswith(_FREE_TO_CHANGE)
    }
    if settings.data.streaming:
        fixed["data.workers"] = settings.data.workers  # the order of streamed rows depends on it
    return {**fixed, "ranks": ranks}


def _data_facts(dataset: ConversationDataset) -> dict[str, Any]:
    """What the rows of a run are known by."""
    digest = hashlib.sha256(dataset.source.fingerprint.encode()).hexdigest()
    return {"rows": len(dataset), "fingerprint": digest[:16]}


def _pad_token_id(built: Built) -> int:
    """Any id will do, for the mask comes from lengths; the end token where there is no pad."""
    pad = built.processor.tokenizer.pad_token_id
    return built.renderer.end_token_id if pad is None else pad


def _dummy_image(built: Built) -> DummyImage:
    processor = built.processor
    tokens = ImagePipeline.of(processor).rows_per_crop
    return DummyImage(built.model.config.image_token_index, tokens, processor.crop_px)


def save_run(
    trainer: ProxyVTrainer, built: Built, folder: Path, settings: Settings, summary: dict[str, Any]
) -> None:
    """Save model, processor and tokenizer; ``finished.json`` comes last and marks them complete."""
    state = trainer.full_state()
    if trainer.is_world_process_zero():
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        plain = plain_state(built.model, state, built.originals)
        built.model.save_pretrained(partial, state_dict=plain)
        if settings.lora.rank is not None:
            save_adapters(settings.lora, state, partial / "adapter")
        built.processor.save_pretrained(partial)
        for path in sorted(partial.iterdir()):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
        partial.rmdir()
        summary = {
            "stage": settings.stage.name,
            "template": built.renderer.template.name,
            **summary,
        }
        write_text(folder / FINISHED, json.dumps(summary, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()


def _header() -> str:
    """Comment lines that say which code made a run."""
    commit = short_commit(git_commit())
    return (
        f"# commit {commit}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"python {platform.python_version()}\n"
    )
