"""What a reader says of inputs that it refuses."""

from __future__ import annotations

import pytest

from braid.data_pipeline.readers import documents
from braid.kernels.errors import InputError


def error(*inputs, **options) -> str:
    """The message of the error that reading the documents of `inputs` ends with; it has to say what to change."""
    with pytest.raises(InputError) as caught:
        list(documents(inputs, **options))
    assert caught.value.change
    return str(caught.value)
