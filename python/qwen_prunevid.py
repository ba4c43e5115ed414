"""PruneVid for Qwen2.5-VL under the names that scripts import it by; the code is :mod:`vidtok.systems`.

``AutoModelForVision2Seq`` is here as well: transformers 5 has it only as ``AutoModelForImageTextToText``,
which 4.57 knows too.
"""

from __future__ import annotations

from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq

from vidtok.systems.prunevid import Qwen25VLPruneVid, Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2

__all__ = ["AutoModelForVision2Seq", "Qwen25VLPruneVid", "Qwen25VLStage1Wrapper", "Qwen25VLStage1WrapperV2"]
