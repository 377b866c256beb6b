"""Other ways to a sparse network, to compare SCL with; each an optimizer of the same kind.

They are written for the comparison: whole tensors (no FSDP, no ZeRO), single weights (no kernels,
features or N:M), and everything else as it is for SCL, so that only the rule differs.
"""

from sclcore.baselines.magnitude import Magnitude
from sclcore.baselines.rigl import RigL, erk_densities
from sclcore.baselines.soft_threshold import SoftThreshold

__all__ = ["Magnitude", "RigL", "SoftThreshold", "erk_densities"]
