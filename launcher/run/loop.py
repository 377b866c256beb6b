"""The training loop, top to bottom: what a rank does from its first update to its exit code."""

from __future__ import annotations

import signal

from launcher.checkpoints.checkpoint import Checkpoint
from launcher.cluster.ranks import Agreement
from launcher.cluster.watchdog import Watchdog
from launcher.errors import RunError
from launcher.run import finish, state
from launcher.run.continued import is_changed
from launcher.run.course import Course
from launcher.run.inputs import Inputs
from launcher.run.learner import Learner
from launcher.run.monitor import Monitor
from launcher.run.progress import Progress
from launcher.run.saver import Saver
from launcher.run.step import train_step
from launcher.run.validate import validate
from launcher.terminal import say
from launcher.tracking import Tracker


def train(inputs: Inputs, learner: Learner, course: Course, start: Checkpoint | None) -> int:
    """Train to the end, or until a signal. Returns the exit code: 0, or 128 + signal number."""
    recipe, world, steps_per_epoch = inputs.recipe, learner.world, inputs.steps_per_epoch
    every = recipe.engine.compare_masks_every
    agreement = Agreement(recipe.engine.timeout_s)
    progress = state.restore(start, learner)
    progress.shift = inputs.shift
    if start is not None and is_changed(recipe, start):
        progress.continue_changed()
    tracker = open_tracker(inputs, progress) if world.is_main else None
    monitor = Monitor(inputs, learner, tracker, progress.step)
    if (counted := state.monitor_state(start, world)) is not None:
        monitor.restore(counted)
    saver = Saver(inputs, learner, course, tracker, agreement, monitor)
    watchdog = Watchdog(world, recipe.engine.step_timeout_s)
    batches = watchdog.awaited(inputs.batches(world.rank, progress.step))
    exit_code = 1
    try:
        while not course.is_over(progress):
            epoch = progress.epochs
            first = epoch * steps_per_epoch + inputs.shift
            monitor.start_epoch(epoch, done=progress.step - first)
            learner.engine.train()
            while progress.step < first + steps_per_epoch:
                watchdog.beat("agreeing whether to stop", progress.step + 1)
                if signal_number := saver.before_step(progress):
                    saver.save(progress)
                    saver.finish()
                    if world.is_main:
                        say_stopped(inputs, signal_number, progress.step)
                    exit_code = 128 + signal_number
                    return exit_code
                train_step(learner, course, batches, inputs.accumulation, progress, monitor)
                if every and progress.step % every == 0:
                    state.check_masks_agree(learner)
                if monitor.skipped_in_a_row >= recipe.engine.max_skipped_steps:
                    saver.save(progress)
                    saver.finish()
                    raise RunError(
                        f"the gradient was not finite {monitor.skipped_in_a_row} updates in a row; "
                        f"the last good state is saved in {saver.folder}. Another learning rate "
                        "makes another run, which can begin with these weights: add --set "
                        f"init.weights={recipe.folder} --set run_dir=…, and a lower optim.lr or "
                        "optim.clip_grad_norm"
                    )
            if tracker is not None:
                finish.get_ready()
            progress.results = validate(learner, inputs, lambda: watchdog.beat("evaluating"))
            learner.after_epoch(progress.results)
            monitor.end_epoch(epoch, progress.step, progress.results)
            progress.epochs = epoch + 1
            course.note(progress)
            over = course.is_over(progress)
            if over or progress.epochs % recipe.checkpoint.every_epochs == 0:
                watchdog.beat("saving")
                saver.save(progress)
        watchdog.close()
        finish.write_results(inputs, learner, tracker, progress)
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


def open_tracker(inputs: Inputs, progress: Progress) -> Tracker:
    """The tracker of the run; says what is about to be trained. On rank 0 alone."""
    recipe, plan = inputs.recipe, inputs.plan(0)
    tracker = Tracker(
        recipe.folder,
        recipe.tracking,
        run_name=recipe.name,
        recipe=recipe.as_dict() | {"data_set": finish.data_facts(inputs.manifest)},
        resume_step=progress.step,
        wandb_id=progress.wandb_id,
        wandb_said=progress.wandb_said,
    )
    progress.wandb_id, progress.wandb_said = tracker.wandb_id, tracker.wandb_said
    say(
        f"{recipe.name}: {recipe.model.name}, {recipe.method.name}, {plan.samples:,} samples; "
        f"{plan.world_size} rank(s) × {plan.accumulation} × {plan.micro_batch_size} = batch "
        f"{plan.global_batch_size}; {recipe.optim.epochs} epochs × {plan.steps_per_epoch} steps"
    )
    if plan.dropped:
        say(f"the last, incomplete batch of each epoch is left out: {plan.dropped} samples")
    if progress.step:
        say(f"continues at step {progress.step:,} of {inputs.total_steps + inputs.shift:,}")
    return tracker


def say_stopped(inputs: Inputs, signal_number: int, step: int) -> None:
    say(
        f"stopped by {signal.Signals(signal_number).name} at step {step:,} of "
        f"{inputs.total_steps + inputs.shift:,}; saved in {inputs.recipe.folder}; the same command "
        "continues from there"
    )
