"""SCL in Hugging Face's Trainer: a small GPT-2 that spells, with most of its connections gone.

The text is this repository's licence; the model is built from its configuration, nothing is
downloaded. GPT-2's embedding is also its output layer and therefore stays dense.
"""

import tempfile
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from sclcore import SCL, Schedule, Scheduler, connection_groups

STEPS, LENGTH = 200, 32
text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
letters = sorted(set(text))
codes = torch.tensor([letters.index(byte) for byte in text])
pieces = [codes[i : i + LENGTH] for i in range(0, len(codes) - LENGTH, LENGTH // 4)]
data = [{"input_ids": piece, "labels": piece} for piece in pieces]

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=len(letters),
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
)
optimizer = SCL(connection_groups(model), lr=5e-3, lam=0.15, mask_lr=1e-2, weight_rule="adamw")
schedule = Schedule(freeze_masks_at=0.6)


class MoveMasks(TrainerCallback):
    """λ and the masks follow the run's progress; the Trainer sees to the learning rate alone."""

    scheduler = Scheduler(optimizer, schedule)

    def on_step_begin(self, args, state, control, **kwargs):
        self.scheduler.set_progress(state.global_step / state.max_steps)


with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=data,
        eval_dataset=data[:200],
        callbacks=[MoveMasks()],
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: schedule.lr_factor(step / STEPS))),
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]

masks = optimizer.masks().values()
live, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
print(f"loss {loss:.3f} nats per letter, {live:,} of {total:,} connections")
