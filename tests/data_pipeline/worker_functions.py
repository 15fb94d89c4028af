"""What the tests of `Workers` let them do: in a module that their processes can import."""

from __future__ import annotations

import os
import time

from braid.kernels.errors import InputError


def slow_if_even(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 2 == 0))
    return number * number, os.getpid()


def die(number: int) -> int:
    os._exit(3) if number == 4 else None
    return number


def refuse(number: int) -> int:
    raise InputError("no", found=f"{number}", change="yes")
