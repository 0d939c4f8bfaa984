"""Marks for tests that older versions of transformers fail with any cache."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from packaging.version import Version


def needs_transformers(version: str, reason: str) -> Any:
    """Mark tests that cannot pass in a transformers older than `version` because of transformers itself."""
    older = Version(Version(transformers.__version__).base_version) < Version(version)
    return pytest.mark.skipif(older, reason=f"{reason} in transformers before {version}")


#: The draft's own cache is cropped by what was proposed, not by what it holds; "The size of tensor a (43) must match ...".
DRAFTS_WITH_WINDOWS = needs_transformers("5.18", "a draft model with sliding windows may stop with an error")
#: Layers skipped by early exit have nothing to crop: "'NoneType' object is not subscriptable".
EARLY_EXIT_WITH_WINDOWS = needs_transformers("5.19", "early exit of a model with sliding windows stops with an error")
#: "cannot reshape tensor of 0 elements".
LONG_DRAFTS = needs_transformers("5.16", "a draft model of which all tokens were taken may be left without a token to read")
#: Its attention, not the module of the rotary embedding, has the mask and positions in older versions.
SECTIONS_OF_ROTARY = needs_transformers("5.17", "Qwen2-VL divides its rotary phase in the attention")
