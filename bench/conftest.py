"""pytest bench stamps its JSON with minidiff.machine."""

from minidiff.machine import machine


def pytest_benchmark_update_machine_info(machine_info):
    """pytest-benchmark's hook."""
    machine_info |= machine()
