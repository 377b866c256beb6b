"""Sparse Connectivity Learning for any PyTorch training loop.

from sclcore import SCL, connection_groups

optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)
"""

from sclcore.connections import connection_groups, layer_budgets, weight_uses
from sclcore.optimizer import SCL
from sclcore.schedule import Schedule, Scheduler

__all__ = ["SCL", "Schedule", "Scheduler", "connection_groups", "layer_budgets", "weight_uses"]
