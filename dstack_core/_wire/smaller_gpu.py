"""What a run would ask for if it asked for the GPU memory that it used (PROTOCOL 1.4, 1.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstack_core.models.utilization import Utilization

# Of the peak, which was measured every ten seconds: a shorter peak may have been higher.
_HEADROOM = 1.25
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class SmallerGpu:
    """The run_spec for a GPU that is large enough and smaller than the run's own."""

    run_spec: Mapping[str, Any]


def smaller_gpu(data: Mapping[str, Any], usage: Utilization) -> SmallerGpu | None:
    """Return what a run would ask for; None where its own GPU is the right one, or it did not ask for one."""
    spec = data.get("run_spec") or {}
    configuration = spec.get("configuration") or {}
    resources = configuration.get("resources") or {}
    gpu = resources.get("gpu")
    if not isinstance(gpu, Mapping) or not usage.gpu_memory_peak or not usage.gpu_memory_total:
        return None
    least = math.ceil(usage.gpu_memory_peak * _HEADROOM / _GIB)
    total = usage.gpu_memory_total / _GIB
    if least >= total:
        return None
    # The name, the vendor's generation and the sum of all GPUs named the large one.
    wanted = {key: value for key, value in gpu.items() if key in ("vendor", "count")}
    wanted["memory"] = {"min": least, "max": math.ceil(total) - 1}
    # dstack means NVIDIA where nothing is named; without a name it would now mean any vendor.
    wanted["vendor"] = gpu.get("vendor") or "nvidia"
    changed = {**configuration, "resources": {**resources, "gpu": wanted}}
    # Without the name: the plan for an existing run would be that of its update.
    return SmallerGpu({**spec, "configuration": changed, "run_name": None})
