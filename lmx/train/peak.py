"""The fastest a device can multiply matrices, by its name: what model FLOP use (MFU) is measured against."""

from __future__ import annotations

import re

# TFLOP/s of bfloat16 matrix products per core, and cores in one jax device.
# float32 counts the same: jax multiplies it in bfloat16 passes unless told otherwise.
# Source: cloud.google.com/tpu/docs/v2 to /v6e and /tpu7x, "Peak compute per chip", over the chip's cores.
_TPU = (
    (r"v2", 23.0, 1),
    (r"v3", 61.5, 1),
    (r"v4 lite", 138.0, 1),
    (r"v4", 137.5, 2),
    (r"v5 lite|v5e", 197.0, 1),
    (r"v5p?", 229.5, 2),
    (r"v6 lite|v6e", 918.0, 1),
    (r"7x", 1153.5, 1),
)
# TFLOP/s of dense products in (bfloat16, float16, float32); float32 is TF32 where there is TF32, as in jax.
# Source: the data sheet of each product; where it gives numbers "with sparsity" only, half of them.
_NVIDIA = (
    (r"GB200", (2500.0, 2500.0, 1250.0)),  # GB200 NVL72 data sheet
    (r"B200", (2250.0, 2250.0, 1100.0)),  # HGX B200 data sheet
    (r"(GH200|H200|H100).*NVL", (835.5, 835.5, 417.5)),  # H100 NVL, H200 NVL data sheets
    (r"H100.*PCIe", (756.5, 756.5, 378.0)),  # H100 data sheet
    (r"GH200|H200|H100", (989.5, 989.5, 494.5)),  # H100 SXM, H200 SXM data sheets
    (r"A100", (312.0, 312.0, 156.0)),  # A100 data sheet
    (r"A10G", (70.0, 70.0, 35.0)),  # A10G data sheet
    (r"A10", (125.0, 125.0, 62.5)),  # A10 data sheet
    (r"L40S", (362.05, 362.05, 183.0)),  # L40S data sheet
    (r"L4", (121.0, 121.0, 60.0)),  # L4 data sheet
    (r"V100.*PCIE", (None, 112.0, 14.0)),  # V100 data sheet; no bfloat16 and no TF32 before Ampere
    (r"V100", (None, 125.0, 15.7)),
    (r"T4", (None, 65.0, 8.1)),  # T4 data sheet
    (r"RTX 4090", (165.2, 165.2, 82.6)),  # Ada whitepaper, with float32 sums
    (r"RTX 3090", (71.0, 71.0, 35.6)),  # GA102 whitepaper, with float32 sums
)
_DTYPES = ("bfloat16", "float16", "float32")


def peak_flops(device_kind: str, dtype: str = "bfloat16", *, num_cores: int | None = None) -> float | None:
    """FLOP/s of one jax device in dense matrix products, or None where nobody has written it down.

    None on CPUs, on slices of a GPU (MIG), and where the hardware has no such dtype.
    Args:
      device_kind: as `jax.devices()[0].device_kind` gives it.
      dtype: of the factors; sums are float32.
      num_cores: of a TPU device, `device.num_cores`; None takes what is usual. It matters on v4, whose two
        cores can be one device or two.

    >>> peak_flops("TPU v5 lite"), peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (197000000000000.0, 989500000000000.0, None)

    Raises: ValueError if dtype is not one of bfloat16, float16, float32.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"peak_flops: dtype={dtype!r} is not known here; use one of {', '.join(_DTYPES)}")
    if device_kind.startswith("TPU"):
        name = device_kind.removeprefix("TPU").strip()
        for pattern, per_core, usual in _TPU:
            if re.fullmatch(pattern, name) and dtype != "float16":
                return per_core * (num_cores or usual) * 1e12
    elif "MIG" not in device_kind.split():
        for pattern, peaks in _NVIDIA:
            if re.search(rf"\b({pattern})\b", device_kind):
                peak = peaks[_DTYPES.index(dtype)]
                return None if peak is None else peak * 1e12
    return None
