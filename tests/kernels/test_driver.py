"""A launch by CUDA's driver: what it is asked for, argument by argument, and what it says."""

import ctypes

import pytest
import torch

from minidiff.kernels import driver


class Driver:
    """A driver that notes what it was asked for, what each argument of a launch held included."""

    def __init__(self, kinds, error=0):
        self.kinds, self.error, self.seen = kinds, error, []

    def cuLaunchKernel(self, function, *more):
        *shape, stream, pointers, extra = more
        held = [ctypes.cast(at, ctypes.POINTER(kind))[0] for at, kind in zip(pointers, self.kinds)]
        self.seen.append(("launched", function.value, [n.value for n in shape], stream.value, held,
                          extra))
        return self.error

    def cuCtxPushCurrent_v2(self, context):
        self.seen.append(("entered", context.value))

    def cuCtxPopCurrent_v2(self, context):
        self.seen.append(("left",))

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 100 + device.value

    def cuGetErrorString(self, error, words):
        words._obj.value = b"out of luck"


@pytest.fixture
def nvidia(monkeypatch):
    """nvidia(kinds, error=0): a Driver in the place of NVIDIA's."""
    def make(*given):
        found = Driver(*given)
        monkeypatch.setattr(driver, "_library", lambda: found)
        monkeypatch.setattr(driver, "_context", driver._context.__wrapped__)  # not a kept one
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7 + index,
                            raising=False)
        return found
    return make


def test_a_launch_is_on_the_tensors_device_and_stream(nvidia):
    """Grid, block, shared memory and every argument; the context that was current is again."""
    pointer, step = ctypes.c_void_p, ctypes.c_uint32
    found = nvidia([pointer, pointer, ctypes.c_uint64, ctypes.c_int32, pointer, step, pointer])
    x, counter = torch.zeros(3), torch.zeros((), dtype=torch.int64)
    launch = driver.prepare(torch.device("cuda:1"), driver.Kernel(42, 256, 16), 9,
                            (x, None, 2**64 - 1, -5))
    for last, held in (((), (None, 0)), ((2**32 - 1,), (None, 2**32 - 1)),
                       ((counter,), (counter.data_ptr(), 0))):
        found.seen.clear()
        launch(*last)
        assert found.seen == [
            ("entered", 101),
            ("launched", 42, [9, 1, 1, 256, 1, 1, 16], 8,
             [x.data_ptr(), None, 2**64 - 1, -5, *held, None], None),
            ("left",)]


def test_a_launch_follows_the_stream_and_adds_to_a_counter(nvidia, monkeypatch):
    """The stream that is current when it is launched, and first_step beside a counter alone."""
    found = nvidia([ctypes.c_void_p, ctypes.c_uint32])
    stream = [3]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0])
    launch = driver.prepare(torch.device("cuda:0"), driver.Kernel(1, 32), 1, (), first_step=100)
    counter = torch.zeros((), dtype=torch.int64)
    launch(7)
    stream[0] = 4
    launch(counter)
    launched = [(on, held) for _, _, _, on, held, _ in found.seen[1::3]]
    assert launched == [(3, [None, 7]), (4, [counter.data_ptr(), 100])]


def test_a_launch_that_fails_says_so_in_the_drivers_words(nvidia):
    found = nvidia([ctypes.c_void_p], 2)
    launch = driver.prepare(torch.device("cuda:0"), driver.Kernel(1, 32), 1, (torch.zeros(1),))
    with pytest.raises(RuntimeError, match="^cuLaunchKernel: out of luck$"):
        launch()
    assert found.seen[-1] == ("left",)
