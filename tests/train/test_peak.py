import jax
import pytest

from lmx.plan import topology_devices
from lmx.train.peak import peak_flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
    ],
)
def test_dense_bfloat16_peaks_are_those_of_the_data_sheets(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_hardware_without_bfloat16_has_float16_alone():
    for kind, teraflops in (("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla T4", 65)):
        assert peak_flops(kind) is None
        assert peak_flops(kind, "float16") == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    ["cpu", "", "TPU v99", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce GTX 1060", "NVIDIA A1000"],
)
def test_what_nobody_has_measured_is_not_guessed(kind):
    assert peak_flops(kind) is None


def test_this_machine_is_a_cpu_without_a_peak():
    assert peak_flops(jax.devices("cpu")[0].device_kind) is None


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(ValueError, match="float64"):
        peak_flops("TPU v4", "float64")


@pytest.mark.parametrize(
    ("name", "chip"), [("v3:2x2", 123), ("v4:2x2x1", 275), ("v5p:2x2x1", 459), ("tpu7x:2x2x1", 2307)]
)
def test_the_devices_libtpu_makes_of_four_chips_add_up_to_four_chips(name, chip):
    pytest.importorskip("libtpu")
    devices = topology_devices(name)
    assert sum(peak_flops(d.device_kind, num_cores=d.num_cores) for d in devices) == 4 * chip * 1e12
