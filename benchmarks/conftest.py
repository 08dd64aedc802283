from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--large", action="store_true", help="with the cases that take minutes a call")
