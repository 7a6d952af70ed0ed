"""Starting ranks with torchrun's launcher, and what a rank needs before it trains.

torchrun's own report of a failed rank is a page of traceback; here the rank's one line is all
that shows, and its exit code passes through.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from proxyv.train.nodes import Nodes
from proxyv.train.settings import Settings

__all__ = ["die_with_parent", "first_to_report", "launch", "prepare_rank"]

_SAVE_SECONDS = 900
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_REPORT = "PROXYV_REPORT"  # names a file that the first rank to fail creates


def launch(arguments: Sequence[str], ranks: int, nodes: Nodes) -> int:
    """Run ``python -m proxyv.train`` in so many ranks on this machine, one of ``nodes``.

    Returns:
        0, the exit code of the rank that failed first, or 128 and the number of the signal that
        ended the launch.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    # A rank that is told to go finishes its step and saves: longer than torchrun's 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_SECONDS))
    options = [*nodes.options(), f"--nproc-per-node={ranks}", "--module", "proxyv.train"]
    with tempfile.TemporaryDirectory(prefix="proxyv-") as folder:
        os.environ[_REPORT] = str(Path(folder) / "reported")
        try:
            run(parse_args([*options, *arguments]))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + int(error.sigval)
        finally:
            del os.environ[_REPORT]
    return 0


def first_to_report() -> bool:
    """Whether this rank is the first of its launch to report a mistake, which all may meet."""
    mark = os.environ.get(_REPORT)
    if mark is None:
        return True
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def die_with_parent() -> None:
    """Have Linux kill this rank when its launcher is gone, however that died.

    Otherwise a rank whose launcher was killed would train on, unseen, while the same command
    starts another one in the same folder.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def prepare_rank(settings: Settings) -> None:
    """Choose the device, silence what a user cannot act on, and compile nothing on a CPU."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # accelerate notes that DeepSpeed, not it, counts accumulation steps: that is meant.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return
    if settings.deepspeed.config is None:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed would build a shared-memory collective with a C++ compiler, where gloo serves.
    # This table is what it asks before it builds an operator.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
