import random

import hypothesis
import numpy as np
import pytest
import torch

# The same examples in every run: what fails here fails for everyone.  --hypothesis-profile=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def settings():
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
    )


@pytest.fixture(autouse=True)
def _alone():
    """Every test starts from the same random states, whatever ran before it, and leaves torch's settings alone."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = settings()
    yield
    assert settings() == before


@pytest.fixture(scope="session")
def two():
    """Two processes in one group, started when a test first asks for them."""
    from ranks import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four():
    """Four processes in one group."""
    from ranks import Ranks

    ranks = Ranks(4)
    yield ranks
    ranks.close()
