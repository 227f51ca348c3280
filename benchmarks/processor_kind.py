"""The kind of this machine's processor, more precise than the name that a virtual machine shows."""

import platform
import re
from contextlib import suppress
from pathlib import Path

# Vendor, family, first and last model; from Linux: arch/x86/kernel/cpu/amd.c, arch/x86/include/asm/intel-family.h.
MICROARCHITECTURES = {
    ("AuthenticAMD", 23, 0x30, 0x4F): "Zen 2",
    ("AuthenticAMD", 23, 0x60, 0x7F): "Zen 2",
    ("AuthenticAMD", 23, 0x00, 0x5F): "Zen",
    ("AuthenticAMD", 25, 0x10, 0x1F): "Zen 4",
    ("AuthenticAMD", 25, 0x60, 0xAF): "Zen 4",
    ("AuthenticAMD", 25, 0x00, 0x5F): "Zen 3",
    ("AuthenticAMD", 26, 0x00, 0x2F): "Zen 5",
    ("AuthenticAMD", 26, 0x40, 0x4F): "Zen 5",
    ("AuthenticAMD", 26, 0x60, 0x7F): "Zen 5",
    ("GenuineIntel", 6, 0x55, 0x55): "Skylake or Cascade Lake",
    ("GenuineIntel", 6, 0x6A, 0x6C): "Ice Lake",
    ("GenuineIntel", 6, 0x8F, 0x8F): "Sapphire Rapids",
    ("GenuineIntel", 6, 0xCF, 0xCF): "Emerald Rapids",
    ("GenuineIntel", 6, 0xAD, 0xAE): "Granite Rapids",
    ("GenuineIntel", 6, 0x97, 0x9A): "Alder Lake",
    ("GenuineIntel", 6, 0xB7, 0xBF): "Raptor Lake",
}
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
INSTRUCTIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "avx512_vnni": "AVX512-VNNI", "avx2": "AVX2"}


def processor_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """Return a short name for files, such as amd-zen4, and a description with family, model, and instructions.

    Without Linux's file for an x86 processor, both name the architecture only.
    """
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    if "cpu family" not in fields:
        return platform.machine(), platform.machine()
    vendor, family, model = fields["vendor_id"], int(fields["cpu family"]), int(fields["model"])
    known = [
        name
        for (maker, number, first, last), name in MICROARCHITECTURES.items()
        if (maker, number) == (vendor, family) and first <= model <= last
    ]
    flags = fields.get("flags", "").split()
    instructions = ", ".join(word for flag, word in INSTRUCTIONS.items() if flag in flags) or "no AVX2"
    where = f"family {family}, model {model}" + (f": {known[0]}" if known else "")
    slug = f"{VENDORS.get(vendor, vendor)} {known[0].replace(' ', '', known[0].startswith('Zen')) if known else where}"
    return re.sub(r"\W+", "-", slug.lower()), f"{fields['model name']} ({where}; {instructions})"
