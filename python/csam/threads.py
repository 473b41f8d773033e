"""How many threads torch's operations take in a thread."""

from __future__ import annotations

import threading

import torch

_setting = threading.Lock()


def one_intra_op_thread() -> None:
    """Give the calling thread, a new one, one intra-op thread, and threads to come what they had.

    torch.set_num_threads sets the number of the calling thread and of all threads to come. So a thread of its
    own puts the latter back, one caller at a time.
    """
    with _setting:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()


__all__ = ["one_intra_op_thread"]
