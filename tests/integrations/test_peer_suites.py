"""Peers' own tests on our classes, where a clone of the peer's repository exists: see docs/peers.md."""

from __future__ import annotations

import os
from pathlib import Path

import peer_suites
import pytest


@pytest.mark.long
@pytest.mark.parametrize("peer", peer_suites.SUITES)
def test_peers_own_tests_have_the_documented_results(peer):
    checkout = Path(os.environ.get("BCLIP_PEERS", "")) / peer
    if "BCLIP_PEERS" not in os.environ or not checkout.is_dir():
        pytest.skip(f"BCLIP_PEERS names no folder with a clone {peer}")
    assert peer_suites.run(peer, checkout) == []


def test_differences_name_each_unexpected_result():
    suite = peer_suites.Suite("", ".", (), passed=2, not_passed={"a.py::private": 1}, skipped=1)
    report = "PASSED a.py::x\nPASSED a.py::y\nFAILED a.py::private[0] - error\nSKIPPED [1] a.py:3: no GPU\n"
    assert peer_suites.differences(suite, report) == []
    report = "PASSED a.py::x\nERROR a.py::y - error\n"
    assert peer_suites.differences(suite, report) == [
        "1 tests passed, not 2",
        "0 tests were skipped, not 1",
        "0 tests a.py::private... did not pass, not 1",
        "a.py::y did not pass",
    ]
