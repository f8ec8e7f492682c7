"""Element-wise functions as one kernel each, by torch.compile, where Triton is there: on a GPU."""

import functools
import sys
from importlib.util import find_spec

import torch


class Compiled:
    """A function by torch.compile, with the eager function's roundings; uncompiled after the
    compiler has failed, which is said once."""

    def __init__(self, function):
        self.function = function
        self.fast = torch.compile(function, dynamic=True, fullgraph=True,
                                  options={"emulate_precision_casts": True})

    def __call__(self, *args):
        if self.fast is None:
            return self.function(*args)
        try:
            return self.fast(*args)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:               # the compiler has errors of many classes
            self.fast = None
            why = (str(e).splitlines() or [type(e).__name__])[0]
            print(f"{self.function.__name__} could not be compiled ({why}): it runs uncompiled, a "
                  "little slower", file=sys.stderr)
            return self.function(*args)


one_of_each = functools.cache(Compiled)


def one_kernel(function, device):
    """The function, compiled where the device is a GPU and Triton is installed; the eager one is
    the tested reference."""
    if device.type != "cuda" or find_spec("triton") is None:
        return function
    return one_of_each(function)
