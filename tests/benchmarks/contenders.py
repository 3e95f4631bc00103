"""Which of the contenders don't run everywhere."""

from __future__ import annotations

import torch.nn.functional as F

HAS_LCE = hasattr(F, "linear_cross_entropy")
GPU_ONLY = {"cce", "cce_exact", "liger", "liger_fp32"}
