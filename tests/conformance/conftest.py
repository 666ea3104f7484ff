import pytest
from backends import BACKENDS
from tiny import MODELS, hf_model, native_weights, write_native


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A function from a name in MODELS to (transformers' model, native folder of the same weights); made once each."""
    made = {}

    def build(name):
        if name not in made:
            model, config = hf_model(MODELS[name]), MODELS[name]
            folder = write_native(tmp_path_factory.mktemp(name), config, native_weights(model, config))
            made[name] = model, folder
        return made[name]

    return build
