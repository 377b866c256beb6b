"""SCL in Lightning: the optimizer of a LightningModule, and its schedule before each batch."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sclcore import SCL, Schedule, Scheduler, connection_groups


class SparseDigits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16 * 16, 10),
        )  # fmt: skip

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def test_step(self, batch, _):
        images, labels = batch
        logits = self.model(images)
        self.log("loss", nn.functional.cross_entropy(logits, labels))
        self.log("top1", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        self.optimizer = SCL(connection_groups(self.model), lr=0.2, lam=0.2, mask_lr=4e-3)
        self.scheduler = Scheduler(self.optimizer, Schedule(freeze_masks_at=0.6))
        return self.optimizer

    def on_train_batch_start(self, batch, _):
        self.scheduler.set_progress(self.global_step / self.trainer.estimated_stepping_batches)


lightning.seed_everything(0, verbose=False)
pixels, digits = load_digits(return_X_y=True)
data = TensorDataset(
    torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(digits)
)
train = torch.utils.data.Subset(data, range(1400))
test = torch.utils.data.Subset(data, range(1400, len(data)))

module = SparseDigits()
trainer = lightning.Trainer(
    max_epochs=12,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(train, 64, shuffle=True))
[results] = trainer.test(module, DataLoader(test, len(test)), verbose=False)
masks = module.optimizer.masks().values()
live, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
print(f"test loss {results['loss']:.3f}, top-1 {results['top1']:.1%}, {live:,} of {total:,}")
