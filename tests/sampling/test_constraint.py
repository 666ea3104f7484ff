import reprlib

import pytest

from maestrale.errors import RequestError
from maestrale.sampling.constraint import MAX_LENGTH, Constraint, read_constraint

DEEP = {}
for _ in range(5000):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    "wrong",
    [
        *(3, "json", [], {}, {"xml": "a"}, {"regex": "a", "grammar": "b"}, {3: "a"}, {"json_object": False}),
        *({"json_object": "yes"}, {"regex": 3}, {"regex": None}, {"grammar": b"start: 1"}, {"regex": "\ud800"}),
        *({"json_schema": 3}, {"json_schema": "{"}, {"json_schema": "3"}, {"json_schema": {"a": float("nan")}}),
        *(
            {"json_schema": {"a": {1}}},
            DEEP,
            {"json_schema": DEEP},
            {"json_schema": "[" * 100_000},
            {"regex": "x" * 100_001},
        ),
        {"json_schema": {"description": "x" * MAX_LENGTH}},
    ],
    ids=lambda value: reprlib.repr(value),
)
def test_what_is_no_constraint_is_refused_in_one_line_that_names_the_field(wrong):
    with pytest.raises(RequestError) as error:
        read_constraint(wrong, "response_format")
    assert error.value.param == "response_format"
    assert str(error.value).startswith("response_format")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_schema_may_come_as_a_mapping_or_as_json():
    schema = {"type": "object", "properties": {"è": {"enum": [1, None]}}}
    by_text = read_constraint({"json_schema": '{"type":"object", "properties":{"\\u00e8":{"enum":[1,null]}}}'})
    assert by_text == read_constraint({"json_schema": schema})
    assert hash(by_text) == hash(read_constraint({"json_schema": schema}))


def test_a_json_object_is_the_schema_of_any_object():
    assert read_constraint({"json_object": True}) == read_constraint({"json_schema": {"type": "object"}})


def test_none_and_a_constraint_stay_what_they_are():
    constraint = Constraint("regex", "a+")
    assert read_constraint(None) is None
    assert read_constraint(constraint) is constraint
    assert read_constraint({"regex": "a+"}) == constraint
