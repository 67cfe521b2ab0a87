"""The decoding methods that have a name (seam E)."""

from __future__ import annotations

from llmlab.decoding.autoregressive import Autoregressive
from llmlab.decoding.speculative import Speculative
from llmlab.decoding.verified import Verified
from llmlab.registry import Registry
from llmlab.seams import DecodingMethod

DECODING_METHODS: Registry[DecodingMethod] = Registry(
    "decoding", {"autoregressive": Autoregressive, "speculative": Speculative, "verified": Verified}
)
