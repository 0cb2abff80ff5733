"What the tests of faults share."
import pytest

from crossmodal.data.digits import digit_pools
from crossmodal.metrics.reading import train_reader
from crossmodal.systems import embedmap


@pytest.fixture(scope="module")
def hasty_reader():
    "How well digits are read is not asked here, only that they are read the same: 30 steps of training instead of 1,500."
    reader = train_reader(digit_pools("digits")["train"], steps=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedmap, "digit_reader", lambda source: reader)
        yield
