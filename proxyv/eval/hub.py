"""Whether the Hugging Face hub can be reached, asked briefly."""

from __future__ import annotations

import urllib.error
import urllib.request

from huggingface_hub import constants

__all__ = ["hub_reachable"]

TIMEOUT_S = 5.0


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers within seconds; never tried with HF_HUB_OFFLINE=1."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True  # it answered, if only to refuse
    except OSError:
        return False
