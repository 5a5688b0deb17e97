# SPDX-License-Identifier: MIT
"""pytest plugin (-p benchmarks.device_check.guard) against broken CUDA contexts.

After an illegal instruction or address every later CUDA call of the process fails. A test that
fails so ends its worker, and xdist starts another; without xdist the run ends, with a sentence.
"""

import os
import time
from collections.abc import Generator
from typing import Any

import pytest

EXIT_STATUS = 17
_broken = False


def context_is_broken() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: object, call: object) -> Generator[None, Any, None]:
    global _broken
    outcome = yield
    report = outcome.get_result()
    if report.failed and context_is_broken():
        _broken = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str, location: object) -> None:
    if not _broken:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        time.sleep(0.5)  # for the report to be sent
        os._exit(EXIT_STATUS)
    sentence = f"{nodeid} broke the CUDA context; with pytest-xdist the rest would run"
    pytest.exit(sentence, EXIT_STATUS)
