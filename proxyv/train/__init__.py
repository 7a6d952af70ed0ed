"""Training: settings, stages, trainer, and stage 0, which makes the tiny backbones."""
