"""pytest bench stamps its JSON with the machine, and with the state that it is in."""

from minidiff.bench.speed.state import state
from minidiff.machine import machine


def pytest_benchmark_update_machine_info(machine_info):
    """What must be the same in runs that are compared."""
    versions = machine()
    del versions["commit"]  # which is in pytest-benchmark's own commit_info
    machine_info |= versions


def pytest_benchmark_update_json(output_json):
    """What may differ."""
    output_json["state"] = state()
