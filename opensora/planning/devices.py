"""What devices can do, for plans: memory, peak, bandwidths.

Peaks and bandwidths are the vendor's (NVIDIA's data sheets of B200, H200, H100, A100, L40S and of their DGX machines,
the white paper on the Ada architecture): dense bfloat16 products with float32 sums, without structured sparsity; links
in one direction, which is half of what is advertised. Memory is what the driver shows: less than the name says where
the vendor counts 10^9 bytes or the card checks for errors.
"""

import os
import re
from dataclasses import dataclass

from opensora.errors import OpenSoraError
from opensora.settings import nearest_name

_MIB = 2**20


@dataclass(frozen=True)
class Device:
    """One kind of device in the machines it is usually found in.

    Attributes:
        name: as the user writes it.
        memory_bytes: of one device.
        peak_tflops: dense bfloat16, 10^12 operations a second; None where nobody measured it.
        memory_gb_s: bandwidth of its memory, 10^9 bytes a second.
        link_gb_s: to the other devices of a machine, in one direction, 10^9 bytes a second.
        network_gb_s: to other machines, each device's share, in one direction, 10^9 bytes a second.
        per_machine: devices in one machine.
    """

    name: str
    memory_bytes: int
    peak_tflops: float | None
    memory_gb_s: float | None = None
    link_gb_s: float | None = None
    network_gb_s: float | None = None
    per_machine: int = 8

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def slowest_link_gb_s(self, num_ranks: int) -> float | None:
        """What each device can send at least while so many work together."""
        return self.link_gb_s if num_ranks <= self.per_machine else self.network_gb_s


# Networks: one port a device in DGX machines (400 Gbit/s, on A100 200 Gbit/s); for cards without NVLink the usual
# machine with one port of 100 Gbit/s for every two of them is assumed, and their link is PCIe 4.0 x16.
DEVICES = (
    Device("b200-180g", 183_359 * _MIB, 2250, 8000, 900, 50),
    Device("h200-141g", 143_771 * _MIB, 989.4, 4800, 450, 50),
    Device("h100-80g", 81_559 * _MIB, 989.4, 3350, 450, 50),
    Device("a100-80g", 81_920 * _MIB, 312, 2039, 300, 25),
    Device("a100-40g", 40_960 * _MIB, 312, 1555, 300, 25),
    Device("l40s-48g", 46_068 * _MIB, 362.05, 864, 32, 6.25),
    Device("rtx4090-24g", 24_564 * _MIB, 165.2, 1008, 32, 6.25),
)


def find_device(name: str) -> Device:
    """The device of that name, also without its memory where that is clear (`l40s`); `cpu` is this machine.

    Raises:
        OpenSoraError: nothing is known of it.
    """
    if name == "cpu":
        return this_machine()
    found = [device for device in DEVICES if name.lower() in (device.name, device.name.rsplit("-", 1)[0])]
    if len(found) != 1:
        hint = nearest_name(name, [device.name for device in DEVICES] + ["cpu"])
        raise OpenSoraError(f"nothing is known of a device {name!r}{hint}")
    return found[0]


def this_machine() -> Device:
    """The CPU, with all of this machine's memory; its peak has to be measured."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory_bytes, peak_tflops=None, per_machine=1)


_UNITS = {"": 2**30, "GB": 2**30, "GIB": 2**30, "G": 2**30, "MB": 2**20, "MIB": 2**20, "M": 2**20}


def device_kind(name: str) -> str:
    """`"cuda"` of `"cuda:1"`; such a device need not be here.

    Raises:
        OpenSoraError: no such kind.
    """
    import torch

    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise OpenSoraError(f"`device` is {name!r}, expected a name such as cpu or cuda") from error


def parse_memory(text: str, name: str = "device_memory") -> int:
    """Bytes of `24GB`, `24` (GB), `7.5 GiB` or `16000MB`; all units are powers of 1024, as memory is sold.

    Raises:
        OpenSoraError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise OpenSoraError(f"`{name}` is {text!r}, expected a size such as 24GB or 16000MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
