"""The end of a program that runs as several processes."""

import time

from accelerate import PartialState

_LETTING_GO = 0.2  # seconds


def end_process_group() -> None:
    """End what the processes talk by, if there is more than one: the last call of a program.

    A thread of gloo lets go of the tensors of a message some time after the message has arrived, for which it needs
    the interpreter. One that still waits for it when the interpreter shuts down aborts the process, whether the group
    was destroyed or not (https://github.com/pytorch/pytorch/issues/190489); so here the interpreter is free for a
    moment.
    """
    state = PartialState()
    if state.num_processes > 1:
        time.sleep(_LETTING_GO)
    state.destroy_process_group()
