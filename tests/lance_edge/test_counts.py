"""Sizes as people write them; lists of counts are tested where commands read them."""

import pytest

from lance_edge.counts import parse_bytes

KIB = 1024


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512B", 512),
        ("256KiB", 256 * KIB),
        ("1.5MiB", 1536 * KIB),
        (" 2 MiB ", 2048 * KIB),
        ("0.5KiB", 512),
        ("256KB", 256_000),
        ("1.5 GB", 1_500_000_000),
        ("4096", 4096),
        ("0", 0),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "256kb", "-1KiB", "1e3B", "KiB", "1,5MiB", "nanB", "1.2.3B", "1iB", "9" * 400, "much"]
)
def test_what_is_no_size(text):
    assert parse_bytes(text) is None
