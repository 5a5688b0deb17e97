# SPDX-License-Identifier: MIT
import dataclasses

import pytest

from kimi_ops.models.kimi_k2 import KimiK2, KimiK2Config


@pytest.fixture(scope="module")
def model() -> KimiK2:
    config = dataclasses.replace(
        KimiK2Config.tiny(), vocab_size=256, max_position_embeddings=1024, rope_scaling=None
    )
    made = KimiK2(config)
    made.init_weights(0)
    return made
