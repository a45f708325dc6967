"""What a kernel is made for, and which names of kernels may be shared."""

from dataclasses import replace

import pytest
from dicom_series import FACTS

from ctfm.extract.kernels import kernel_kind, kernel_name


@pytest.mark.parametrize(
    ("kernel", "description", "kind"),
    [
        ("H31s", "", "soft-tissue"),
        ("Br38f", "", "soft-tissue"),
        ("H60f", "", "sharp"),
        ("STANDARD", "", "soft-tissue"),
        ("STD+", "", "soft-tissue"),
        ("BONEPLUS", "", "sharp"),
        ("UB", "", "soft-tissue"),
        ("YA", "", "sharp"),
        ("FC26", "", "soft-tissue"),
        ("FC30", "", "sharp"),
        ("", "HEAD BONE 1mm", "sharp"),
        ("", "", "unknown"),
    ],
)
def test_kernels_of_every_vendor_are_known(kernel: str, description: str, kind: str) -> None:
    assert kernel_kind(replace(FACTS, kernel=kernel, description=description)) == kind
    assert kernel_name(kernel) == (kernel or None)


@pytest.mark.parametrize(
    "kernel",
    ["B_VSHARP_C", "Brain Standard", "Hr40f", "FL03", "STD+", "uc", "H31S", "fc26", "B SOFT"],
)
def test_a_kernel_with_a_name_keeps_it(kernel: str) -> None:
    assert kernel_name(f" {kernel}") == kernel


@pytest.mark.parametrize(
    "text",
    [
        "Jane Doe",
        "DOE^JANE",
        "Doe",
        "19551231",
        "12-31-55",
        "H31 B12",
        "MRN4242",
        "H31s\n",
        "_",
        "61",
        "soft soft soft soft",
        "J.O.H.N",
        "J S B",
        "A B",
        "B.C. soft",
        "J",
        "AB12CD",
        "Jd55",
        "HB12",
        "JSB55",
    ],
)
def test_what_does_not_read_like_a_kernel_is_not_kept(text: str) -> None:
    assert kernel_name(text) is None
