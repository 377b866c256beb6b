"""SCL in a plain PyTorch loop: a perceptron for scikit-learn's digits keeps few of its weights."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from sclcore import SCL, Schedule, Scheduler, connection_groups

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images = torch.from_numpy(pixels).float() / 16
labels = torch.from_numpy(digits)
train, test = slice(0, 1400), slice(1400, None)

model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer = SCL(connection_groups(model), lr=0.3, lam=0.2, mask_lr=5e-3)
# Warm-up and cosine for the learning rate; the masks are final from half of the run on.
scheduler = Scheduler(optimizer, Schedule(freeze_masks_at=0.5))

STEPS = 600
for step in range(STEPS):
    scheduler.set_progress(step / STEPS)
    batch = torch.randint(1400, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
    optimizer.step()

with torch.no_grad():
    logits = model(images[test])
loss = float(nn.functional.cross_entropy(logits, labels[test]))
top1 = float((logits.argmax(1) == labels[test]).float().mean())
live = sum(optimizer.live_connections().values())
print(f"test loss {loss:.3f}, top-1 {top1:.1%}, {live:,} of {64 * 100 + 100 * 10:,} connections")
