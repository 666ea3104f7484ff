"""Tests of the native backend need its kernels: where they are not built, they say so and skip."""

import pytest

from maestrale.native_backend import kernels

if kernels.native is None:
    pytest.skip(str(kernels.missing()), allow_module_level=True)


@pytest.fixture(scope="session", params=kernels.native.isas())
def isa(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def pool():
    return kernels.native.Pool(2)
