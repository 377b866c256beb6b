"""An average of the weights (EMA) beside SCL: it is sparse once the masks are applied to it."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sclcore import SCL, Schedule, Scheduler, connection_groups

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images = torch.from_numpy(pixels).float() / 16
labels = torch.from_numpy(digits)
train, test = slice(0, 1400), slice(1400, None)

model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer = SCL(connection_groups(model), lr=0.3, lam=0.2, mask_lr=5e-3)
scheduler = Scheduler(optimizer, Schedule(freeze_masks_at=0.5))
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

STEPS = 600
for step in range(STEPS):
    scheduler.set_progress(step / STEPS)
    batch = torch.randint(1400, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
    optimizer.step()
    averaged.update_parameters(model)

dense = sum(int((p != 0).sum()) for p in averaged.parameters() if p.ndim > 1)
# Before it is evaluated or saved, and before torch's `update_bn` where there are batch norms.
optimizer.apply_masks(averaged)
live = sum(int((p != 0).sum()) for p in averaged.parameters() if p.ndim > 1)

with torch.no_grad():
    top1 = float((averaged(images[test]).argmax(1) == labels[test]).float().mean())
print(f"top-1 {top1:.1%}; {dense:,} weights were not 0, {live:,} are left")
