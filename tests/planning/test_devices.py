"""Devices by name."""

import pytest

from opensora.errors import OpenSoraError
from opensora.planning.devices import DEVICES, find_device


@pytest.mark.parametrize(("name", "found"), [("h100-80g", "h100-80g"), ("H100", "h100-80g"), ("a100-40g", "a100-40g")])
def test_devices_are_found_by_name(name, found):
    assert find_device(name).name == found


@pytest.mark.parametrize(("name", "hint"), [("h100-8g", "mean h100-80g"), ("a100", "a100-"), ("graviton", "known:")])
def test_an_unknown_or_ambiguous_device_names_what_is_near(name, hint):
    with pytest.raises(OpenSoraError, match=hint):
        find_device(name)


def test_what_is_said_of_devices_is_plausible():
    for device in DEVICES:
        size = float(device.name.rpartition("-")[2].rstrip("g"))
        assert 0.93 * size < device.memory_bytes / 2**30 < 1.03 * size
        assert device.peak_tflops and device.memory_gb_s and device.link_gb_s and device.network_gb_s
        assert device.slowest_link_gb_s(8) == device.link_gb_s > device.network_gb_s == device.slowest_link_gb_s(9)


def test_the_cpu_is_this_machine_and_nobody_measured_it():
    cpu = find_device("cpu")
    assert cpu.is_cpu and cpu.memory_bytes > 2**30 and cpu.peak_tflops is None
