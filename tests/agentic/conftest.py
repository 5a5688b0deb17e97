# SPDX-License-Identifier: MIT
import pytest

from kimi_ops.models.kimi_k2 import KimiK2
from tests.agentic.agentic_parts import tiny


@pytest.fixture(scope="module")
def model() -> KimiK2:
    return tiny()
