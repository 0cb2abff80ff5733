"""Fixtures that several test modules share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    "Sums are then added in the same order in every run and every process."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
