"""The classes of other packages, with their names, arguments, units and state, on this package's.

- `fused_margin.compat.pml`: pytorch-metric-learning's losses and regularisers.
- `fused_margin.compat.insightface`: the margins and `PartialFC_V2` of insightface's arcface_torch.
- `fused_margin.compat.heads`: the layers of Kaggle, WeSpeaker and SpeechBrain, returning the loss.

None of these packages is imported. ``docs/migration.md`` has the lines to change in each.
"""
