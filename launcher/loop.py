"""The training loop, top to bottom: what one rank does from a recipe to an exit code."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from torch import Tensor

from data.errors import DataError
from launcher import finish, state
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.checkpoints.saver import Saver
from launcher.cluster.ranks import Agreement, from_main
from launcher.cluster.watchdog import Watchdog
from launcher.cluster.world import World
from launcher.engine import apply_update, process_group
from launcher.errors import RunError
from launcher.init import Initial, read_initial
from launcher.monitor import Monitor
from launcher.preflight import find_start, open_inputs
from launcher.recipe import Recipe
from launcher.run_folder import lock, write_origin, write_provenance
from launcher.session import Session, build_session
from launcher.target import steer
from launcher.terminal import say
from launcher.tracking import Tracker


def train(session: Session, start: Checkpoint | None) -> int:
    """Train to the end, or until a signal. Returns the exit code: 0, or 128 + signal number."""
    recipe, steps_per_epoch = session.recipe, session.plan.steps_per_epoch
    every = recipe.engine.compare_masks_every
    agreement = Agreement(recipe.engine.timeout_s)
    progress = state.restore(start, session)
    tracker = open_tracker(session, progress)
    monitor = Monitor(session, tracker, progress.step)
    if (counted := state.monitor_state(start, session)) is not None:
        monitor.restore(counted)
    saver = Saver(session, tracker, agreement, monitor)
    watchdog = Watchdog(session.world, recipe.engine.step_timeout_s)
    batches = watchdog.awaited(session.batches(progress.step))
    exit_code = 1
    try:
        for epoch in range(progress.epochs, recipe.optim.epochs):
            monitor.start_epoch(epoch, done=progress.step - epoch * steps_per_epoch)
            session.engine.train()
            while progress.step < (epoch + 1) * steps_per_epoch:
                watchdog.beat("agreeing whether to stop", progress.step + 1)
                if signal_number := saver.before_step(progress):
                    saver.save(progress)
                    saver.finish()
                    say_stopped(session, signal_number, progress.step)
                    exit_code = 128 + signal_number
                    return exit_code
                train_step(session, batches, progress, monitor)
                if every and progress.step % every == 0:
                    state.check_masks_agree(session)
                if monitor.skipped_in_a_row >= recipe.engine.max_skipped_steps:
                    saver.save(progress)
                    saver.finish()
                    raise RunError(
                        f"the gradient was not finite {monitor.skipped_in_a_row} updates in a row; "
                        f"the last good state is saved in {saver.folder}. Lower optim.lr, or set "
                        "optim.clip_grad_norm"
                    )
            progress.results = session.evaluate(lambda: watchdog.beat("evaluating"))
            monitor.end_epoch(epoch, progress.step, progress.results)
            progress.epochs = done = epoch + 1
            if done % recipe.checkpoint.every_epochs == 0 or done == recipe.optim.epochs:
                watchdog.beat("saving")
                saver.save(progress)
        watchdog.close()
        finish.write_results(session, tracker, progress)
        saver.finish()
        exit_code = 0
        return exit_code
    except RunError:
        # All ranks come to that verdict together: what is being written is worth waiting for.
        saver.wait()
        raise
    finally:
        monitor.close()
        watchdog.close()
        if tracker is not None:
            tracker.close(exit_code)


def train_step(
    session: Session,
    batches: Iterator[dict[str, Tensor]],
    progress: state.Progress,
    monitor: Monitor,
) -> None:
    """One update from one global batch, in as many micro-batches as the plan says. Collective."""
    began, data_wait = time.perf_counter(), 0.0
    session.scheduler.set_progress(progress.step / session.total_steps)
    steer(session, progress)
    monitor.before_step(progress.step)
    for micro_step in range(session.plan.accumulation):
        waiting = time.perf_counter()
        batch = {k: v.to(session.device, non_blocking=True) for k, v in next(batches).items()}
        data_wait += time.perf_counter() - waiting
        logits = session.forward(batch)
        loss = session.loss(logits, batch)
        session.engine.backward(loss)
        monitor.after_micro_batch(loss, logits, batch)
        if micro_step + 1 < session.plan.accumulation:
            session.engine.step()
    grad_norm = apply_update(session.engine)
    progress.step += 1
    progress.seconds += time.perf_counter() - began
    monitor.after_step(progress.step, grad_norm=grad_norm, data_wait=data_wait)


def open_tracker(session: Session, progress: state.Progress) -> Tracker | None:
    """The tracker on rank 0, None elsewhere; says there what is about to be trained."""
    if not session.world.is_main:
        return None
    recipe, plan = session.recipe, session.plan
    tracker = Tracker(
        recipe.folder,
        recipe.tracking,
        run_name=recipe.name,
        recipe=recipe.as_dict() | {"data_set": finish.data_facts(session)},
        resume_step=progress.step,
        wandb_id=progress.wandb_id,
    )
    progress.wandb_id = tracker.wandb_id
    say(
        f"{recipe.name}: {recipe.model.name}, {recipe.method.name}, {plan.samples:,} samples; "
        f"{plan.world_size} rank(s) × {plan.accumulation} × {plan.micro_batch_size} = batch "
        f"{plan.global_batch_size}; {recipe.optim.epochs} epochs × {plan.steps_per_epoch} steps"
    )
    if plan.dropped:
        say(f"the last, incomplete batch of each epoch is left out: {plan.dropped} samples")
    if progress.step:
        say(f"continues at step {progress.step:,} of {session.total_steps:,}")
    return tracker


def say_stopped(session: Session, signal_number: int, step: int) -> None:
    if session.world.is_main:
        say(
            f"stopped by {signal.Signals(signal_number).name} at step {step:,} of "
            f"{session.total_steps:,}; saved in {session.recipe.folder}; the same command "
            "continues from there"
        )


def run_rank(recipe: Recipe, world: World) -> int:
    """One rank, from a recipe to an exit code."""
    inputs = open_inputs(recipe, world.world_size)
    start, folder_lock, initial = None, None, Initial()
    if world.is_main:
        start = find_start(recipe, inputs.manifest)
        if start is None:
            initial = read_initial(recipe, inputs.manifest)
        folder_lock = lock(recipe.folder)
    try:
        with process_group(world, recipe.engine) as device:
            start = from_main(start)
            if world.is_main:
                write_provenance(recipe.folder, recipe, world)
            fresh = initial if start is None else None
            session = build_session(recipe, inputs, world, device, fresh)
            if session.initial_weights_hash is not None:
                write_origin(recipe.folder, session.initial_weights_hash, inputs.manifest)
                for note in initial.notes:
                    say(note)
            return train(session, start)
    except DataError as error:
        # No usage error: what is wrong with the data itself was refused before it was read.
        raise RunError(str(error)) from error
    finally:
        if folder_lock is not None:
            folder_lock.close()
