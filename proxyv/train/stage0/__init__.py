"""Stage 0: the tiny preset's own backbones, trained from scratch on the small world."""
