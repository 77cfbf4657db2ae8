"""pytest bench stamps its JSON with the machine and the state that it is in."""

from minidiff.bench.speed.state import state
from minidiff.machine import machine


def pytest_benchmark_update_machine_info(machine_info):
    """pytest-benchmark's hook."""
    machine_info |= machine() | state()
